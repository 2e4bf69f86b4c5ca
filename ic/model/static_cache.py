"""Cache of MLA latents in buffers that never move or grow, for CUDA graphs and compiled decoding.

Legend: B batch, S capacity in tokens, T new tokens, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from ic.model.cache import PAGE_TOKENS


class StaticLatentLayer(StaticLayer):
    """One layer's latents in a single buffer (B, S, R + P), allocated at the first update.

    The number of cached tokens is a tensor on the buffer's device (`cumulative_length`), so a pass
    has the same shapes and launches at every length. `keys` and `values` are views of the buffer,
    (B, 1, S, R) and (B, 1, S, P); what lies behind the cached tokens is finite, and hidden by a
    mask or by their number.
    """

    is_croppable = True
    supports_early_init = False  # it gives keys and values one width, and MLA's have two

    def __init__(self, capacity_tokens: int) -> None:
        super().__init__(max_cache_len=capacity_tokens)
        self.buffer: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, rank = key_states.shape[0], key_states.shape[-1]
        width = rank + value_states.shape[-1]
        buffer = key_states.new_zeros(batch, self.max_cache_len, width)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(buffer)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self._set_buffer(buffer, rank)
        self.is_initialized = True

    def latents(self) -> Tensor:
        """The whole buffer (B, S, R + P)."""
        assert self.buffer is not None
        return self.buffer

    def extend(self, num_tokens: int) -> Tensor:
        """Count more tokens, and return the buffer, of which the caller must write their places."""
        self.cumulative_length.add_(num_tokens)
        return self.latents()

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
            self.buffer.copy_(self.buffer.index_select(0, beam_idx.to(self.buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; the cache moves to another buffer."""
        if self.buffer is not None:
            self._set_buffer(self.buffer.repeat_interleave(repeats, dim=0), self.k_head_dim)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; the cache moves to another buffer."""
        if self.buffer is not None:
            self._set_buffer(self.buffer[indices], self.k_head_dim)

    def _set_buffer(self, buffer: Tensor, rank: int) -> None:
        self.buffer = buffer
        self.batch_size, self.num_heads = len(buffer), 1
        self.k_head_dim, self.v_head_dim = rank, buffer.shape[-1] - rank
        self.keys, self.values = buffer[:, None, :, :rank], buffer[:, None, :, rank:]


class StaticLatentCache(Cache):
    """Latents of all layers at fixed addresses; pass as `past_key_values`, or let `generate` make
    one (`cache_implementation="static"`).

    Args:
        num_layers: layers of the model.
        capacity_tokens: the most tokens a row can hold. With a multiple of 16, decoding on
            `triton` does norm, rotation and append in one kernel.

    A prefill, and a CPU, refuse tokens beyond the capacity; decoding on a GPU, which would have to
    wait for the length, does not look: do not decode beyond it.
    """

    def __init__(self, num_layers: int, capacity_tokens: int) -> None:
        super().__init__(layers=[StaticLatentLayer(capacity_tokens) for _ in range(num_layers)])
