"""The dimensions of the result: how wide its rotary key is, and the rank of its latent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ic.conversion.families import FAMILIES, Geometry
from ic.conversion.options import ConvertOptions
from ic.errors import UsageError
from ic.model import MLAConfig

# A rank that a budget leads to is a multiple of it, where it is that large: kernels like it.
_RANK_STEP = 16
# Of a budget, the most that a rotary key takes whose width is not asked for: one head's, or a power
# of two.
_ROPE_SHARE = 1 / 2


@dataclass(frozen=True)
class Layout:
    """How keys and values of a `Geometry` lie in the cache of the result.

    Attributes:
        geometry: of the original.
        rope_dim: dimensions of the shared rotary key.
        rank: of the latent.
        kept: where `is_narrow`, the frequency of the original that each rotary pair turns with, 0
            to d / 2 - 1 (`ic.conversion.folding`); None until they are chosen.
    """

    geometry: Geometry
    rope_dim: int
    rank: int
    kept: tuple[int, ...] | None = None

    @property
    def is_narrow(self) -> bool:
        """The rotary key has fewer dimensions than a head, and keeps some of its frequencies."""
        return self.rope_dim < self.geometry.head_dim

    @property
    def components(self) -> int:
        """Rotary components per frequency, where it is not narrow."""
        return self.rope_dim // self.geometry.head_dim

    @property
    def keeps_keys(self) -> bool:
        """The rotary key is the keys of all KV heads side by side, and the latent holds values
        alone: nothing of the keys is lost.
        """
        return self.rope_dim == self.geometry.keys_dim

    @property
    def is_exact(self) -> bool:
        return self.keeps_keys and self.rank == self.geometry.keys_dim

    @property
    def nope_dim(self) -> int:
        """Dimensions per head of the keys that are not rotated."""
        return 0 if self.keeps_keys else self.geometry.head_dim

    @property
    def cache_numbers(self) -> int:
        """Numbers that the cache of the result holds per token and layer."""
        return self.rank + self.rope_dim

    @property
    def query_scale(self) -> float:
        """Factor on the queries, because MLA divides by the root of another dimension."""
        return ((self.nope_dim + self.rope_dim) / self.geometry.head_dim) ** 0.5

    def mla_config(self, theirs: Any) -> MLAConfig:
        """The configuration of the result; `theirs` is the original's. Of a narrow rotary key whose
        frequencies are not chosen yet it has the sizes alone.
        """
        geometry = self.geometry
        return MLAConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=geometry.hidden_size,
            intermediate_size=theirs.intermediate_size,
            num_hidden_layers=geometry.layers,
            num_attention_heads=geometry.heads,
            q_lora_rank=None,
            kv_lora_rank=self.rank,
            qk_nope_head_dim=self.nope_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=geometry.head_dim,
            max_position_embeddings=theirs.max_position_embeddings,
            rms_norm_eps=theirs.rms_norm_eps,
            pad_token_id=theirs.pad_token_id,
            bos_token_id=theirs.bos_token_id,
            eos_token_id=theirs.eos_token_id,
            tie_word_embeddings=theirs.tie_word_embeddings,
            rope_parameters=geometry.rope_parameters,
            rope_interleave=True,
            attention_bias=geometry.key_value_bias,
            latent_norm=not self.keeps_keys,
            rope_repeats=1 if self.is_narrow else self.components,
            rope_pairs=None if self.kept is None else list(self.kept),
            rope_pairs_dim=None if self.kept is None else geometry.head_dim,
            query_bias=geometry.query_bias,
            qk_norm_dim=geometry.head_dim if geometry.qk_norm else None,
        )


def choose_layout(geometry: Geometry, options: ConvertOptions) -> Layout:
    """The layout that the options ask for.

    Raises:
        UsageError: a rotary dimension that does not fit, a rank beyond the full one, or a budget
            that is too small for the rotary key.
    """
    budget = None
    if options.cache is not None:
        budget = int(options.cache * geometry.cache_numbers + 1e-9)
    rope_dim = _rope_dim(geometry, options, budget)
    # Values of all heads, and what the rotary key leaves of their keys.
    full = geometry.cache_numbers - rope_dim
    if budget is None:
        rank = full if options.rank is None else options.rank
        if rank < 2 and rope_dim < geometry.keys_dim:
            raise UsageError(f"rank={rank}: must be at least 2; one component steadies the norm")
        if rank > full:
            raise UsageError(
                f"rank={rank}: the full rank beside a rotary key of {rope_dim} is {full}, "
                "and a larger one holds nothing more"
            )
        return Layout(geometry, rope_dim, rank)
    rank = budget - rope_dim
    if rank < 2:
        least = (rope_dim + 2) / geometry.cache_numbers
        raise UsageError(
            f"cache={options.cache}: the original's cache holds {geometry.cache_numbers} numbers "
            f"per token and layer, and the rotary key alone takes {rope_dim} of them"
            + (" (with QK norms the keys stay whole)" if geometry.qk_norm else "")
            + f"; give at least {math.ceil(least * 100) / 100}"
            + ("" if options.rope_dim is None else ", or a smaller rope_dim")
        )
    step = _RANK_STEP if rank > _RANK_STEP else 1
    return Layout(geometry, rope_dim, min(rank - rank % step, full))


def _rope_dim(geometry: Geometry, options: ConvertOptions, budget: int | None) -> int:
    """Of the rotary key: what is asked, or one head's, or less where a budget has no room."""
    dim, whole = geometry.head_dim, geometry.keys_dim
    if options.rope_dim is None:
        is_exact = options.rank is None and budget is None
        if is_exact or geometry.qk_norm or (dim == whole and budget is None):
            return whole
        if budget is None or dim <= budget * _ROPE_SHARE:
            return dim
        return max(2, 1 << (int(budget * _ROPE_SHARE).bit_length() - 1))
    if geometry.qk_norm and options.rope_dim != whole:
        raise UsageError(
            f"rope_dim={options.rope_dim}: {FAMILIES[geometry.family]} normalises each head's "
            "query and key before it rotates them, so its keys stay whole: leave rope_dim out "
            f"(it is {whole}), and the rank compresses the values"
        )
    if options.rope_dim < dim and options.rope_dim % 2:
        raise UsageError(f"rope_dim={options.rope_dim}: must be even, pairs are rotated")
    if options.rope_dim > whole or (options.rope_dim > dim and options.rope_dim % dim):
        allowed = ", ".join(str(m * dim) for m in range(1, geometry.kv_heads + 1)[:8])
        raise UsageError(
            f"rope_dim={options.rope_dim}: must be even and below the head dimension {dim}, or a "
            f"multiple of it and at most {whole}, the keys of all {geometry.kv_heads} KV heads: "
            f"{allowed}" + (", ..." if geometry.kv_heads > 8 else "")
        )
    return options.rope_dim
