"""Suites by their names.

A suite is a folder of `ic/evaluation` with two files. `grid.py` holds the dataclass `Config`, which
checks the suite's options; it imports neither PyTorch nor NumPy, so that help and errors come at
once. `suite.py` holds `build(config)`. `conf/suite/NAME.yaml` makes it known to the command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ic.errors import UsageError

if TYPE_CHECKING:
    from ic.evaluation.suite import Suite


def suite_names() -> list[str]:
    """Every suite, in the order of the alphabet."""
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/suite.py"))


def suite_config(name: str) -> type:
    """The dataclass of a suite's options.

    Raises:
        UsageError: there is no such suite.
    """
    config: type = _module(name, "grid").Config
    return config


def check_chosen(suites: Mapping[str, Any]) -> None:
    """Refuse options of a suite that nobody chose.

    Raises:
        ValueError: naming the suite and how to choose it.
    """
    for name, options in suites.items():
        if isinstance(options, Mapping):  # of a suite that was chosen they have its dataclass
            keys = ", ".join(f"suite.{name}.{key}" for key in options) or f"suite.{name}"
            chosen = ",".join([*(each for each in suites if each != name), name])
            raise ValueError(f"{keys}: the suite {name} is not chosen; add it: suite=[{chosen}]")


def build_suite(name: str, config: Any = None) -> Suite[Any]:
    """A suite with its options, by default those of its dataclass.

    Raises:
        UsageError: there is no such suite.
    """
    options = suite_config(name)() if config is None else config
    suite: Suite[Any] = _module(name, "suite").build(options)
    return suite


def _module(name: str, file: str) -> ModuleType:
    if name not in suite_names():
        raise UsageError.unknown("suite", name, suite_names())
    return importlib.import_module(f"ic.evaluation.{name}.{file}")
