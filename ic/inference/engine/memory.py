"""How many tokens the paged cache of a model can hold."""

from __future__ import annotations

import torch

from ic.inference.engine.options import EngineOptions
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.attention import EXPANDED_BYTES
from ic.model.paged_cache import cache_token_bytes, token_bytes

# Left to fragmentation, graphs and other programs.
_SPARE_SHARE = 0.1
_MOST_CPU_TOKENS = 65536


def num_pages(model: MLAForCausalLM, options: EngineOptions, codes: torch.dtype | None) -> int:
    """Pages of `options.page_tokens` that the cache gets: as many as are asked for, or as fit.

    Raises:
        ValueError: none fits beside the model.
    """
    tokens = options.cache_tokens
    if tokens is None:
        positions = model.config.max_position_embeddings
        if model.device.type == "cuda":
            tokens = min(_tokens_beside(model, options, codes), options.max_batch * positions)
        else:
            tokens = min(4 * positions, _MOST_CPU_TOKENS)
    pages = tokens // options.page_tokens
    if pages < 1:
        raise ValueError(
            f"the GPU has no memory left for a cache beside {model.config.num_hidden_layers} "
            f"layers and chunks of {options.prefill_chunk_tokens} tokens: lower "
            "prefill_chunk_tokens, or take a smaller model"
        )
    return pages


@torch.no_grad()
def _tokens_beside(model: MLAForCausalLM, options: EngineOptions, codes: torch.dtype | None) -> int:
    """Tokens that fit beside the model and the activations of a chunk, which are measured."""
    device, config = model.device, model.config
    chunk = min(options.prefill_chunk_tokens, config.max_position_embeddings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    ids_BT = torch.zeros(1, chunk, dtype=torch.long, device=device)
    model(ids_BT, use_cache=False, logits_to_keep=1)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = free - int(_SPARE_SHARE * total) - activations
    return tokens_within(left, config, model.dtype, codes)


def tokens_within(
    num_bytes: int, config: MLAConfig, dtype: torch.dtype, codes: torch.dtype | None
) -> int:
    """Tokens of which the cache, and what a chunk makes of a context of all of them, fit.

    A chunk gathers one layer's latents, and multiplies codes by their scales. It expands keys and
    values of as many heads as EXPANDED_BYTES allow, and of one at least.
    """
    own, held = token_bytes(config, dtype, None), token_bytes(config, dtype, codes)
    width = config.qk_nope_head_dim + config.v_head_dim + config.qk_head_dim
    token = cache_token_bytes(config, dtype, codes) + own + held
    with_all_heads = (num_bytes - EXPANDED_BYTES) // token
    with_one_head = num_bytes // (token + width * dtype.itemsize)
    return max(min(with_all_heads, with_one_head), 0)
