"""Cache of MLA latents in pages that many rows share, for engines.

Who holds which page is the caller's matter. It says in the `AttentionContext` where the new tokens
go (`append_slots_M`) and which pages each row reads (`block_table_BN`).

Legend: B rows, N pages of a row, T new tokens, S = N * tokens of a page, R kv_lora_rank,
P qk_rope_head_dim, C = R + P, M = B * T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ic.model.config import MLAConfig
from ic.model.indexer_options import num_indexers
from ic.model.quantised_latents import code_dtype, quantise

_NEEDS_CONTEXT = (
    "PagedLatentCache: give the model an AttentionContext that says which pages each row has"
)


class PagedLatentLayer(CacheLayerMixin):
    """One layer's latents in a single buffer (pages, tokens of a page, C).

    What is not written yet is zero, so that a mask hides it.

    Attributes:
        pages: latents and rotated keys, or their codes (`ic.model.quantised_latents`).
        scale: (pages, tokens of a page) float32 of a quantised layer, or None.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, pages: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.pages, self.scale = pages, scale
        self.is_initialized = True

    def append_rows(self, latent_BTR: Tensor, k_rope_BTP: Tensor, slots_M: Tensor | None) -> None:
        """Write the new tokens into their places.

        Args:
            slots_M: int64, page * tokens of a page + place in it.
        """
        if slots_M is None:
            raise ValueError(_NEEDS_CONTEXT)
        new_MC = torch.cat((latent_BTR, k_rope_BTP), dim=-1).flatten(0, 1)
        if self.scale is None:
            self.pages.flatten(0, 1).index_copy_(0, slots_M, new_MC.to(self.pages.dtype))
            return
        codes_MC, scale_M = quantise(new_MC, self.pages.dtype)
        _as_bytes(self.pages).flatten(0, 1).index_copy_(0, slots_M, _as_bytes(codes_MC))
        self.scale.flatten().index_copy_(0, slots_M, scale_M)

    def extend(self, num_tokens: int) -> tuple[Tensor, Tensor | None]:
        """The pages, and their scales, of which the caller writes the new tokens' places."""
        return self.pages, self.scale

    def has_pages(self, num_tokens: int) -> bool:
        """Always."""
        return True

    def latents(self) -> Tensor:
        """All pages; codes if the layer is quantised."""
        return self.pages

    def scales(self) -> Tensor | None:
        """The scales of the codes in `latents`; None if the layer has none."""
        return self.scale

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Raises ValueError: only a context says where new tokens go."""
        raise ValueError(_NEEDS_CONTEXT)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise ValueError(_NEEDS_CONTEXT)

    def get_seq_length(self) -> int:
        raise ValueError(_NEEDS_CONTEXT)

    def get_max_length(self) -> int:
        return self.pages.shape[0] * self.pages.shape[1]

    get_max_cache_shape = get_max_length


class PagedLatentCache(Cache):
    """Latents of all layers in pages; pass as `past_key_values` together with a `context`.

    Args:
        config: of the model.
        num_pages, page_tokens: of each layer; a page has a multiple of 16 tokens.
        dtype: the model's.
        codes: float8_e4m3fn or int8 for a quantised cache; None keeps the model's dtype.
        device: where the pages are.
    """

    def __init__(
        self,
        config: MLAConfig,
        num_pages: int,
        page_tokens: int,
        *,
        dtype: torch.dtype,
        codes: torch.dtype | None,
        device: torch.device,
    ) -> None:
        shape = (num_pages, page_tokens)
        kinds = [(config.latent_dim, codes)] * config.num_hidden_layers
        if config.indexer == "sparse":
            index_codes = code_dtype(config.index_cache_dtype)
            kinds += [(config.index_head_dim, index_codes)] * num_indexers(config)
        super().__init__(
            layers=[
                PagedLatentLayer(
                    torch.zeros(*shape, width, dtype=kind or dtype, device=device),
                    None if kind is None else torch.zeros(shape, device=device),
                )
                for width, kind in kinds
            ]
        )


def token_bytes(config: MLAConfig, dtype: torch.dtype, codes: torch.dtype | None) -> int:
    """Bytes of one token's latent in one layer of such a cache."""
    return _row_bytes(config.latent_dim, dtype, codes)


def cache_token_bytes(config: MLAConfig, dtype: torch.dtype, codes: torch.dtype | None) -> int:
    """Bytes of one token in all of a cache: latents, and the index keys of a sparse model."""
    keys = 0
    if config.indexer == "sparse":
        index_codes = code_dtype(config.index_cache_dtype)
        keys = num_indexers(config) * _row_bytes(config.index_head_dim, dtype, index_codes)
    return config.num_hidden_layers * token_bytes(config, dtype, codes) + keys


def _row_bytes(width: int, dtype: torch.dtype, codes: torch.dtype | None) -> int:
    return width * (codes or dtype).itemsize + (0 if codes is None else 4)


def gather_pages(
    pages: Tensor, scale: Tensor | None, block_table_BN: Tensor, visible_BT: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the rows have in their pages, side by side: (B, S, C), and scales (B, S).

    Args:
        visible_BT: keys that each new token sees. What lies behind those of the last is then zero:
            another row may have left what is no number there, which no mask hides.
    """
    rows_BSC = _as_bytes(pages)[block_table_BN].flatten(1, 2)
    scale_BS = None if scale is None else scale[block_table_BN].flatten(1, 2)
    if visible_BT is not None:
        index_S = torch.arange(rows_BSC.shape[1], device=rows_BSC.device)
        is_behind_BS = index_S >= visible_BT[:, -1:]
        rows_BSC.masked_fill_(is_behind_BS[..., None], 0)
        if scale_BS is not None:
            scale_BS.masked_fill_(is_behind_BS, 0)
    return rows_BSC.view(pages.dtype), scale_BS


def _as_bytes(plane: Tensor) -> Tensor:
    """Codes as numbers that every operation takes, and others as they are."""
    return plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane
