"""Checks of what a user hands to a kernel. Each raises a ValueError that names the argument."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    like: Tensor | None = None,
    last_stride_one: bool = True,
) -> None:
    """`shape` entries of None are free; `like` fixes the device."""
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: dtype {x.dtype} is not supported; give one of {allowed}")
    if shape is not None and (
        x.dim() != len(shape)
        or any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True))
    ):
        want_text = tuple("any" if want is None else want for want in shape)
        raise ValueError(f"{name}: shape {tuple(x.shape)} given, {want_text} expected")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: on {x.device}, the first argument is on {like.device}; move one")
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        raise ValueError(
            f"{name}: on {x.device}; Triton kernels need a CUDA device "
            "(or TRITON_INTERPRET=1 on the CPU)"
        )
    if last_stride_one and x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: the last stride is {x.stride(-1)}, must be 1; call .contiguous() on it"
        )


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def compute_capability(x: Tensor) -> int:
    """90 for sm_90; 0 in interpreter mode."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def tma_compatible(x: Tensor) -> Tensor:
    """x itself when every row starts at a multiple of 16 bytes and no stride is 0, else a copy."""
    size = x.element_size()
    good = x.data_ptr() % 16 == 0 and all(
        extent == 1 or (stride > 0 and stride * size % 16 == 0)
        for extent, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )
    return x if good else x.clone(memory_format=torch.contiguous_format)
