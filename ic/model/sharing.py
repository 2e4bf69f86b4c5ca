"""What the model asks of ranks that share each sequence; `ic.parallel` provides it.

Legend: B batch, T tokens of a rank, S tokens of the sequence, H heads, R kv_lora_rank,
P qk_rope_head_dim, C = R + P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ic.model.cache import LatentCache


@dataclass(frozen=True)
class Chunk:
    """A contiguous part of the sequence that a rank holds.

    Attributes:
        start, end: where it lies in the sequence.
        own: where it lies among the rank's tokens.
    """

    start: int
    end: int
    own: slice


class SequenceSharing(Protocol):
    """This rank's part of every sequence, and the exchange with the ranks that hold the others.

    Every method but `chunks`, `split` and `new_cache` is collective; `gather` and `sum` are
    differentiable, and add the gradients of all ranks.
    """

    size: int

    def chunks(self, tokens: int) -> Sequence[Chunk]:
        """The parts of a sequence of `tokens` that this rank holds, in order.

        Raises:
            ValueError: the length does not divide.
        """
        ...

    def split(self, whole_BS: Tensor) -> Tensor:
        """(B, S, ...) -> this rank's (B, T, ...)."""
        ...

    def gather(self, own_BT: Tensor) -> Tensor:
        """The parts (B, T, ...) of all ranks -> (B, S, ...) in the sequence's order."""
        ...

    def gather_unordered(self, own_BT: Tensor) -> Tensor:
        """As `gather`, in any order."""
        ...

    def gather_last(self, own_BT: Tensor, count: int) -> Tensor:
        """The last `count` of all tokens (all of them if 0), on every rank."""
        ...

    def sum(self, own: Tensor) -> Tensor:
        """Each rank's tensor added up, the same to the last bit on every rank."""
        ...

    def merge(self, out_BTHR: Tensor, lse_BTH: Tensor) -> Tensor:
        """Attention over all keys from each rank's attention over its own, and its log-sum-exp."""
        ...

    def new_cache(self, num_layers: int, capacity_tokens: int) -> LatentCache:
        """A cache of `SharedLayer`s."""
        ...


class SharedLayer(Protocol):
    """One layer's latents of this rank.

    Attributes:
        total: tokens on all ranks.
        holds_replicated: whether this rank keeps the tokens that every rank computed.
    """

    total: int
    holds_replicated: bool

    def append_split(self, own_B1TR: Tensor, own_B1TP: Tensor, num_tokens: int) -> None:
        """This rank's part of `num_tokens` new tokens."""
        ...

    def append_replicated(self, latent_B1TR: Tensor, k_rope_B1TP: Tensor) -> None:
        """Tokens that every rank has."""
        ...

    def latents(self) -> Tensor:
        """This rank's (B, T, C)."""
        ...
