"""Latent cache of which each context-parallel rank holds a part of the tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ic.model.cache import LatentCache, LatentLayer


class ShardedLatentLayer(LatentLayer):
    """One layer's latents of this rank.

    Tokens of a prefill lie spread over the ranks, evenly; tokens that every rank computed
    (decoding) are kept by one rank alone. The order of the tokens within a rank carries no meaning
    beyond the newest being last: keys are rotated before they are cached. It can be cropped to
    where a piece of the prefill ended: elsewhere the ranks would be left with unequal parts.

    Attributes:
        total: tokens on all ranks.
    """

    is_croppable = False

    def __init__(self, capacity_tokens: int, holds_replicated: bool) -> None:
        super().__init__(capacity_tokens)
        self.holds_replicated = holds_replicated
        self.total = 0
        self.has_replicated = False
        self._own_lengths: dict[int, int] = {0: 0}  # by total, after each piece of the prefill

    def append_split(self, own_B1TR: Tensor, own_B1TP: Tensor, num_tokens: int) -> None:
        """This rank's part of `num_tokens` new tokens.

        Raises:
            ValueError: after decoding, when the ranks hold different numbers of tokens.
        """
        if self.has_replicated:
            raise ValueError(
                f"a prefill of {num_tokens} tokens after decoding: the ranks of a context-parallel "
                "cache then hold unequal parts; start with a new cache that begins with the whole "
                "prompt"
            )
        super().update(own_B1TR, own_B1TP)
        self.total += num_tokens
        self._own_lengths[self.total] = self.length

    def append_replicated(self, latent_B1TR: Tensor, k_rope_B1TP: Tensor) -> None:
        """Tokens that every rank has."""
        tokens = latent_B1TR.shape[2]
        if not self.holds_replicated:
            latent_B1TR, k_rope_B1TP = latent_B1TR[:, :, :0], k_rope_B1TP[:, :, :0]
        super().update(latent_B1TR, k_rope_B1TP)
        self.total += tokens
        self.has_replicated = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise ValueError("a sharded cache takes append_split or append_replicated, not update")

    def get_seq_length(self) -> int:
        return self.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.total + query_length, 0

    def croppable_length(self, at_most: int) -> int:
        """See `LatentLayer`."""
        return max(total for total in self._own_lengths if total <= at_most)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of all ranks; 0 drops none.

        Raises:
            ValueError: a positive number, or no piece of the prefill ended there.
        """
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.keep(max(self.total + tokens_to_remove, 0))

    def keep(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of all ranks.

        Raises:
            ValueError: no piece of the prefill ended there.
        """
        if num_tokens not in self._own_lengths:
            raise ValueError(
                f"a context-parallel cache cannot be cropped to {num_tokens} tokens, only to where "
                f"a piece of its prefill ended: {', '.join(map(str, self._own_lengths))}"
            )
        kept = {total: own for total, own in self._own_lengths.items() if total <= num_tokens}
        self._set_length(kept[num_tokens])
        self._own_lengths, self.total, self.has_replicated = kept, num_tokens, False

    def reset(self) -> None:
        super().reset()
        self._own_lengths, self.total, self.has_replicated = {0: 0}, 0, False


class ShardedLatentCache(LatentCache):
    """`LatentCache` of which this rank holds its part.

    Args:
        capacity_tokens: tokens of this rank to allocate at first use.
        holds_replicated: whether this rank keeps the tokens that every rank computed.
    """

    layers: list[ShardedLatentLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, capacity_tokens: int, *, holds_replicated: bool) -> None:
        super().__init__(num_layers)
        self.layers = [
            ShardedLatentLayer(capacity_tokens, holds_replicated) for _ in range(num_layers)
        ]
