"""Products with a weight of four bits, and rows turned into codes of eight.

`int4_matmul`. out = x @ w.T of a few rows x (M, K) with

    w[n, k] = (code[n, k] - 8) * scale[n, k // group]

where eight codes lie in each int32 of `packed` (N, K / 8), the first in its lowest bits
(compressed-tensors' `pack-quantized`). A weight is rounded to the dtype of x before it is
multiplied; sums are fp32.

`quantize_rows`. Each row of x (M, K) by a scale of its own to e4m3 or int8, with scale = max |x| /
448 or / 127, as `ic.kernels.reference.quantize_per_token`. One launch, where PyTorch takes seven.

Memory traffic. `int4_matmul` reads the codes once, N * K / 2 bytes, and the scales; x comes from
cache. `quantize_rows` reads x twice, the second time from cache, and writes M * K bytes.

Limits. `int4_matmul` takes up to 16 rows, K a multiple of 8 and of the group, which is a multiple
of 8. Offsets are int64. No gradient: this is the serving path.
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ic.kernels.arguments import require
from ic.kernels.mla_decode_launch import device_of
from ic.kernels.triton_append_latent import _encode

MAX_ROWS = 16
_BLOCK_N, _WORDS = 16, 32
_BLOCK_K = 1024


@triton.jit
def _int4_kernel(
    x_ptr, packed_ptr, scale_ptr, out_ptr, stride_x, M, N, K,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows a program; code i of a word meets input 8 * word + i."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    n_ok, m_ok = n < N, m < M
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K // 8, WORDS):
        word = start + tl.arange(0, WORDS)
        word_ok = word < K // 8
        ok = n_ok[:, None] & word_ok[None, :]
        packed = tl.load(packed_ptr + n[:, None] * (K // 8) + word[None, :], mask=ok, other=0)
        scale_at = n[:, None] * (K // GROUP) + (word * 8 // GROUP)[None, :]
        scale = tl.load(scale_ptr + scale_at, mask=ok, other=0.0).to(tl.float32)
        for i in tl.static_range(8):
            code = ((packed >> (4 * i)) & 15) - 8
            weight = (code.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
            x = tl.load(
                x_ptr + m[:, None] * stride_x + (word * 8 + i)[None, :],
                mask=m_ok[:, None] & word_ok[None, :],
                other=0.0,
            )
            acc += tl.dot(x, tl.trans(weight), input_precision="ieee")
    out_at = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, stride_x, K,
    BLOCK_K: tl.constexpr, INT8: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    peak = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + cols
        x = tl.load(x_ptr + row * stride_x + at, mask=at < K, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(x))
    LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
    scale = tl.maximum(tl.max(peak, 0), 1e-12) / LARGEST
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, BLOCK_K):
        at = start + cols
        x = tl.load(x_ptr + row * stride_x + at, mask=at < K, other=0.0).to(tl.float32)
        code = _encode(tl.div_rn(x, scale), BITS, INT8)
        tl.store(codes_ptr + row * K + at, code, mask=at < K)


def int4_matmul(
    x_MK: torch.Tensor, packed: torch.Tensor, scale_NG: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Up to 16 rows times a weight of four bits -> (M, N) in the dtype of x.

    Args:
        x_MK: rows that are contiguous each.
        packed: int32 (N, K / 8), contiguous.
        scale_NG: (N, K / group_size), contiguous.

    Raises:
        ValueError: shapes that do not fit.
    """
    M, K = x_MK.shape
    N = packed.shape[0]
    require(M <= MAX_ROWS, f"x has {M} rows; at most {MAX_ROWS}")
    require(
        group_size % 8 == 0 and K % group_size == 0,
        f"group_size={group_size}: must be a multiple of 8 and divide the {K} inputs",
    )
    require(
        packed.dtype == torch.int32 and packed.shape == (N, K // 8) and packed.is_contiguous(),
        f"packed is {packed.dtype} {tuple(packed.shape)}; want a contiguous int32 (N, {K // 8})",
    )
    require(
        scale_NG.shape == (N, K // group_size) and scale_NG.is_contiguous(),
        f"scale is {tuple(scale_NG.shape)}; want a contiguous ({N}, {K // group_size})",
    )
    require(x_MK.stride(1) == 1, f"x has stride {x_MK.stride(1)} within a row; it must be 1")
    out = x_MK.new_empty(M, N)
    if M and N:
        _int4_kernel[(triton.cdiv(N, _BLOCK_N),)](
            x_MK, packed, scale_NG, out, x_MK.stride(0), M, N, K, GROUP=group_size, ROWS=MAX_ROWS,
            BLOCK_N=_BLOCK_N, WORDS=_WORDS, num_warps=4, num_stages=4,
        )  # fmt: skip
    return out


def quantize_rows(x_MK: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (M, K) -> codes (M, K) in float8_e4m3fn or int8, and scales (M,) float32."""
    M, K = x_MK.shape
    require(
        dtype in (torch.float8_e4m3fn, torch.int8),
        f"codes in {dtype}; allowed are float8_e4m3fn and int8",
    )
    require(x_MK.stride(1) == 1, f"x has stride {x_MK.stride(1)} within a row; it must be 1")
    codes = torch.empty(M, K, dtype=dtype, device=x_MK.device)
    scale = torch.empty(M, dtype=torch.float32, device=x_MK.device)
    int8, device = dtype == torch.int8, device_of(x_MK)
    bits = not int8 and (device.capability < 89 or device.interpreted)
    if M:
        _rows_kernel[(M,)](
            x_MK, codes.view(torch.uint8) if bits else codes, scale, x_MK.stride(0), K,
            BLOCK_K=_BLOCK_K, INT8=int8, BITS=bits, num_warps=4,
        )  # fmt: skip
    return codes, scale
