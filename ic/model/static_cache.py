"""Cache of MLA latents in buffers that never move or grow, for CUDA graphs and compiled decoding.

Legend: B batch, S capacity in tokens, T new tokens, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from ic.model.cache import PAGE_TOKENS
from ic.model.quantised_latents import dequantise, quantise


class StaticLatentLayer(StaticLayer):
    """One layer's latents in a single buffer (B, S, R + P), allocated at the first update.

    The number of cached tokens is a tensor on the buffer's device (`cumulative_length`), so a pass
    has the same shapes and launches at every length. `keys` and `values` are views of the buffer,
    (B, 1, S, R) and (B, 1, S, P); what lies behind the cached tokens is finite, and hidden by a
    mask or by their number. A quantised layer is as `LatentLayer`'s is.
    """

    is_croppable = True
    supports_early_init = False  # it gives keys and values one width, and MLA's have two

    def __init__(self, capacity_tokens: int, codes: torch.dtype | None = None) -> None:
        super().__init__(max_cache_len=capacity_tokens)
        self.codes = codes
        self.buffer: Tensor | None = None
        self.scale: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, rank = key_states.shape[0], key_states.shape[-1]
        width = rank + value_states.shape[-1]
        dtype = self.codes or self.dtype
        buffer = key_states.new_zeros(batch, self.max_cache_len, width, dtype=dtype)
        if self.codes is not None:
            self.scale = key_states.new_zeros(batch, self.max_cache_len, dtype=torch.float32)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for held in (buffer, self.scale, self.cumulative_length):
                if held is not None:
                    torch._dynamo.mark_static_address(held)
        self._set_buffer(buffer, rank)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append latents (B, 1, T, R) and rotated keys (B, 1, T, P); return all places of both."""
        self.append(key_states[:, 0], value_states[:, 0])
        if self.scale is None:
            assert self.keys is not None
            assert self.values is not None
            return self.keys, self.values
        held = dequantise(self.latents(), self.scale, self.dtype)[:, None]
        return held[..., : self.k_head_dim], held[..., self.k_head_dim :]

    def append(self, latent_BTR: Tensor, k_rope_BTP: Tensor) -> None:
        """As `update`, without returning what is held."""
        if self.codes is None:
            super().update(latent_BTR[:, None], k_rope_BTP[:, None])
            return
        if not self.is_initialized:
            self.lazy_initialization(latent_BTR[:, None], k_rope_BTP[:, None])
        assert self.scale is not None
        tokens = latent_BTR.shape[1]
        place_T = torch.arange(tokens, device=self.device) + self.cumulative_length
        codes_BTC, scale_BT = quantise(torch.cat((latent_BTR, k_rope_BTP), dim=-1), self.codes)
        pages, _ = self.extend(tokens)
        as_bytes = torch.uint8 if self.codes == torch.float8_e4m3fn else self.codes
        pages.view(as_bytes).index_copy_(1, place_T, codes_BTC.view(as_bytes))
        self.scale.index_copy_(1, place_T, scale_BT)

    def latents(self) -> Tensor:
        """The whole buffer (B, S, R + P); codes if the layer is quantised."""
        assert self.buffer is not None
        return self.buffer

    def scales(self) -> Tensor | None:
        """The scales (B, S) of the codes in `latents`; None if the layer has none."""
        return self.scale

    def extend(self, num_tokens: int) -> tuple[Tensor, Tensor | None]:
        """Count more tokens, and return the buffer, of which the caller must write their places,
        and their scales if the layer is quantised.
        """
        self.cumulative_length.add_(num_tokens)
        return self.latents(), self.scale

    def has_pages(self, num_tokens: int) -> bool:
        """Whether the buffer is allocated, in whole pages of the append kernel."""
        return self.is_initialized and self.max_cache_len % PAGE_TOKENS == 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens: 0 drops none, too many drop all.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the tokens to drop as a negative number"
            )
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `beam_idx[i]` becomes row i, in place."""
        if self.buffer is not None:
            rows = beam_idx.to(self.buffer.device)
            self.buffer.copy_(self.buffer[rows])
            if self.scale is not None:
                self.scale.copy_(self.scale[rows])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; the cache moves to another buffer."""
        if self.buffer is not None:
            rows = torch.arange(len(self.buffer), device=self.buffer.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; the cache moves to another buffer."""
        if self.buffer is not None:
            if self.scale is not None:
                self.scale = self.scale[indices]
            self._set_buffer(self.buffer[indices], self.k_head_dim)

    def _set_buffer(self, buffer: Tensor, rank: int) -> None:
        self.buffer = buffer
        self.batch_size, self.num_heads = len(buffer), 1
        self.k_head_dim, self.v_head_dim = rank, buffer.shape[-1] - rank
        if self.scale is None:
            self.keys, self.values = buffer[:, None, :, :rank], buffer[:, None, :, rank:]


class StaticLatentCache(Cache):
    """Latents of all layers at fixed addresses; pass as `past_key_values`, or let `generate` make
    one (`cache_implementation="static"`).

    Args:
        num_layers: layers of the model.
        capacity_tokens: the most tokens a row can hold. With a multiple of 16, decoding on
            `triton` does norm, rotation and append in one kernel.
        codes: float8_e4m3fn or int8 for a quantised cache; None keeps the model's dtype.

    A prefill, and a CPU, refuse tokens beyond the capacity; decoding on a GPU, which would have to
    wait for the length, does not look: do not decode beyond it.
    """

    def __init__(
        self, num_layers: int, capacity_tokens: int, codes: torch.dtype | None = None
    ) -> None:
        super().__init__(
            layers=[StaticLatentLayer(capacity_tokens, codes) for _ in range(num_layers)]
        )
