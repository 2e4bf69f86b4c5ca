"""A source -> model and tokenizer on the device asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.folder import load_config, load_model, trained_length
from ic.checkpoint.gguf_file import GGUFFile
from ic.checkpoint.source import Source, find_source
from ic.checkpoint.weights import DTYPES
from ic.datamodules.tokenizers import build_tokenizer, load_tokenizer
from ic.inference.options import InferenceOptions
from ic.machine.devices import check_accelerator, runnable_backends
from ic.model import MLAForCausalLM
from ic.model.backends import Backends


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for inference, and what is known about it.

    Attributes:
        model: in evaluation mode, on its device, in its precision.
        tokenizer: the one that it was trained with.
        name: what pictures and tables call it.
        trained_length: longest context in tokens that it was trained at, if the source tells.
        folder: the checkpoint folder that the source stands for; of a GGUF file a folder of its
            name beside it, for results.
    """

    model: MLAForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    trained_length: int | None
    folder: Path


def load_source(options: InferenceOptions) -> Loaded:
    """Load the model and tokenizer of a source.

    The precision `auto` is bfloat16 on a GPU (float16 below sm_80) and the saved type on a CPU.

    Raises:
        ValueError: the source cannot be loaded, or this machine lacks the accelerator.
    """
    check_accelerator(options.accelerator)
    on_gpu = torch.cuda.is_available() and options.accelerator != "cpu"
    backends: Backends = options.backends()
    if backends.precision == "auto" and on_gpu:
        backends = replace(backends, precision="bfloat16")
    backends = runnable_backends(backends, options.accelerator)
    source = find_source(options.checkpoint)
    announce(source)
    file = GGUFFile(source.path) if source.is_gguf else None
    trained = trained_length(source.path) if file is None else file.config.trained_length
    if options.tokenizer is not None:  # before the weights, which take longer
        tokenizer = build_tokenizer(options.tokenizer)
    else:
        tokenizer = load_tokenizer(source.path) if file is None else file.tokenizer()
    vocabulary = (load_config(source.path) if file is None else file.config).vocab_size
    # With added tokens; but transformers adds one of its own to those that a GGUF file holds.
    own = file is not None and options.tokenizer is None
    size = tokenizer.vocab_size if own else len(tokenizer)
    if size > vocabulary:
        raise ValueError(
            f"the tokenizer has {size} tokens, but the vocabulary of {source.path} "
            f"{vocabulary}: give the tokenizer that the model was trained with"
        )
    model: Any  # transformers wraps `to` past its types
    dtype = DTYPES.get(backends.precision)  # of auto, the saved one
    model = load_model(source.path, backends) if file is None else file.model(backends, dtype)
    model = model if dtype is None else model.to(dtype)
    model = model.to("cuda" if on_gpu else "cpu")
    return Loaded(model, tokenizer, source.name, trained, source.folder)


def announce(source: Source) -> None:
    """Say what is about to be loaded, with its size on disk."""
    path = source.path
    files = [path] if source.is_gguf else [f for f in path.iterdir() if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    rank_zero_info(f"loading {source.name} from {path} ({size / 1e6:,.1f} MB)")
