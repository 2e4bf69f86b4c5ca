"""How a verb loads a model. Imports no PyTorch, so that help and errors come at once."""

from __future__ import annotations

from dataclasses import dataclass

from ic.errors import check_choice
from ic.model.backends import Backends
from ic.model.indexer_options import INDEXER_CHOICES
from ic.model.options import CACHE_DTYPES

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


@dataclass
class LoadOptions:
    """How a model is loaded, whatever its source: the device, the precision, the kernels.

    Attributes:
        tokenizer: `bytes`, or a folder that holds the tokenizer; null is the source's own.
        accelerator: auto (a GPU if there is one), cpu or gpu.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU (float16 below sm_80) and the
            saved type on a CPU.
        cache_dtype: what the cache of a model of ours holds: fp8 or int8 for codes of one byte with
            a scale per token; auto is what the source was saved with, else the model's precision.
        indexer: of a model of ours with an indexer: `sparse` attends to what it chooses, `dense` to
            all; auto is what the source was saved with.
        attention, norm, rope: names of backends (`ic.model.registry`), each on its own.

    Raises:
        ValueError: an unknown choice.
    """

    tokenizer: str | None = None
    accelerator: str = "auto"
    dtype: str = "auto"
    cache_dtype: str = "auto"
    indexer: str = "auto"
    attention: str = "torch"
    norm: str = "torch"
    rope: str = "torch"

    def __post_init__(self) -> None:
        check_choice("accelerator", self.accelerator, ACCELERATORS)
        check_choice("dtype", self.dtype, DTYPE_NAMES)
        check_choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        check_choice("indexer", self.indexer, INDEXER_CHOICES)
        self.backends()

    def backends(self) -> Backends:
        """The switches above, checked."""
        return Backends(self.attention, self.norm, self.rope, self.dtype)


@dataclass
class _Checkpoint:
    """The source; a class of its own because help shows the fields of the last base first."""

    checkpoint: str = "???"


@dataclass
class InferenceOptions(LoadOptions, _Checkpoint):
    """How a verb loads its model: the source, the device, the precision, the kernels.

    Attributes:
        checkpoint: the source of the model, in any form that `ic.checkpoint.source` knows.

    Raises:
        ValueError: an unknown choice.
    """
