"""Caches that prompts are read into piece by piece, of our models and those of `transformers`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ic.model import LatentCache, MLAForCausalLM
from ic.model.cache import concatenate_rows

# Where a prompt goes through in pieces, attention has a mask of piece x tokens; at most this many.
MASK_ELEMENTS = 2**30
# Rotations of a token that depend on its position alone, and not on how long the longest row is.
_FIXED_ROTATIONS = ("default", "linear", "yarn", "llama3")


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


def takes_unequal_rows(model: Any) -> bool:
    """Whether prompts of unequal length can be continued together, each as it would be alone.

    Models of `transformers` then have places in their cache that a mask hides, which is the same
    only where rotations tell positions and no layer counts places of the cache.
    """
    if isinstance(model, MLAForCausalLM):
        can = model.model.operators.attention.capabilities
        return model.model.context_parallel is None and (can.row_lengths or can.mask)
    rotation = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return (
        rotation.get("rope_type") in _FIXED_ROTATIONS
        and "position_ids" in inspect.signature(model.forward).parameters
        and all(type(x) is DynamicLayer for x in TransformersCache(config=model.config).layers)
    )


def cut_rows(cache: LatentCache, lengths: Sequence[int], tokens: int) -> LatentCache:
    """A cache of padded prompts without the padding at their ends, with room for `tokens`."""
    cache.keep_rows(lengths)
    return concatenate_rows([cache], tokens)


def piece_tokens(model: Any, chunk_tokens: int, tokens: int) -> int:
    """Longest piece of a prompt of `tokens` to process at once, where `chunk_tokens` is allowed."""
    if isinstance(model, MLAForCausalLM) or tokens <= chunk_tokens:
        return chunk_tokens  # a whole prompt needs no mask
    return min(chunk_tokens, max(1, MASK_ELEMENTS // tokens))
