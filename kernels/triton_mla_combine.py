"""The second pass of split-KV decode: weigh the splits' partial results and add them.

Used by `triton_mla_flash_decode` and the Gluon kernels beside it, whose splits write fp32 partial
outputs and log-sum-exps in base 2. FlashDecoding's combine (Dao et al., 2023).
"""

# Triton gives kernel arguments their types at launch.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ic.kernels.launch import Launch
from ic.kernels.mla_decode_launch import combine_blocks

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, num_rows, num_splits,
    R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weigh the splits' partial results by their log-sum-exp (base 2) for one row and BLOCK_R
    columns."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) % num_rows
    batch = (tl.program_id(0) // num_rows).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.full([], -1e30, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_R], tl.float32)
    for first in tl.range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = (batch * num_splits + split) * num_rows + row
        lse = tl.load(partial_lse_ptr + at, mask=split < num_splits, other=float("-inf"))
        live = lse > float("-inf")
        part = tl.load(partial_ptr + (at * R)[:, None] + cols[None, :],
                       mask=live[:, None] & (cols < R)[None, :], other=0.0)  # fmt: skip
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - m_new)
        alpha = tl.exp2(m - m_new)
        mass = mass * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m = m_new
    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    at_row = batch * num_rows + row
    tl.store(out_ptr + at_row * R + cols, acc / mass, mask=cols < R)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + at_row, tl.where(empty, float("-inf"), (m + tl.log2(mass)) * LN2))


class Combine:
    """The pass for so many splits.

    Args:
        is_early: it starts before the splits end, and waits for them itself.
    """

    def __init__(self, num_splits: int, latent_dim: int, *, is_early: bool) -> None:
        block_s, block_r, num_warps = combine_blocks(num_splits, latent_dim)
        self.num_splits, self.column_blocks = num_splits, triton.cdiv(latent_dim, block_r)
        constants = {"R": latent_dim, "BLOCK_S": block_s, "BLOCK_R": block_r, "PDL": is_early}
        early = {"launch_pdl": True} if is_early else {}
        self.launch = Launch(_combine_kernel, constants, num_warps=num_warps, **early)

    def __call__(
        self,
        partial: torch.Tensor,
        partial_lse: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        batch: int,
        rows: int,
    ) -> None:
        """Combine `partial` (B, num_splits, rows, R) and its lse (base 2) into `out` and `lse`."""
        self.launch(
            (batch * rows, self.column_blocks, 1),
            (partial, partial_lse, out, lse),
            (rows, self.num_splits),
        )
