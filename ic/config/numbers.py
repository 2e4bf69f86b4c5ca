"""What numbers a configuration may hold, checked over the whole schema before any of it is used.

Every number is finite, and every whole number a count that a run could come to. `LARGEST` says less
where a library or a machine takes less. What a field means on top of that, the least it may be
included, is checked by its own dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf

from ic.errors import UsageError

# More than the tokens of any training: a float holds it exactly, and so does every int64.
LARGEST_COUNT = 2**50
# The first pattern that fits a key counts.
LARGEST: dict[str, int] = {
    "*seed": 2**32 - 1,  # NumPy's generator takes no more
    "*seeds": 2**32 - 1,
    "*_s": 10**9,  # 30 years; a timer takes no infinite time
    "*num_workers": 1024,  # processes
    "*jobs": 1024,
    "*jobs_per_gpu": 1024,
    "*num_gpus": 2**20,
    "*num_nodes": 2**16,
    "*context_parallel_size": 2**16,
    "*entries": 2**31 - 1,  # CUDA's history of allocations counts in int32
    "trainer.accumulate_grad_batches": 2**20,
    "trainer.val_check_interval": 2**30,
    "data.num_streams": 2**12,  # open files
    "model.num_*": 2**12,
    "model.*_size": 2**20,
    "model.*_rank": 2**16,
    "model.*_dim": 2**16,
    "model.adapter.r": 2**16,
    "*samples*": 2**24,
    "*num_needles": 2**10,
    "*num_distractors": 2**16,
    "*max_position*": 2**31 - 1,  # positions and document ids are int32
    "*context_length": 2**31 - 1,
    "*tokens*": 2**31 - 1,
    "*lengths": 2**31 - 1,
}


def check_numbers(cfg: DictConfig) -> None:
    """Refuse a number that is not finite, or beyond what its field can mean.

    Raises:
        UsageError: names the key, the value and what is allowed.
    """
    for key, path, value in _numbers(cfg):
        if not math.isfinite(value):
            raise UsageError(f"{path}={value}: must be a finite number")
        most = next((most for name, most in LARGEST.items() if fnmatchcase(key, name)), None)
        if most is None and isinstance(value, int):
            most = LARGEST_COUNT
        if most is not None and abs(value) > most:
            raise UsageError(f"{path}={_short(value)}: must be at most {most}")


def _short(value: float) -> str:
    text = str(value) if isinstance(value, float) else format(value, "d")
    return text if len(text) <= 40 else f"{text[:20]}...{text[-4:]} ({len(text)} digits)"


def _numbers(node: Any, key: str = "", path: str = "") -> Iterator[tuple[str, str, float]]:
    """Every number with the key of the field that holds it, and the path to itself."""
    if isinstance(node, Container):
        if node._is_none() or node._is_missing():
            return
        entries = range(len(node)) if OmegaConf.is_list(node) else list(node)  # type: ignore[arg-type]
        of_field = is_dataclass(OmegaConf.get_type(node))
        for entry in entries:
            child = node._get_node(entry)
            if child is None or child._is_interpolation() or child._is_missing():  # type: ignore[union-attr]
                continue  # said of the key that it refers to, or when the whole is made
            inner = f"{key}.{entry}".lstrip(".") if of_field else key
            outer = f"{path}.{entry}".lstrip(".")
            yield from _numbers(child, inner, path if OmegaConf.is_list(node) else outer)
    elif isinstance(value := node._value(), int | float) and not isinstance(value, bool):
        yield key, path, value
