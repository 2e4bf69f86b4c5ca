"""Suites by their names.

A suite is a folder of `ic/evaluation`, found by its file `suite.py`: that holds the dataclass
`Config`, which checks the suite's options, and `build(config)`. Neither may import PyTorch before a
sample is asked for, so that help and errors come at once. `conf/suite/NAME.yaml` makes it known to
the command line.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ic.errors import UsageError
from ic.evaluation.suite import Suite


def suite_names() -> list[str]:
    """Every suite, in the order of the alphabet."""
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/suite.py"))


def suite_config(name: str) -> type:
    """The dataclass of a suite's options.

    Raises:
        UsageError: there is no such suite.
    """
    config: type = _module(name).Config
    return config


def build_suite(name: str, config: Any = None) -> Suite[Any]:
    """A suite with its options, by default those of its dataclass.

    Raises:
        UsageError: there is no such suite.
    """
    module = _module(name)
    suite: Suite[Any] = module.build(module.Config() if config is None else config)
    return suite


def _module(name: str) -> ModuleType:
    if name not in suite_names():
        raise UsageError.unknown("suite", name, suite_names())
    return importlib.import_module(f"ic.evaluation.{name}.suite")
