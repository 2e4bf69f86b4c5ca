"""A source -> model and tokenizer on the device asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.folder import load_config, load_model, trained_length
from ic.checkpoint.gguf_file import GGUFFile
from ic.checkpoint.gguf_header import gguf_values
from ic.checkpoint.source import Source, find_source
from ic.checkpoint.weights import DTYPES
from ic.datamodules.tokenizers import build_tokenizer, load_tokenizer
from ic.inference.model_facts import positions_of
from ic.inference.options import InferenceOptions
from ic.inference.transformers_model import (
    check_backends,
    gguf_tokenizer,
    is_ours,
    load_transformers_model,
    read_config,
)
from ic.machine.devices import check_accelerator, runnable_backends
from ic.model.backends import Backends


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for inference, and what is known about it.

    Attributes:
        model: in evaluation mode, on its device, in its precision: an `MLAForCausalLM`, or a causal
            language model of `transformers`.
        tokenizer: the one that it was trained with.
        name: what pictures and tables call it.
        trained_length: longest context in tokens that it was trained at, if the source tells.
        folder: the checkpoint folder that the source stands for; of a GGUF file a folder of its
            name beside it, for results.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    trained_length: int | None
    folder: Path


@dataclass(frozen=True)
class Opened:
    """A source whose weights are not loaded yet.

    Attributes:
        source: what is to be loaded.
        tokenizer: the one that it was trained with.
        positions: tokens of the longest prompt with its answer.
        trained_length: longest context in tokens that it was trained at, if the source tells.
        vocab_size: rows of its embedding.
        ours: whether `MLAForCausalLM` runs it.
    """

    source: Source
    tokenizer: PreTrainedTokenizerBase
    positions: int
    trained_length: int | None
    vocab_size: int
    ours: bool
    _backends: Backends
    _cache_dtype: str
    _indexer: str
    _file: GGUFFile | None
    _on_gpu: bool

    def load(self) -> Loaded:
        """Load the weights.

        Raises:
            ValueError: they cannot be loaded.
        """
        dtype = DTYPES.get(self._backends.precision)  # of auto, the saved one
        path = self.source.path
        model: Any  # transformers wraps `to` past its types
        if not self.ours:
            model = load_transformers_model(self.source, dtype)
        elif self._file is not None:
            model = self._file.model(self._backends, dtype)
        else:
            model = load_model(path, self._backends)
        if self.ours:
            model.config.set_cache_dtype(self._cache_dtype)
            model.config.set_indexer(self._indexer)
        model = model if dtype is None else model.to(dtype)
        model = model.to("cuda" if self._on_gpu else "cpu")
        source = self.source
        return Loaded(model, self.tokenizer, source.name, self.trained_length, source.folder)


def source_positions(source: Source) -> int:
    """Tokens of the longest prompt with its answer, from a source's configuration alone.

    Raises:
        ValueError: it cannot be read.
    """
    if source.is_gguf:
        values = gguf_values(source.path)
        name = f"{values.get('general.architecture')}.context_length"
        return int(values.get(name, sys.maxsize))
    return positions_of(
        load_config(source.path, quantised=True) if is_ours(source) else read_config(source)
    )


def load_source(options: InferenceOptions) -> Loaded:
    """Load the model and tokenizer of a source.

    The precision `auto` is bfloat16 on a GPU (float16 below sm_80) and the saved type on a CPU.

    Raises:
        ValueError: the source cannot be loaded, or this machine lacks the accelerator.
    """
    return open_source(options).load()


def open_source(options: InferenceOptions) -> Opened:
    """What is known of a source before its weights, which take longer, are loaded.

    Raises:
        ValueError: as `load_source`, but for what only the weights tell.
    """
    check_accelerator(options.accelerator)
    on_gpu = torch.cuda.is_available() and options.accelerator != "cpu"
    backends: Backends = options.backends()
    if backends.precision == "auto" and on_gpu:
        backends = replace(backends, precision="bfloat16")
    source = find_source(options.checkpoint)
    ours = is_ours(source)
    if not ours:
        check_backends(source, backends, options)
    backends = runnable_backends(backends, options.accelerator)
    announce(source)
    file = GGUFFile(source.path) if source.is_gguf and ours else None
    config: Any
    if not ours:
        config, trained = read_config(source), None
    elif file is not None:
        config, trained = file.config, file.config.trained_length
    else:
        config, trained = load_config(source.path, quantised=True), trained_length(source.path)
    if ours:
        config.set_indexer(options.indexer)  # refused before the weights are loaded
    if options.tokenizer is not None:
        tokenizer = build_tokenizer(options.tokenizer)
    elif source.is_gguf:
        tokenizer = file.tokenizer() if file is not None else gguf_tokenizer(source.path)
    else:
        tokenizer = load_tokenizer(source.path)
    vocabulary = config.get_text_config().vocab_size
    # With added tokens; but transformers adds one of its own to those that a GGUF file holds.
    own = source.is_gguf and options.tokenizer is None
    size = tokenizer.vocab_size if own else len(tokenizer)
    if size > vocabulary:
        raise ValueError(
            f"the tokenizer has {size} tokens, but the vocabulary of {source.path} "
            f"{vocabulary}: give the tokenizer that the model was trained with"
        )
    return Opened(
        source,
        tokenizer,
        positions_of(config),
        trained,
        vocabulary,
        ours,
        backends,
        options.cache_dtype,
        options.indexer,
        file,
        on_gpu,
    )


def announce(source: Source) -> None:
    """Say what is about to be loaded, with its size on disk."""
    path = source.path
    files = [path] if source.is_gguf else [f for f in path.iterdir() if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    rank_zero_info(f"loading {source.name} from {path} ({size / 1e6:,.1f} MB)")
