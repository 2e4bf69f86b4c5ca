"""Causal language models of `transformers` that are not ours: Llama, Qwen, Mistral and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.gguf_file import gguf_architecture
from ic.checkpoint.hugging_face import folder_model_type
from ic.checkpoint.source import Source
from ic.errors import lacks_memory
from ic.inference.caches import TransformersCache
from ic.inference.options import LoadOptions
from ic.model import MLAConfig
from ic.model.backends import Backends

OURS = (MLAConfig.model_type, "deepseek_v2", "deepseek_v3")


def is_ours(source: Source) -> bool:
    """Whether `MLAForCausalLM` runs the model, and not `transformers`' own class."""
    if source.is_gguf:
        return gguf_architecture(source.path) == "deepseek2"
    kind = folder_model_type(source.path)
    # What is of no known kind is refused in our words.
    return kind in OURS or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_backends(source: Source, backends: Backends, options: LoadOptions) -> None:
    """Refuse backends, quantised caches and indexers for a model that is not ours.

    Raises:
        ValueError: another backend than `torch`, another cache or indexer than `auto`.
    """
    asked = {name: getattr(backends, name) for name in ("attention", "norm", "rope")}
    others = {name: getattr(options, name) for name in ("cache_dtype", "indexer")}
    for name, value in {**asked, **others}.items():
        if value != ("auto" if name in others else "torch"):
            raise ValueError(
                f"{name}={value}: {source.path} is no model of ours, and transformers runs it; "
                f"leave {name} out"
            )


def read_config(source: Source) -> PreTrainedConfig:
    """The configuration of a model that is not ours; no code of the folder's is run.

    Raises:
        CheckpointError: it cannot be read, or an adapter lies beside it.
    """
    if not source.is_gguf and (source.path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{source.path} holds an adapter beside its model: merge the two (PEFT's "
            "merge_and_unload) and give the folder of the merged model"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            _folder(source), trust_remote_code=False, **_file(source)
        )
    except (
        *(OSError, ValueError, KeyError, TypeError, ImportError),
        StrictDataclassError,
    ) as error:
        raise CheckpointError(f"{source.path} cannot be loaded: {_line(error)}") from error
    return config


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file whose model is not ours, rebuilt by `transformers`.

    Raises:
        CheckpointError: it cannot be rebuilt.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise CheckpointError(
            f"the tokenizer of {file} cannot be rebuilt: {_line(error)}; say which to use with "
            "tokenizer=FOLDER"
        ) from error
    return tokenizer


def load_transformers_model(source: Source, dtype: torch.dtype | None) -> Any:
    """The model in evaluation mode on the CPU; dtype None is the saved one.

    Raises:
        CheckpointError: weights that are missing or do not fit, or a model without a cache that
            prompts can be read into piece by piece.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _folder(source),
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **_file(source),
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        raise CheckpointError(
            f"the weights in {source.path} cannot be read: {_line(error)}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(
            f"{source.path} lacks {len(info['missing_keys'])} tensors of its model, the first is "
            f"{sorted(info['missing_keys'])[0]}"
        )
    _check_cached(model.eval(), source.path)
    return model


@torch.no_grad()
def _check_cached(model: Any, path: Path) -> None:
    """Two tokens, one after the other: does the cache hold both?"""
    cache = TransformersCache(config=model.config)
    token_11 = torch.zeros(1, 1, dtype=torch.long)
    try:
        for _ in range(2):
            model(token_11, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held = cache.get_seq_length()
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: a {model.config.model_type} cannot be read in pieces over a cache of "
            f"transformers: {_line(error)}"
        ) from error
    if held != 2:
        raise CheckpointError(
            f"{path}: a {model.config.model_type} keeps no cache of keys and values; models with "
            "attention in every layer can be evaluated"
        )


def _folder(source: Source) -> Path:
    return source.path.parent if source.is_gguf else source.path


def _file(source: Source) -> dict[str, str]:
    return {"gguf_file": source.path.name} if source.is_gguf else {}


def _line(error: Exception) -> str:
    """An error on one line, which transformers wraps over many."""
    return " ".join(str(error).split()) or type(error).__name__
