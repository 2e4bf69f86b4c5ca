"""The MLA language model.

Importing it registers the classes and the byte tokenizer with `transformers`, so that its Auto
classes load them. Below the command line (`ic.startup`) that waits until a class is asked for,
because the options in this folder are read before PyTorch is loaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ic.model.cache import LatentCache
    from ic.model.classification import MLAForSequenceClassification
    from ic.model.config import MLAConfig
    from ic.model.modeling_mla import MLAForCausalLM, MLAModel

__all__ = ["LatentCache", "MLAConfig", "MLAForCausalLM", "MLAForSequenceClassification", "MLAModel"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ic.model import byte_tokenizer, classification, modeling_mla  # noqa: F401

        home = classification if name == "MLAForSequenceClassification" else modeling_mla
        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "ic.startup" not in sys.modules:
    __getattr__("MLAForCausalLM")
