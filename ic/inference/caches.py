"""Caches that prompts are read into piece by piece, of our models and those of `transformers`."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ic.model import LatentCache, MLAForCausalLM

# Where a prompt goes through in pieces, attention has a mask of piece x tokens; at most this many.
MASK_ELEMENTS = 2**30


class TransformersCache(DynamicCache):
    """A cache that grows as a prompt is read, and goes over to the next prompt as ours does."""

    def keep(self, tokens: int) -> None:
        """Leave out whatever comes after this many tokens."""
        if (beyond := self.get_seq_length() - tokens) > 0:
            self.crop(-beyond)

    def croppable_length(self, tokens: int) -> int:
        """How many of this many tokens can be kept: none where a layer has forgotten some."""
        return tokens if all(type(layer) is DynamicLayer for layer in self.layers) else 0


def new_cache(model: Any, tokens: int) -> LatentCache | TransformersCache:
    """An empty cache of a model, with room for `tokens` where room is made in advance."""
    if isinstance(model, MLAForCausalLM):
        return model.model.new_cache(tokens)
    return TransformersCache(config=model.config)


def piece_tokens(model: Any, chunk_tokens: int, tokens: int) -> int:
    """Longest piece of a prompt of `tokens` to process at once, where `chunk_tokens` is allowed."""
    if isinstance(model, MLAForCausalLM) or tokens <= chunk_tokens:
        return chunk_tokens  # a whole prompt needs no mask
    return min(chunk_tokens, max(1, MASK_ELEMENTS // tokens))
