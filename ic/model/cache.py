"""Cache of MLA latents: kv_lora_rank + qk_rope_head_dim numbers a token and layer, nothing else.

Legend: B batch, S cached tokens, T new tokens, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ic.model.quantised_latents import dequantise, quantise

# Small enough not to matter for one layer of the 1B shape (8 MiB), large enough that a decode loop
# rarely copies.
GROWTH_TOKENS = 1024
# The append kernel addresses pages of a multiple of 16 tokens.
PAGE_TOKENS = 16
_NEEDS_CONTEXT = (
    "LatentCache: these rows have unequal lengths; give the model an AttentionContext that "
    "`MLAModel.make_context` made for this cache"
)


class LatentLayer(CacheLayerMixin):
    """One layer's latents in a single buffer (B, capacity, R + P).

    Normalised latent and rotated shared key lie side by side, so that a decode kernel reads one
    tile as key and value. `keys` and `values` are views (B, 1, S, R) and (B, 1, S, P), the form in
    which `transformers` keeps MLA.

    Rows of unequal length (`concatenate_rows`) lie at the front each; behind a row's end there are
    numbers without a meaning, but no NaN, so that a mask hides them.

    A quantised layer holds codes (B, capacity, R + P) and beside them a scale per token
    (`ic.model.quantised_latents`). It has no `keys` and `values`; `update` returns copies.

    Args:
        capacity_tokens: tokens to allocate at first use.
        codes: float8_e4m3fn or int8 for a quantised layer; None keeps the model's dtype.

    Attributes:
        length: tokens of the longest row.
        lengths: tokens of each row, or None if all have `length`.
        scale: (B, capacity) float32 of a quantised layer, or None.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # it gives keys and values one width, and MLA's have two

    def __init__(self, capacity_tokens: int = 0, codes: torch.dtype | None = None) -> None:
        super().__init__()
        self.capacity_tokens = capacity_tokens
        self.codes = codes
        self.length = 0
        self.lengths: list[int] | None = None
        self.buffer: Tensor | None = None
        self.scale: Tensor | None = None
        self.rank = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rank = key_states.shape[-1]
        shape = (key_states.shape[0], self.capacity_tokens)
        width = self.rank + value_states.shape[-1]
        self.buffer = key_states.new_empty(*shape, width, dtype=self.codes or self.dtype)
        if self.codes is not None:
            self.scale = key_states.new_empty(shape, dtype=torch.float32)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents (B, 1, T, R) and rotated keys (B, 1, T, P); return all of both.

        Raises:
            ValueError: rows of unequal length, which `append_rows` extends.
        """
        self.append(key_states[:, 0], value_states[:, 0])
        scale_BS = self.scales()
        if scale_BS is not None:
            held = dequantise(self.latents(), scale_BS, self.dtype)[:, None]
            return held[..., : self.rank], held[..., self.rank :]
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def append(self, latent_BTR: Tensor, k_rope_BTP: Tensor) -> None:
        """As `update`, without returning what is held.

        Raises:
            ValueError: rows of unequal length, which `append_rows` extends.
        """
        if self.lengths is not None:
            raise ValueError(_NEEDS_CONTEXT)
        if not self.is_initialized:
            self.lazy_initialization(latent_BTR[:, None], k_rope_BTP[:, None])
        begin, end = self.length, self.length + latent_BTR.shape[1]
        self.reserve(end)
        assert self.buffer is not None
        if self.scale is None:
            self.buffer[:, begin:end, : self.rank] = latent_BTR
            self.buffer[:, begin:end, self.rank :] = k_rope_BTP
        else:
            rows_BTC = torch.cat((latent_BTR, k_rope_BTP), dim=-1)
            codes_BTC, self.scale[:, begin:end] = quantise(rows_BTC, self.buffer.dtype)
            self.buffer[:, begin:end] = codes_BTC
        self._set_length(end)

    def append_rows(self, latent_BTR: Tensor, k_rope_BTP: Tensor, slots_M: Tensor | None) -> None:
        """Append to rows of unequal length.

        Args:
            slots_M: int64 (B * T,), places in the pages that `extend` returns.

        Raises:
            ValueError: no slots, because the context was made for rows of equal length.
        """
        if slots_M is None:
            raise ValueError(_NEEDS_CONTEXT)
        new_MC = torch.cat((latent_BTR, k_rope_BTP), dim=-1).flatten(0, 1)
        pages, scale = self.extend(latent_BTR.shape[1])
        if scale is None:
            pages.flatten(0, 1).index_copy_(0, slots_M, new_MC.to(pages.dtype))
            return
        codes_MC, scale_M = quantise(new_MC, pages.dtype)
        _as_bytes(pages).flatten(0, 1).index_copy_(0, slots_M, _as_bytes(codes_MC))
        scale.flatten().index_copy_(0, slots_M, scale_M)

    def extend(self, num_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Count more tokens, and return pages of which the caller must write these tokens' places,
        and the scales of their tokens if the layer is quantised.

        A page is the end of a row, (B, PAGE_TOKENS, R + P) for at most that many tokens; with rows
        of unequal length the whole buffer of a row, (B, capacity, R + P). Only where `has_pages`.
        """
        end = self.length + num_tokens
        self.reserve(end)
        assert self.buffer is not None
        if self.lengths is not None:
            self._set_lengths([length + num_tokens for length in self.lengths])
            return self.buffer, self.scale
        self._set_length(end)
        page = slice(end - PAGE_TOKENS, end)
        return self.buffer[:, page], None if self.scale is None else self.scale[:, page]

    def has_pages(self, num_tokens: int) -> bool:
        """Whether the cache is allocated and holds a page once so many tokens are added."""
        is_long_enough = self.lengths is not None or self.length + num_tokens >= PAGE_TOKENS
        return self.is_initialized and is_long_enough

    def latents(self) -> Tensor:
        """All cached latents (B, S, R + P), a view; codes if the layer is quantised."""
        assert self.buffer is not None
        return self.buffer[:, : self.length]

    def scales(self) -> Tensor | None:
        """The scales (B, S) of the codes in `latents`, a view; None if the layer has none."""
        return None if self.scale is None else self.scale[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return sum(plane.nbytes for plane in (self.buffer, self.scale) if plane is not None)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens; the layer must have been given some."""
        assert self.buffer is not None
        if tokens <= self.buffer.shape[1]:
            return
        # An eighth of slack keeps the copies a decode loop makes linear in its length.
        capacity = tokens if not self.length else max(tokens, self.length * 9 // 8 + GROWTH_TOKENS)
        self._join([self], capacity, zeros=self.lengths is not None)

    def _set_length(self, length: int) -> None:
        self.length = length
        if self.buffer is None or self.scale is not None:
            return
        held = self.buffer[:, None, :length]
        self.keys, self.values = held[..., : self.rank], held[..., self.rank :]

    def _set_lengths(self, lengths: list[int]) -> None:
        longest = max(lengths, default=0)
        self.lengths = lengths if min(lengths, default=0) < longest else None
        self._set_length(longest)

    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        if self.lengths is not None:
            return self.lengths
        return [self.length] * (0 if self.buffer is None else len(self.buffer))

    def _map_batch(self, row_N: Tensor) -> None:
        """Row `row_N[i]` becomes row i."""
        assert self.buffer is not None
        self.buffer = _as_bytes(self.buffer).index_select(0, row_N).view(self.buffer.dtype)
        if self.scale is not None:
            self.scale = self.scale.index_select(0, row_N)
        if self.lengths is None:
            self._set_length(self.length)
        else:
            self._set_lengths([self.lengths[row] for row in row_N.tolist()])

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

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of each row, as `transformers` counts: 0 drops
        none, and a row with fewer tokens loses all.

        Raises:
            ValueError: a positive number, which once was the length to keep: see `keep`.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the tokens to drop as a negative number, or call "
                f"keep({tokens_to_remove}) to keep that many"
            )
        if tokens_to_remove:
            self._set_lengths([max(n + tokens_to_remove, 0) for n in self.row_lengths()])

    def keep(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of each row; a shorter row stays as it is."""
        if num_tokens < 0:
            raise ValueError(f"keep({num_tokens}): give the number of tokens to keep, at least 0")
        self._set_lengths([min(n, num_tokens) for n in self.row_lengths()])

    def keep_rows(self, lengths: Sequence[int]) -> None:
        """Keep so many first tokens of each row, which has no fewer."""
        self._set_lengths(list(lengths))

    def reset(self) -> None:
        """Drop all tokens and the buffer, so that any number of rows may follow."""
        self.buffer = self.scale = self.keys = self.values = None
        self.is_initialized = False
        self.lengths, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.buffer is not None:
            self._map_batch(beam_idx.to(self.buffer.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffer is not None:
            rows = torch.arange(len(self.buffer), device=self.buffer.device)
            self._map_batch(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.buffer is not None:
            rows = torch.arange(len(self.buffer), device=self.buffer.device)
            self._map_batch(rows[indices])

    def offload(self) -> None:
        raise ValueError("LatentCache: offloading is not supported; the cache is already small")

    def _join(self, layers: Sequence[LatentLayer], capacity_tokens: int, *, zeros: bool) -> None:
        """Hold copies of all layers' rows; `zeros`, and whole pages, for rows that end early."""
        if zeros:
            capacity_tokens = -(-capacity_tokens // PAGE_TOKENS) * PAGE_TOKENS
        lengths = [layer.length for layer in layers]
        joined = partial(_joined_rows, lengths=lengths, tokens=capacity_tokens, zeros=zeros)
        if layers[0].scale is not None:
            self.scale = joined([cast(Tensor, layer.scale) for layer in layers])
        self.buffer = joined([cast(Tensor, layer.buffer) for layer in layers])


class LatentCache(Cache):
    """Latents of all layers; pass as `past_key_values`, or let `generate` make one.

    Args:
        num_layers: layers of the model.
        capacity_tokens: tokens to allocate at first use; the cache grows past it when it must.
        codes: float8_e4m3fn or int8 for a quantised cache; None keeps the model's dtype.
    """

    def __init__(
        self, num_layers: int, capacity_tokens: int = 0, codes: torch.dtype | None = None
    ) -> None:
        super().__init__(layers=[LatentLayer(capacity_tokens, codes) for _ in range(num_layers)])

    def croppable_length(self, at_most: int) -> int:
        """The most tokens, up to `at_most`, to which the cache can be cropped."""
        first: Any = self.layers[0]
        return int(first.croppable_length(at_most))

    def keep(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of each row; a shorter row stays as it is."""
        for layer in cast("list[LatentLayer]", self.layers):
            layer.keep(num_tokens)

    def keep_rows(self, lengths: Sequence[int]) -> None:
        """Keep so many first tokens of each row, which has no fewer."""
        for layer in cast("list[LatentLayer]", self.layers):
            layer.keep_rows(lengths)

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row."""
        first: Any = self.layers[0]
        lengths: list[int] = first.row_lengths()
        return lengths

    @property
    def is_ragged(self) -> bool:
        """Whether rows have unequal lengths."""
        first: Any = self.layers[0]
        return first.lengths is not None

    def reserve(self, num_tokens: int) -> int:
        """Make room for so many more tokens in each row -> the tokens a row can hold then."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.reserve(layer.length + num_tokens)
        return int(layers[0].buffer.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes allocated over all layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))


def concatenate_rows(caches: Sequence[LatentCache], capacity_tokens: int = 0) -> LatentCache:
    """One cache that holds copies of the rows of several, each row at its own length.

    Args:
        caches: with a token or more each.
        capacity_tokens: tokens a row to allocate at least.

    Raises:
        ValueError: no cache, an empty one, or caches of different models, dtypes or devices.
    """
    depths = {len(cache.layers) for cache in caches}
    if len(depths) != 1:
        raise ValueError(
            f"concatenate_rows: {len(caches)} caches with {sorted(depths)} layers; give at least "
            "one, all of the same model"
        )
    whole = LatentCache(num_layers=0)
    whole.layers = [
        _joined_layer(layers, capacity_tokens)
        for layers in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return whole


def _joined_layer(layers: Sequence[Any], capacity_tokens: int) -> LatentLayer:
    if not all(type(layer) is LatentLayer and layer.length for layer in layers):
        raise ValueError("concatenate_rows: takes LatentCaches that hold tokens")
    kinds = {(x.buffer.shape[2], x.rank, x.buffer.dtype, x.buffer.device) for x in layers}
    if len(kinds) > 1:
        raise ValueError(
            "concatenate_rows: the caches differ in (width, rank, dtype, device): "
            + ", ".join(sorted(map(str, kinds)))
        )
    lengths = [length for layer in layers for length in layer.row_lengths()]
    first, whole = layers[0], LatentLayer(codes=layers[0].codes)
    whole.dtype, whole.device, whole.rank = first.dtype, first.device, first.rank
    whole._join(layers, max(capacity_tokens, *lengths), zeros=True)
    whole.is_initialized = True
    whole._set_lengths(lengths)
    return whole


def _joined_rows(
    planes: Sequence[Tensor], lengths: Sequence[int], tokens: int, *, zeros: bool
) -> Tensor:
    """A plane (rows, tokens, ...) with the first tokens of the rows of others."""
    first, rows = planes[0], sum(map(len, planes))
    make = first.new_zeros if zeros else first.new_empty
    joined: Tensor = make(rows, tokens, *first.shape[2:])
    at = 0
    for plane, length in zip(planes, lengths, strict=True):
        joined[at : at + len(plane), :length] = plane[:, :length]
        at += len(plane)
    return joined


def _as_bytes(plane: Tensor) -> Tensor:
    """Codes as numbers that every operation takes, and others as they are."""
    return plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane
