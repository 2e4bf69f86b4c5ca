"""Models in llama.cpp's file format GGUF: the architecture `deepseek2` with dense layers.

Names, keys and layouts are those that llama.cpp's `conversion/deepseek.py` writes and that its
`src/models/deepseek2.cpp` reads:

- `key_length_mla` and `value_length_mla` are the dimensions of a head; files from before them hold
  these in `key_length` and `value_length`.
- The rotary part stays as DeepSeek lays it out, in pairs (2i, 2i+1): nothing is permuted.
- `attn_kv_b` is split by heads into `attn_k_b`, transposed to (heads, kv_lora_rank, qk_nope), and
  `attn_v_b` (heads, v_head, kv_lora_rank); files from before that hold it whole.
- `rope.scaling.yarn_log_multiplier` is 0.1 * mscale_all_dim; mscale is taken to be the same, as it
  is in every DeepSeek model.

Legend: H heads, N qk_nope, V v_head, R kv_lora_rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.gguf_header import gguf_values
from ic.checkpoint.weights import check_sizes
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.backends import ON_TORCH, Backends

ARCHITECTURE = "deepseek2"
SUPPORTED = f"supported is llama.cpp's {ARCHITECTURE} (DeepSeek-V2 and V3) with dense layers"
# Hugging Face's names -> llama.cpp's
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_UNQUANTISED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_REQUIRED = object()


def gguf_architecture(path: Path) -> str | None:
    """llama.cpp's name of the architecture that a file holds, if it says so.

    Raises:
        CheckpointError: it is no GGUF file.
    """
    name = gguf_values(path).get("general.architecture")
    return None if name is None else str(name)


class GGUFFile:
    """A model in a GGUF file, read tensor by tensor; quantised tensors become float32.

    Attributes:
        config: the model's configuration.
        sizes: each tensor's size and type by Hugging Face's name, as a tensor on `meta`.

    Raises:
        CheckpointError: unreadable, of another architecture, with experts, or with tensors that do
            not fit its configuration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._fields: Mapping[str, Any] = reader.fields
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self._check_supported()
        self.config = self._read_config()
        with torch.device("meta"):
            names = list(MLAForCausalLM(self.config).state_dict())
        if self.config.tie_word_embeddings:
            names.remove("lm_head.weight")
        self._sources = {name: self._source(name) for name in names}
        used = {source for sources in self._sources.values() for source in sources}
        if other := sorted(self._tensors.keys() - used - self._redundant()):
            raise CheckpointError(
                f"{path} holds {len(other)} tensors that the model has no place for, the first is "
                f"{other[0]}; {SUPPORTED}"
            )
        self.sizes: Mapping[str, Tensor] = {name: self._size(name) for name in names}
        check_sizes(self, self.config, path)

    def read(self, name: str) -> Tensor:
        """A tensor by Hugging Face's name, in the type that `sizes` says."""
        parts = [self._dequantised(source) for source in self._sources[name]]
        tensor = _join(parts[0], parts[1], self.config) if len(parts) == 2 else parts[0]
        return tensor.to(self.sizes[name].dtype)

    def model(
        self, backends: Backends = ON_TORCH, dtype: torch.dtype | None = None
    ) -> MLAForCausalLM:
        """The model in evaluation mode on the CPU; None is the type of its token embedding."""
        self.config.set_backends(backends)
        self.config.dtype = dtype = dtype or self.sizes["model.embed_tokens.weight"].dtype
        with torch.device("meta"):
            model = MLAForCausalLM(self.config)
        state = {name: self.read(name).to(dtype) for name in self.sizes}
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.requires_grad_(True).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file describes, rebuilt by `transformers`.

        Raises:
            CheckpointError: it holds none, or one that `transformers` cannot rebuild exactly.
        """
        kind = self._value("tokenizer.ggml.model", None)
        splitting = self._value("tokenizer.ggml.pre", None)
        advice = "say which to use with tokenizer=FOLDER"
        if kind is None or self._value("tokenizer.ggml.tokens", None) is None:
            raise CheckpointError(f"{self.path} holds no tokenizer; {advice}")
        # Byte-level BPE gives other tokens if text is split otherwise than its merges were learned.
        if kind == "gpt2" and splitting not in _known_splittings():
            raise CheckpointError(
                f"{self.path} splits text by the rule {splitting!r} before it makes tokens, which "
                f"transformers does not know; {advice}"
            )
        try:
            loaded: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                self.path.parent, gguf_file=self.path.name
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"the tokenizer of {self.path} cannot be rebuilt: {error}; {advice}"
            ) from error
        return loaded

    def _value(self, key: str, default: Any = _REQUIRED) -> Any:
        """A value of the metadata; floats as they were before they were cut to float32."""
        field = self._fields.get(key)
        if field is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} lacks the key {key}")
            return default
        value = field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _key(self, name: str, default: Any = _REQUIRED) -> Any:
        return self._value(f"{ARCHITECTURE}.{name}", default)

    def _check_supported(self) -> None:
        architecture = self._value("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(
                f"{self.path} holds a model of the architecture {architecture!r}; {SUPPORTED}"
            )
        if (parts := self._value("split.count", 1)) > 1:
            raise CheckpointError(
                f"{self.path} is one of {parts} parts of a model; put them together with "
                "llama-gguf-split --merge"
            )
        layers = self._key("block_count")
        dense = self._key("leading_dense_block_count", layers)
        experts = [name for name in self._tensors if re.search(r"_exps|_shexp|ffn_gate_inp", name)]
        if dense < layers or experts:
            raise CheckpointError(
                f"{self.path} holds a mixture of {self._key('expert_count', 0)} experts in "
                f"{layers - dense} of its {layers} layers; {SUPPORTED}"
            )
        scaled = self._key("attention.temperature_scale", 0)
        scaling = self._key("rope.scaling.type", "none")
        ramp = self._key("rope.scaling.yarn_ext_factor", 1.0)
        if scaled or scaling not in ("none", "yarn") or ramp != 1:
            raise CheckpointError(
                f"{self.path} scales attention or rotation in a way that is not supported: "
                f"attention.temperature_scale={scaled}, rope.scaling.type={scaling}, "
                f"rope.scaling.yarn_ext_factor={ramp}; the rotation may be plain or YaRN's"
            )

    def _read_config(self) -> MLAConfig:
        heads = self._key("attention.head_count")
        rotary = self._key("rope.dimension_count")
        key = self._key("attention.key_length_mla", None) or self._key("attention.key_length")
        value = self._key("attention.value_length_mla", None) or self._key("attention.value_length")
        wide = self._tensors.get("blk.0.attn_q_a.weight")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} lacks the tensor token_embd.weight")
        try:
            return MLAConfig(
                vocab_size=int(embedding.shape[1]),
                hidden_size=self._key("embedding_length"),
                intermediate_size=self._key("feed_forward_length"),
                num_hidden_layers=self._key("block_count"),
                num_attention_heads=heads,
                q_lora_rank=None if wide is None else int(wide.shape[1]),
                kv_lora_rank=self._key("attention.kv_lora_rank"),
                qk_nope_head_dim=key - rotary,
                qk_rope_head_dim=rotary,
                v_head_dim=value,
                max_position_embeddings=self._key("context_length"),
                rms_norm_eps=self._key("attention.layer_norm_rms_epsilon"),
                rope_parameters=self._rope(),
                rope_interleave=True,
                tie_word_embeddings="output.weight" not in self._tensors,
                bos_token_id=self._value("tokenizer.ggml.bos_token_id", None),
                eos_token_id=self._value("tokenizer.ggml.eos_token_id", None),
                pad_token_id=self._value("tokenizer.ggml.padding_token_id", None),
            )
        except (ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} describes no model of ours: {error}") from error

    def _rope(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": self._key("rope.freq_base", 10000.0)}
        if self._key("rope.scaling.type", "none") == "none":
            return rope
        rope |= {
            "rope_type": "yarn",
            "factor": self._key("rope.scaling.factor"),
            "original_max_position_embeddings": self._key("rope.scaling.original_context_length"),
            "beta_fast": self._key("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._key("rope.scaling.yarn_beta_slow", 1.0),
        }
        log_multiplier = self._key("rope.scaling.yarn_log_multiplier", None)
        if log_multiplier is not None:
            rope["mscale"] = rope["mscale_all_dim"] = round(log_multiplier / 0.1, 6)
        attention = self._key("rope.scaling.yarn_attn_factor", None)
        if attention is not None:
            rope["attention_factor"] = attention
        return rope

    def _source(self, name: str) -> tuple[str, ...]:
        """llama.cpp's name of a tensor: two where it splits one."""
        stem = name.removesuffix(".weight")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        theirs = f"blk.{layer[1]}.{_OF_A_LAYER[layer[2]]}" if layer else _WHOLE[stem]
        sources: tuple[str, ...] = (f"{theirs}.weight",)
        if theirs.endswith("attn_kv_b") and sources[0] not in self._tensors:
            sources = tuple(sources[0].replace("kv_b", part) for part in ("k_b", "v_b"))
        for source in sources:
            if source not in self._tensors:
                raise CheckpointError(f"{self.path} lacks the tensor {source}")
        return sources

    def _redundant(self) -> set[str]:
        """Halves of an `attn_kv_b` that the file also holds whole."""
        whole = [name for name in self._tensors if name.endswith(".attn_kv_b.weight")]
        return {name.replace("kv_b", part) for name in whole for part in ("k_b", "v_b")}

    def _size(self, name: str) -> Tensor:
        sources = [self._tensors[source] for source in self._sources[name]]
        types = [_UNQUANTISED.get(source.tensor_type.name, torch.float32) for source in sources]
        shape = tuple(int(size) for size in reversed(sources[0].shape))
        if len(sources) == 2:
            shape = _joined_shape(sources, self.config)
            types[0] = torch.promote_types(*types)
        return torch.empty(shape, dtype=types[0], device="meta")

    def _dequantised(self, source: str) -> Tensor:
        from gguf import dequantize

        tensor = self._tensors[source]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {source} is quantised as {tensor.tensor_type.name}, which the "
                "package gguf cannot undo"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped


def _joined_shape(sources: list[Any], config: MLAConfig) -> tuple[int, ...]:
    """Of `attn_kv_b`, from the numbers of elements of its two halves."""
    elements = sum(int(np.prod(source.shape)) for source in sources)
    return (elements // config.kv_lora_rank, config.kv_lora_rank)


def _join(k_b: Tensor, v_b: Tensor, config: MLAConfig) -> Tensor:
    """`kv_b_proj` (H*(N+V), R) from its halves, k_b transposed."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    k_HNR = k_b.reshape(heads, rank, config.qk_nope_head_dim).transpose(1, 2)
    v_HVR = v_b.reshape(heads, config.v_head_dim, rank)
    return torch.cat([k_HNR, v_HVR], dim=1).reshape(-1, rank)


def _known_splittings() -> set[str]:
    """Rules of byte-level BPE that `transformers` applies; GPT-2's is its default."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # an older version, which rebuilds tokenizers by architecture
        return set()
    return {"gpt-2", *GGUF_PRE_TOKENIZER_SPLITS}


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the package gguf: pip install 'infinite-context[gguf]'"
        ) from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no GGUF file, or is damaged: {error}") from error
