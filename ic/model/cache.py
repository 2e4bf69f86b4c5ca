"""Cache of MLA latents: kv_lora_rank + qk_rope_head_dim numbers a token and layer, nothing else.

Legend: B batch, S cached tokens, T new tokens, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Small enough not to matter for one layer of the 1B shape (8 MiB), large enough that a decode loop
# rarely copies.
GROWTH_TOKENS = 1024
# The append kernel addresses pages of a multiple of 16 tokens.
PAGE_TOKENS = 16


class LatentLayer(CacheLayerMixin):
    """One layer's latents in a single buffer (B, capacity, R + P).

    Normalised latent and rotated shared key lie side by side, so that a decode kernel reads one
    tile as key and value. `keys` and `values` are views (B, 1, S, R) and (B, 1, S, P), the form in
    which `transformers` keeps MLA.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity_tokens: int = 0, **kwargs: Any) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self.buffer: Tensor | None = None
        self.rank = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rank = key_states.shape[-1]
        width = self.rank + value_states.shape[-1]
        self.buffer = key_states.new_empty(key_states.shape[0], self.capacity_tokens, width)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents (B, 1, T, R) and rotated keys (B, 1, T, P); return all of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self._reserve(end)
        assert self.buffer is not None
        self.buffer[:, self.length : end, : self.rank] = key_states[:, 0]
        self.buffer[:, self.length : end, self.rank :] = value_states[:, 0]
        self._set_length(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def extend(self, num_tokens: int) -> Tensor:
        """Count more tokens, at most PAGE_TOKENS, and return the last page (B, PAGE_TOKENS, R + P)
        of the cache, whose end the caller must write. Only where `has_last_page`.
        """
        end = self.length + num_tokens
        self._reserve(end)
        self._set_length(end)
        assert self.buffer is not None
        return self.buffer[:, end - PAGE_TOKENS : end]

    def has_last_page(self, num_tokens: int) -> bool:
        """Whether the cache is allocated and holds a page once so many tokens are added."""
        return self.is_initialized and self.length + num_tokens >= PAGE_TOKENS

    def latents(self) -> Tensor:
        """All cached latents (B, S, R + P), a view."""
        assert self.buffer is not None
        return self.buffer[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return 0 if self.buffer is None else self.buffer.nbytes

    def _reserve(self, tokens: int) -> None:
        assert self.buffer is not None
        if tokens <= self.buffer.shape[1]:
            return
        # An eighth of slack keeps the copies a decode loop makes linear in its length.
        capacity = tokens if not self.length else max(tokens, self.length * 9 // 8 + GROWTH_TOKENS)
        grown = self.buffer.new_empty(self.buffer.shape[0], capacity, self.buffer.shape[2])
        grown[:, : self.length] = self.buffer[:, : self.length]
        self.buffer = grown

    def _set_length(self, length: int) -> None:
        self.length = length
        if self.buffer is None:
            return
        held = self.buffer[:, None, :length]
        self.keys, self.values = held[..., : self.rank], held[..., self.rank :]

    def _map_batch(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._set_length(self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def croppable_length(self, at_most: int) -> int:
        """The most tokens, up to `at_most`, to which the layer can be cropped."""
        return min(at_most, self.length)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative number drops that many."""
        if max_length < 0:
            max_length = self.length + max_length
        if max_length < self.length:
            self._set_length(max_length)

    def reset(self) -> None:
        self._set_length(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.buffer is not None:
            self._map_batch(self.buffer.index_select(0, beam_idx.to(self.buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffer is not None:
            self._map_batch(self.buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.buffer is not None:
            self._map_batch(self.buffer[indices])

    def offload(self) -> None:
        raise ValueError("LatentCache: offloading is not supported; the cache is already small")


class LatentCache(Cache):
    """Latents of all layers; pass as `past_key_values`, or let `generate` make one.

    Args:
        num_layers: layers of the model.
        capacity_tokens: tokens to allocate at first use; the cache grows past it when it must.
    """

    def __init__(self, num_layers: int, capacity_tokens: int = 0) -> None:
        super().__init__(layers=[LatentLayer(capacity_tokens) for _ in range(num_layers)])

    def croppable_length(self, at_most: int) -> int:
        """The most tokens, up to `at_most`, to which the cache can be cropped."""
        first: Any = self.layers[0]
        return int(first.croppable_length(at_most))

    @property
    def nbytes(self) -> int:
        """Bytes allocated over all layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))


def cached_latents(cache: Cache, layer_idx: int) -> Tensor:
    """Latents (B, S, R + P) of a layer from our cache, or from a `DynamicCache` that a caller
    passed.
    """
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, LatentLayer):
        return layer.latents()
    return torch.cat((layer.keys[:, 0], layer.values[:, 0]), dim=-1)
