"""What a subclass has to give is abstract: Python then refuses an instance that lacks it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ic.callbacks.context_length import ContextLength
from ic.config.model import BaseModelConfig
from ic.datamodules.text_stream import TextBatches
from tests.evaluation.oracle import OneByOne, Reader

_ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("kind", "lacking"),
    [
        (BaseModelConfig, "mla_config.*positions.*sizes"),
        (ContextLength, "first_length"),
        (TextBatches, "batches"),
        (OneByOne, "answers"),
        (Reader, "next_character"),
    ],
)
def test_an_unfinished_class_is_refused_at_construction(kind: type, lacking: str) -> None:
    with pytest.raises(TypeError, match=f"abstract class {kind.__name__}.*{lacking}"):
        kind()


def _unfinished(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions that, behind their docstring, do nothing but raise a bare NotImplementedError."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            raised = node.body[-1].exc if isinstance(node.body[-1], ast.Raise) else None
            if isinstance(raised, ast.Name) and raised.id == "NotImplementedError":
                yield node


def test_no_method_waits_to_be_called_to_say_that_it_is_missing() -> None:
    found = [
        f"{path.relative_to(_ROOT)}: {function.name}"
        for folder in ("ic", "callbacks", "datamodules", "kernels", "tests")
        for path in (_ROOT / folder).rglob("*.py")
        if not path.is_symlink()
        for function in _unfinished(ast.parse(path.read_text()))
    ]
    assert found == [], "give the class ABC as a base and the method @abstractmethod"
