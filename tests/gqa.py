"""Models of transformers with grouped-query attention, and models of ours that compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ic.model import MLAConfig, MLAForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,  # large enough that a wrong one is seen
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A class of transformers, what its configuration is given beside `SIZES`, and what it has."""

    config: type[PreTrainedConfig]
    options: dict[str, Any]

    def model(self, **changes: Any) -> PreTrainedModel:
        """A small model with random weights, biases and norms too."""
        torch.manual_seed(0)
        config = self.config(**{**SIZES, **self.options, **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.uniform_(0.5, 1.5)
        return model


FAMILIES = {
    "llama": Family(LlamaConfig, {}),
    "llama_biases": Family(LlamaConfig, {"attention_bias": True}),
    "llama_wide_heads": Family(LlamaConfig, {"head_dim": 32}),
    "mha": Family(LlamaConfig, {"num_key_value_heads": 4}),
    "mqa": Family(LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": Family(MistralConfig, {"sliding_window": None}),
    "qwen2": Family(Qwen2Config, {}),
    "qwen3": Family(Qwen3Config, {"head_dim": 16}),
}


@torch.no_grad()
def exact_twin(theirs: PreTrainedModel, *, interleave: bool, nope: int = 0) -> MLAForCausalLM:
    """Our model with the keys of all heads as rotary key, the values as latent, and no loss.

    Args:
        interleave: the layout of the rotary dimensions.
        nope: dimensions that do not rotate, all of zeros.
    """
    old = theirs.config
    heads, groups = old.num_attention_heads, old.num_key_value_heads
    dim = getattr(old, "head_dim", None) or old.hidden_size // heads
    attention = theirs.model.layers[0].self_attn
    has_norms = hasattr(attention, "q_norm")
    config = MLAConfig(
        **{name: getattr(old, name) for name in SIZES if name != "num_key_value_heads"},
        tie_word_embeddings=old.tie_word_embeddings,
        rope_parameters=dict(old.rope_parameters),
        rope_interleave=interleave,
        kv_lora_rank=groups * dim,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=groups * dim,
        v_head_dim=dim,
        latent_norm=False,
        rope_repeats=groups,
        attention_bias=attention.k_proj.bias is not None,
        query_bias=attention.q_proj.bias is not None,
        qk_norm_dim=dim if has_norms else None,
    )
    ours = MLAForCausalLM(config).eval()
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    scale = (config.qk_head_dim / dim) ** 0.5  # theirs divides by the root of dim
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            if prefix + f"k_proj.{kind}" not in state:
                continue
            q, k, v = (state.pop(prefix + f"{name}_proj.{kind}") for name in "qkv")
            query = _queries(q if has_norms else q * scale, heads, groups, interleave, nope)
            state[prefix + f"q_proj.{kind}"] = query
            key = _by_pairs(k.unflatten(0, (groups, dim)), interleave)
            state[prefix + f"kv_a_proj_with_mqa.{kind}"] = torch.cat((v, key))
            if kind == "bias":
                state.setdefault(prefix + "o_proj.bias", torch.zeros(config.hidden_size))
        read = torch.zeros(heads, nope + dim, groups, dim)
        for head in range(heads):
            read[head, nope:, head // (heads // groups)] = torch.eye(dim)
        state[prefix + "kv_b_proj.weight"] = read.flatten(0, 1).flatten(1)
        if has_norms:
            for name, factor in (("q_norm", scale), ("k_norm", 1.0)):
                key_name = prefix + f"{name}.weight"
                state[key_name] = _by_pairs(state[key_name][None] * factor, interleave)
    ours.load_state_dict(state)
    return ours


def _by_pairs(x_GE: Tensor, interleave: bool) -> Tensor:
    """Dimensions of G heads, each of which rotates (i, i + E/2), in the layout of ours."""
    halves = x_GE.unflatten(1, (2, -1))
    if interleave:
        return halves.transpose(1, 2).flatten(0, 2)
    return halves.transpose(0, 1).flatten(0, 2)


def _queries(q: Tensor, heads: int, groups: int, interleave: bool, nope: int) -> Tensor:
    q_HE = q.unflatten(0, (heads, -1))
    rows = []
    for head in range(heads):
        placed = q_HE.new_zeros(groups, *q_HE.shape[1:])
        placed[head // (heads // groups)] = q_HE[head]
        rows += [q_HE.new_zeros(nope, *q_HE.shape[2:]), _by_pairs(placed, interleave)]
    return torch.cat(rows)
