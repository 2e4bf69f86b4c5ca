"""Latent cache of which each context-parallel rank holds a part of the tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ic.model.cache import LatentCache, LatentLayer


class ShardedLatentLayer(LatentLayer):
    """One layer's latents of this rank.

    Tokens of a prefill lie spread over the ranks, evenly; tokens that every rank computed
    (decoding) are kept by one rank alone. The order of the tokens within a rank carries no meaning
    beyond the newest being last: keys are rotated before they are cached.

    Attributes:
        total: tokens on all ranks.
    """

    is_croppable = False

    def __init__(self, capacity_tokens: int, holds_replicated: bool) -> None:
        super().__init__(capacity_tokens)
        self.holds_replicated = holds_replicated
        self.total = 0
        self.has_replicated = False

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

    def crop(self, max_length: int) -> None:
        raise ValueError("a sharded cache cannot be cropped: start with a new one")

    def reset(self) -> None:
        super().reset()
        self.total = 0
        self.has_replicated = False


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
