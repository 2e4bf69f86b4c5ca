"""The MLA language model.

Its classes, and PyTorch with them, are imported when first asked for, so that the options in this
folder are read without them. The first of them registers all with `transformers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ic.model.cache import LatentCache
    from ic.model.classification import MLAForSequenceClassification
    from ic.model.config import MLAConfig
    from ic.model.modeling_mla import MLAForCausalLM, MLAModel

__all__ = ["LatentCache", "MLAConfig", "MLAForCausalLM", "MLAForSequenceClassification", "MLAModel"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ic.model import classification, modeling_mla

        home = classification if name == "MLAForSequenceClassification" else modeling_mla
        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
