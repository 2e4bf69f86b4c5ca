"""Latents of a quantised cache: codes of one byte, and one float32 scale per token and layer.

One definition for every cache and backend: `kernels/reference.py` says how a row is rounded, the
append kernels do the same, and the decode kernels read what comes of it.

Legend: C = kv_lora_rank + qk_rope_head_dim, numbers of a token's row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ic.errors import check_choice
from ic.kernels.reference import quantize_per_token
from ic.model.options import CACHE_DTYPES

_CODES = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
# e4m3 has three bits behind the leading one, and below 2**-6 steps of 2**-9; int8 steps of 1. A
# number is rounded by at most half a step.
_E4M3_RELATIVE, _E4M3_SMALLEST, _INT8 = 2.0**-4, 2.0**-10, 0.5


def code_dtype(name: str) -> torch.dtype | None:
    """What a cache of this name (`CACHE_DTYPES`) holds: None for the model's own dtype.

    Raises:
        ValueError: no cache of this name.
    """
    check_choice("cache_dtype", name, CACHE_DTYPES)
    return _CODES[name]


def quantise(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (..., C) -> codes (..., C) in float8_e4m3fn or int8, and scales (...) float32.

    The scale is the largest magnitude of the row by 448 or 127; codes are rounded to nearest.
    """
    return quantize_per_token(rows, dtype)


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., C) times scales (...), multiplied in float32 -> `dtype`."""
    return (codes.float() * scale[..., None]).to(dtype)


def error_bound(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The most (..., C) by which `dequantise` may differ from float32 rows with these scales.

    Beside half a step of the codes it allows for the division and the product in float32.
    """
    magnitude = rows.float().abs()
    if dtype == torch.int8:
        steps = _INT8 * scale[..., None]
    else:
        steps = (magnitude * _E4M3_RELATIVE).maximum(_E4M3_SMALLEST * scale[..., None])
    return steps + 4 * torch.finfo(torch.float32).eps * magnitude
