"""A checkpoint folder -> model and tokenizer on the device asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ic.checkpoint.folder import load_model
from ic.machine.devices import _resolve, check_accelerator
from ic.model import MLAForCausalLM
from ic.model.backends import Backends

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_for_inference(
    checkpoint: str, accelerator: str, backends: Backends
) -> tuple[MLAForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint folder on the device asked for.

    The precision `auto` is bfloat16 on a GPU (float16 below sm_80) and the saved type on a CPU.
    """
    check_accelerator(accelerator)
    on_gpu = torch.cuda.is_available() and accelerator != "cpu"
    if backends.precision == "auto" and on_gpu:
        backends = replace(backends, precision="bfloat16")
    backends = _resolve(backends, accelerator)
    folder = Path(checkpoint)
    model: Any = load_model(folder, backends)  # transformers wraps `to` past its types
    if backends.precision != "auto":
        model = model.to(DTYPES[backends.precision])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.to("cuda" if on_gpu else "cpu"), tokenizer
