"""Writes transformers' DeepSeek-V3 as a GGUF file, as llama.cpp's converter does.

Names come from the package's own table (`get_tensor_name_map`) and keys from its writer; what is
written where follows `conversion/deepseek.py` of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.conftest import randomize

# Every last dimension is a multiple of 32, a block of Q8_0.
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 2,
    "bos_token_id": 260,
    "eos_token_id": 261,
}
ALPHABET = list(bytes_to_unicode().values())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
TOKENS = [*ALPHABET, *("".join(pair) for pair in MERGES), "<|begin|>", "<|end|>"]


def deepseek(**changes: Any) -> DeepseekV3ForCausalLM:
    """A dense DeepSeek-V3 of transformers with random weights."""
    torch.manual_seed(3)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **changes})).eval()
    randomize(model)
    return model


def byte_level_bpe() -> Tokenizer:
    """The tokenizer that `write` describes, built without a GGUF file."""
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(TOKENS)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(TOKENS[-2:])
    return tokenizer


@torch.no_grad()
def write(
    path: Path,
    model: DeepseekV3ForCausalLM,
    kind: str = "F32",
    *,
    split: bool = True,
    splitting: str | None = "gpt-2",
    leave_out: str = "",
    parts: int | None = None,
    **keys: int | str | float,
) -> None:
    """Write a GGUF file, and give `model` the weights that it holds once it is dequantised.

    Args:
        kind: type of the matrices; vectors stay float32.
        split: with `attn_k_b` and `attn_v_b`, as since April 2025; else the older layout.
        splitting: rule by which the tokenizer splits text; None leaves the tokenizer out.
        leave_out: a tensor that is not written.
        parts: files that the model is said to be in; None says nothing.
        keys: metadata to add or to replace, without the architecture's prefix.
    """
    config = model.config
    writer = GGUFWriter(path, str(keys.pop("architecture", "deepseek2")))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    if split:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(key)
        writer.add_value_length(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)  # 256 by default, used by no layer
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _add_rope(writer, config)
    if splitting is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting)
        unused = [f"[PAD{i}]" for i in range(len(TOKENS), config.vocab_size)]
        writer.add_token_list([*TOKENS, *unused])
        normal = [TokenType.NORMAL] * (len(TOKENS) - 2)
        control, padding = [TokenType.CONTROL] * 2, [TokenType.UNUSED] * len(unused)
        writer.add_token_types([*normal, *control, *padding])
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
    if parts is not None:
        writer.add_uint16("split.count", parts)
    for name, value in keys.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        (writer.add_string if isinstance(value, str) else add)(f"deepseek2.{name}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        for part, array in _parts(name, parameter.numpy(), config, split):
            theirs = names.get_name(part, try_suffixes=(".weight",))
            if theirs == leave_out:
                continue
            held = _add(writer, theirs, array, kind)
            _give_back(parameter, part, held, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _parts(name: str, array: np.ndarray, config: Any, split: bool) -> list[tuple[str, np.ndarray]]:
    """A parameter as it is stored: `kv_b_proj` in two, head by head, the keys' part transposed."""
    if not split or "kv_b_proj" not in name:
        return [(name, array)]
    nope, head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    rows = [array[i * head : (i + 1) * head] for i in range(config.num_attention_heads)]
    return [
        (name.replace("kv_b", "k_b"), np.stack([row[:nope].T for row in rows])),
        (name.replace("kv_b", "v_b"), np.stack([row[nope:] for row in rows])),
    ]


def _add(writer: GGUFWriter, name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """Write a tensor; returns what a reader finds in it."""
    qtype = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
    data = quantize(np.ascontiguousarray(array), qtype)
    writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else qtype)
    return dequantize(data, qtype)


def _give_back(parameter: torch.nn.Parameter, part: str, held: np.ndarray, config: Any) -> None:
    nope, head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    for i in range(config.num_attention_heads):
        if "k_b_proj" in part and "kv_b" not in part:
            parameter[i * head : i * head + nope] = torch.from_numpy(held[i].T.copy())
        elif "v_b_proj" in part and "kv_b" not in part:
            parameter[i * head + nope : (i + 1) * head] = torch.from_numpy(held[i].copy())
        else:
            parameter.copy_(torch.from_numpy(held.copy()))
