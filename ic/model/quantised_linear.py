"""Linear layers whose weights are codes of eight or four bits, in compressed-tensors' layouts.

    fp8    weight (N, K) float8_e4m3fn, weight_scale (N, 1); inputs become e4m3 as they come
    int8   weight (N, K) int8, weight_scale (N, 1); inputs become int8 as they come
    int4   weight_packed (N, K / 8) int32, weight_scale (N, K / group); inputs stay as they are

An input row is quantised as a row of a quantised cache is (`ic.model.quantised_latents`). On a GPU
the product is one of codes: `torch._scaled_mm` (e4m3, from sm_89 on), `torch._int_mm` (int8), and
for a few rows `int4_matmul`, which reads four bits per weight. Elsewhere the codes are widened,
which computes the same.

Legend: M rows of the input, K inputs, N outputs, G groups of inputs with a scale each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ic.kernels.reference import quantize_per_token
from ic.model.fp8 import FIRST_FP8, MULTIPLE

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# `torch._int_mm` on a GPU takes no fewer rows.
_INT8_ROWS = 32
# More rows of the input are multiplied by a widened weight, which then costs little beside them.
INT4_ROWS = 16


@dataclass(frozen=True)
class WeightScheme:
    """How the weight of a layer is kept.

    Attributes:
        name: `fp8`, `int8` or `int4`.
        group_size: inputs that share a scale in `int4`; None with the others, whose outputs have
            one each.
    """

    name: str
    group_size: int | None = None


class QuantisedLinear(nn.Module, ABC):
    """`x @ weight.T + bias` with a quantised weight, for inference.

    Moving it to another dtype changes the bias alone: what the codes stand for stays.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    @abstractmethod
    def product(self, x_MK: Tensor) -> Tensor:
        """x @ weight.T in the dtype of x, (M, N)."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The weight (N, K) that the codes stand for, float32."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            if isinstance(tensor, nn.Parameter):
                return fn(tensor)
            return fn(tensor.view(_BITS[tensor.element_size()])).view(tensor.dtype)

        return super()._apply(keep_dtype, recurse)


class _EightBitLinear(QuantisedLinear):
    """A scale for each output, and one for each row of the input."""

    codes: torch.dtype
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        weight = torch.empty(out_features, in_features, dtype=self.codes)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.empty(out_features, 1, dtype=torch.float32))

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.weight_scale

    def product(self, x_MK: Tensor) -> Tensor:
        quantise = _kernels().quantize_rows if x_MK.is_cuda else quantize_per_token
        codes_MK, scale_M = quantise(x_MK, self.codes)
        return self._product(codes_MK, scale_M[:, None], x_MK.dtype)

    @abstractmethod
    def _product(self, codes_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor: ...


class Fp8Linear(_EightBitLinear):
    codes = torch.float8_e4m3fn

    def _product(self, codes_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
        scale_1N = self.weight_scale.T
        if _runs_fp8(codes_MK.device, self.in_features, self.out_features):
            out_MN = torch._scaled_mm(
                codes_MK,
                self.weight.T,
                scale_a=scale_M1,
                scale_b=scale_1N.contiguous(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            return out_MN.to(dtype)
        # float16 ends at 65,504, and a sum of products of codes does not.
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        out_MN = codes_MK.to(wide) @ self.weight.to(wide).T
        return (out_MN.float() * scale_M1 * scale_1N).to(dtype)


class Int8Linear(_EightBitLinear):
    codes = torch.int8

    def _product(self, codes_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
        rows = len(codes_MK)
        if codes_MK.is_cuda:
            if self.in_features % 8 or self.out_features % 8:
                sums_MN = codes_MK.float() @ self.weight.float().T
                return (sums_MN * scale_M1 * self.weight_scale.T).to(dtype)
            if rows < _INT8_ROWS:
                codes_MK = F.pad(codes_MK, (0, 0, 0, _INT8_ROWS - rows))
        sums_MN = torch._int_mm(codes_MK, self.weight.T)[:rows]
        return (sums_MN.float() * scale_M1 * self.weight_scale.T).to(dtype)


class Int4Linear(QuantisedLinear):
    """A scale for each output and group of inputs."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int) -> None:
        super().__init__(in_features, out_features, bias)
        self.group_size = group_size
        packed = torch.empty(out_features, in_features // 8, dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        # In the dtype of the weight that it was made from, once it is loaded.
        scale = torch.empty(out_features, in_features // group_size, dtype=torch.bfloat16)
        self.register_buffer("weight_scale", scale)
        shape = torch.tensor([out_features, in_features], device="cpu")
        self.register_buffer("weight_shape", shape)

    def dequantised(self) -> Tensor:
        codes_NGK = unpack_int4(self.weight_packed).unflatten(1, (-1, self.group_size))
        return (codes_NGK * self.weight_scale.float()[..., None]).flatten(1)

    def product(self, x_MK: Tensor) -> Tensor:
        if x_MK.is_cuda and len(x_MK) <= INT4_ROWS:
            codes, scale = self.weight_packed, self.weight_scale
            return _kernels().int4_matmul(x_MK, codes, scale, self.group_size)
        return F.linear(x_MK, self.dequantised().to(x_MK.dtype))


def unpack_int4(packed: Tensor) -> Tensor:
    """Eight codes of each int32, the first in its lowest bits and 8 added: (..., K / 8) -> (..., K)
    int8.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts & 15) - 8).to(torch.int8).flatten(-2)


def _kernels() -> Any:
    """Our kernels, which a machine without a GPU need not have Triton for."""
    from ic.kernels import triton_quantised_linear

    return triton_quantised_linear


def _runs_fp8(device: torch.device, inputs: int, outputs: int) -> bool:
    return (
        device.type == "cuda"
        and inputs % MULTIPLE == 0
        and outputs % MULTIPLE == 0
        and torch.cuda.get_device_capability(device) >= FIRST_FP8
    )


def quantised_linear(
    in_features: int, out_features: int, bias: bool, scheme: WeightScheme
) -> QuantisedLinear:
    """A layer of a scheme, with weights that are to be loaded."""
    if scheme.name == "int4":
        assert scheme.group_size is not None
        return Int4Linear(in_features, out_features, bias, scheme.group_size)
    kind = {"fp8": Fp8Linear, "int8": Int8Linear}[scheme.name]
    return kind(in_features, out_features, bias)


def replace_linear_layers(
    model: nn.Module, scheme_of: Callable[[str], WeightScheme | None]
) -> None:
    """Put a quantised layer in the place of each linear layer that has a scheme.

    Args:
        scheme_of: a layer's name -> its scheme, or None where it stays.
    """
    for name, layer in list(model.named_modules()):
        scheme = scheme_of(name) if isinstance(layer, nn.Linear) else None
        if scheme is not None:
            assert isinstance(layer, nn.Linear)
            new = quantised_linear(
                layer.in_features, layer.out_features, layer.bias is not None, scheme
            )
            model.set_submodule(name, new)
