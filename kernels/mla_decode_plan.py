"""What is decided once for each kind of input to decode: kernel, tiling, launches.

Legend as in `triton_mla_flash_decode`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton

from ic.kernels.launch import Launches
from ic.kernels.mla_decode_checks import check_decode_arguments
from ic.kernels.mla_decode_launch import (
    LOG2E,
    DecodeConfig,
    choose_decode_config,
    device_of,
    many_heads_applies,
    outer_stride,
    split_count,
)
from ic.kernels.triton_mla_combine import Combine
from ic.kernels.triton_mla_splits import TritonSplits


class Splits(Protocol):
    """The first pass for one kind of input: attention to one split of each sequence."""

    def __call__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        seq_lens_B: torch.Tensor,
        block_table: torch.Tensor | None,
        cache_scale: torch.Tensor | None,
        scale_log2: float,
        num_splits: int,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Fill `out` and `lse`; with more than one split partial ones, (B, num_splits, Q * H, R)
        and (B, num_splits, Q * H) float32, the latter in base 2.
        """


class DecodePlan:
    """How inputs of one kind are decoded; arguments are taken as checked."""

    def __init__(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor | None,
        cache_scale: torch.Tensor | None,
        config: DecodeConfig,
    ) -> None:
        B, Q, H, self.latent_dim = q_latent_BQHR.shape
        self.batch, self.rows, self.block_n = B, Q * H, config.block_n
        self.groups = max(B * triton.cdiv(Q * H, config.block_m), 1)
        self.slots = device_of(cache).num_sms * config.programs_per_sm
        self.is_early = config.pdl
        self.combines: dict[int, Combine] = {}
        self.splits: Splits
        paged = block_table is not None
        if config.pairs:
            from ic.kernels.gluon_mla_decode_pairs import PairsSplits

            self.splits = PairsSplits(q_latent_BQHR, q_rope_BQHP, cache, block_table, config)
        elif config.many_heads and many_heads_applies(q_latent_BQHR, q_rope_BQHP, cache, paged):
            from ic.kernels.gluon_mla_decode import ManyHeadsSplits

            self.splits = ManyHeadsSplits(q_latent_BQHR, q_rope_BQHP, cache, block_table)
            self.is_early = False
        elif config.many_heads_codes:
            from ic.kernels.gluon_mla_decode_codes import ManyHeadsCodesSplits

            self.splits = ManyHeadsCodesSplits(q_latent_BQHR, q_rope_BQHP, cache, block_table)
        elif config.e4m3_codes:
            from ic.kernels.gluon_mla_decode_e4m3 import E4M3Splits

            self.splits = E4M3Splits(q_latent_BQHR, q_rope_BQHP, cache, block_table, config)
        else:
            self.splits = TritonSplits(
                q_latent_BQHR, q_rope_BQHP, cache, block_table, cache_scale, config
            )

    def run(
        self,
        q_latent_BQHR: torch.Tensor,
        q_rope_BQHP: torch.Tensor,
        cache: torch.Tensor,
        seq_lens_B: torch.Tensor,
        block_table: torch.Tensor | None,
        cache_scale: torch.Tensor | None,
        softmax_scale: float,
        num_splits: int | None = None,
        max_context_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both passes -> out (B, Q, H, R), lse (B, Q, H) float32.

        The split count follows from context, batch and multiprocessors unless it is given.
        """
        out, lse = empty_outputs(q_latent_BQHR)
        if not out.numel():
            return out, lse
        if num_splits is None:
            context = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
            if max_context_tokens is not None:
                context = min(max_context_tokens, context)
            tiles = max(-(-context // self.block_n), 1)
            num_splits = split_count(self.groups, tiles, self.slots)
        partial, partial_lse = out, lse
        if num_splits > 1:
            shape = self.batch, num_splits, self.rows
            partial_lse = torch.empty(shape, dtype=torch.float32, device=out.device)
            partial = torch.empty((*shape, self.latent_dim), dtype=torch.float32, device=out.device)
        self.splits(
            q_latent_BQHR, q_rope_BQHP, cache, seq_lens_B, block_table, cache_scale,
            softmax_scale * LOG2E, num_splits, partial, partial_lse,
        )  # fmt: skip
        if num_splits > 1:
            combine = self.combines.get(num_splits)
            if combine is None:
                combine = self.combines[num_splits] = Combine(
                    num_splits, self.latent_dim, is_early=self.is_early
                )
            combine(partial, partial_lse, out, lse, self.batch, self.rows)
        return out, lse


def empty_outputs(q_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(q_latent.shape[:3], dtype=torch.float32, device=q_latent.device)
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format), lse


_plans = Launches()


def find_plan(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_scale: torch.Tensor | None,
) -> DecodePlan:
    """The plan for inputs of this kind, which are checked the first time.

    The number of cached tokens, which is another at each step, makes no new kind.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    tensors = q_latent, q_rope, cache, seq_lens, block_table, cache_scale
    if cache.dim() != 3:
        check_decode_arguments(*tensors)
    key: tuple[Any, ...] = (
        q_latent.shape, q_latent.stride(), q_latent.dtype, q_latent.get_device(),
        q_rope.shape, q_rope.stride(), q_rope.dtype, q_rope.get_device(),
        seq_lens.shape, seq_lens.stride(), seq_lens.dtype, seq_lens.get_device(),
        cache.shape[::2], outer_stride(cache), cache.stride()[1:], cache.dtype, cache.get_device(),
        # What the kernels that copy tiles by TMA ask.
        cache.is_contiguous() and not cache.data_ptr() % 16
        and 0 < cache.shape[0] * cache.shape[1] < 2**31,
    )  # fmt: skip
    if block_table is not None:
        key += (
            cache.shape[1], block_table.shape[:1], block_table.stride(), block_table.dtype,
            block_table.get_device(),
        )  # fmt: skip
    if cache_scale is not None:
        fits = cache_scale.shape == cache.shape[:2]
        key += (
            fits and outer_stride(cache_scale), cache_scale.stride()[1:], cache_scale.dtype,
            cache_scale.get_device(), fits,
        )  # fmt: skip
    plan: DecodePlan | None = _plans.get(key)
    if plan is None:
        check_decode_arguments(*tensors)
        config = choose_decode_config(q_latent, q_rope, cache, block_table is not None)
        plan = _plans[key] = DecodePlan(q_latent, q_rope, cache, block_table, cache_scale, config)
    return plan
