"""How many prompts a GPU's memory holds together, from the sizes of the model alone."""

from __future__ import annotations

from typing import Any

import torch

from ic.model import MLAForCausalLM
from ic.model.attention import EXPANDED_BYTES
from ic.model.paged_cache import cache_token_bytes
from ic.model.quantised_latents import code_dtype

# More of them at once are hardly faster, and what was answered is kept batch by batch.
MOST_PROMPTS = 64
# Of what is free; the rest is for what arithmetic leaves out, and for fragmentation.
_SHARE = 0.5


def free_bytes(model: Any) -> int | None:
    """Memory that a model's GPU has left, what PyTorch holds unused included; None on a CPU."""
    if model.device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return torch.cuda.mem_get_info(model.device)[0] + unused


def prompts_at_once(model: Any, tokens: int, piece_tokens: int, free: int) -> int:
    """Prompts of `tokens`, the answers included, that fit `free` bytes: 1 to `MOST_PROMPTS`.

    Args:
        piece_tokens: of each prompt that are processed at once.
    """
    left = _SHARE * free - (EXPANDED_BYTES if isinstance(model, MLAForCausalLM) else 0)
    fit = int(left // prompt_bytes(model, tokens, piece_tokens))
    return max(1, min(MOST_PROMPTS, fit))


def prompt_bytes(model: Any, tokens: int, piece_tokens: int) -> int:
    """Bytes that one more prompt in a batch takes: its cache, and the activations of a layer.

    The cache is there twice for a moment, where the padding of unequal prompts is cut off.
    """
    return 2 * tokens * _cache_bytes(model) + min(tokens, piece_tokens) * _activation_bytes(model)


def _cache_bytes(model: Any) -> int:
    """Of a token in all layers."""
    config = model.config.get_text_config()
    if isinstance(model, MLAForCausalLM):
        codes = code_dtype(config.cache_dtype)
        return cache_token_bytes(config, model.dtype, codes)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    numbers = 2 * heads * _head_dim(config)
    return int(config.num_hidden_layers * numbers * model.dtype.itemsize)


def _activation_bytes(model: Any) -> int:
    """Of a token in a layer: four hidden states, and either the MLP's gate, up projection and their
    product or twice every head's query and value.
    """
    config = model.config.get_text_config()
    if isinstance(model, MLAForCausalLM):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        width = 2 * _head_dim(config)
    heads = 2 * config.num_attention_heads * width
    mlp = 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return int((4 * config.hidden_size + max(mlp, heads)) * model.dtype.itemsize)


def _head_dim(config: Any) -> int:
    own: int | None = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads
