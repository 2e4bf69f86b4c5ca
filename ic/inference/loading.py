"""A source -> model and tokenizer on the device asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ic.checkpoint.folder import load_model, trained_length
from ic.checkpoint.source import shown_name
from ic.datamodules.tokenizers import load_tokenizer
from ic.inference.options import InferenceOptions
from ic.machine.devices import _resolve, check_accelerator
from ic.model import MLAForCausalLM
from ic.model.backends import Backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for inference, and what is known about it.

    Attributes:
        model: in evaluation mode, on its device, in its precision.
        tokenizer: the one that it was trained with.
        name: what pictures and tables call it.
        trained_length: longest context in tokens that it was trained at, if the source tells.
        folder: the checkpoint folder that the source stands for.
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
    backends = _resolve(backends, options.accelerator)
    folder = Path(options.checkpoint)
    model: Any = load_model(folder, backends)  # transformers wraps `to` past its types
    if backends.precision != "auto":
        model = model.to(DTYPES[backends.precision])
    return Loaded(
        model=model.to("cuda" if on_gpu else "cpu"),
        tokenizer=load_tokenizer(folder),
        name=shown_name(folder),
        trained_length=trained_length(folder),
        folder=folder,
    )
