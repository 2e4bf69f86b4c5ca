"""transformers' test classes, imported from where `source.py` put them."""

from __future__ import annotations

import sys
import unittest
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from transformers.models.auto import modeling_auto

from tests.upstream.generation import GenerationContracts
from tests.upstream.source import FOLDER, PACKAGE, is_there

if not is_there():
    pytest.skip(
        f"transformers' own tests are not in {FOLDER}; `make upstream` downloads them",
        allow_module_level=True,
    )


class NoExporters:
    """In place of the tests of transformers' exporters, which the source distribution lacks."""


def _provide(name: str, **members: Any) -> None:
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__dict__.update(members)
    sys.modules[module.__name__] = module


# The source distribution has no folders below `tests`, from which its files import these two.
for folder in ("exporters", "generation"):
    _provide(folder)
_provide("exporters.test_export", ExportTesterMixin=NoExporters)
_provide("generation.test_utils", GenerationTesterMixin=GenerationContracts)
sys.path.insert(0, str(FOLDER))
ModelTesterMixin: Any = import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
TokenizerTesterMixin: Any = import_module(
    f"{PACKAGE}.test_tokenization_common"
).TokenizerTesterMixin
TrainingTesterMixin: Any = import_module(f"{PACKAGE}.test_training_mixin").TrainingTesterMixin
# Their tests ask these lists what a class is for, which labels it takes for example.
modeling_auto.MODEL_MAPPING_NAMES["infinite_context"] = "MLAModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["infinite_context"] = "MLAForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["infinite_context"] = (
    "MLAForSequenceClassification"
)


def except_for(reasons: dict[str, str]) -> Any:
    """A class decorator: skip these tests, each for its reason.

    Raises:
        ValueError: a name of no test, so that the list does not outlive what it speaks of.
    """

    def mark(cls: Any) -> Any:
        for name, reason in reasons.items():
            if not hasattr(cls, name):
                raise ValueError(f"{cls.__name__} has no {name}: take it off the exceptions")
            setattr(cls, name, unittest.skip(f"excepted: {reason}")(lambda self: None))
        return cls

    return mark
