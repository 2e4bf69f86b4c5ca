"""What differs between the folders of two runs that should have done the same."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ic.checkpoint.folder import read_trainer_state, read_weights
from ic.checkpoint.storage import MODEL, OPTIMIZER, ShardReader, is_sharded, read_tensors
from ic.files.json_lines import read_rows
from ic.files.run_folder import RunFolder

# Ends of keys whose values differ from run to run: what a clock or the machine's memory says, how
# many steps a process could time, and which steps a memory profile was taken at.
MEASURED = ("seconds", "_s", "_gib", "mfu", "data_wait_share", "_timed", "_interrupted")
MEASURED += ("date", "command", "ckpt_path", "_bytes", "num_measured", ".step")


def differences(expected: Path, got: Path) -> list[str]:
    """Each thing that differs, in words; nothing if `got` ended as the undisturbed run did."""
    runs = RunFolder(expected), RunFolder(got)
    found = [
        *_compare(*(_names(run.path) for run in runs), "files"),
        *_compare(*(_links(run) for run in runs), "links"),
    ]
    if found:
        return found
    for step in runs[0].saved_steps():
        folders = [run.checkpoint(step) for run in runs]
        found += _compare(*(_checkpoint(folder) for folder in folders), folders[1].name)
    found += _compare(*(_metrics(run.metrics) for run in runs), "metrics.csv")
    for path in sorted(_names(expected)):
        files = expected / path, got / path
        if path.endswith(".json") and "checkpoints/" not in path:
            found += _compare(*(json.loads(file.read_text()) for file in files), path)
        elif path.endswith(".jsonl"):
            found += _compare(*(_cells(file) for file in files), path)
    configs = [yaml.safe_load(run.config.read_text()) for run in runs]
    return [*found, *_compare(*configs, "config.yaml")]


def _names(folder: Path) -> list[str]:
    """Every file and link below a run's folder; TensorBoard's carry times and process ids."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(path for path in paths if not path.startswith("tensorboard/"))


def _links(run: RunFolder) -> dict[str, str]:
    return {p.name: os.readlink(p) for p in run.checkpoints.iterdir() if p.is_symlink()}


def _checkpoint(folder: Path) -> dict[str, Any]:
    """Weights, optimizer, generators and everything else of a checkpoint's state."""
    state = read_trainer_state(folder)
    # Lightning, which would skip the validation of the step it continues from, counts it as done.
    del state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    for callback in state["callbacks"].values():
        if "history" in callback:  # of the context length: step, length, seconds
            callback["history"] = [row[:2] for row in callback["history"]]
    state["callbacks"].get("Throughput", {}).pop("steps", None)  # seconds
    if is_sharded(folder):
        reader = ShardReader(folder)
        state["weights"] = read_tensors(reader, MODEL)
        state["optimizer_tensors"] = read_tensors(reader, OPTIMIZER)
    else:
        state["weights"] = read_weights(folder)
    return state


def _metrics(file: Path) -> list[dict[str, str]]:
    """The rows that hold more than measurements, in order of their steps."""
    with file.open(newline="") as lines:
        rows = [
            {key: value for key, value in row.items() if value and not key.endswith(MEASURED)}
            for row in csv.DictReader(lines)
        ]
    rows = [row for row in rows if row.keys() - {"step", "epoch"}]
    return sorted(rows, key=lambda row: (int(row["step"]), sorted(row)))


def _cells(file: Path) -> list[dict[str, Any]]:
    """The rows, sorted: ranks share the cells, and append as they end."""
    return sorted(read_rows(file), key=lambda row: json.dumps({**row, "seconds": 0}))


def _compare(expected: Any, got: Any, where: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in {**expected, **got}:
            if f"{where}.{key}".endswith(MEASURED):
                continue
            if key not in got or key not in expected:
                yield f"{where}.{key} is {'missing' if key not in got else 'new'}"
            else:
                yield from _compare(expected[key], got[key], f"{where}.{key}")
    elif isinstance(expected, Tensor) and isinstance(got, Tensor):
        if not torch.equal(expected, got):
            yield f"{where}: other values"
    elif isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        if len(expected) != len(got):
            few, many = sorted((expected, got), key=len)
            extra = [item for item in many if item not in few] if _plain(many) else ""
            yield f"{where}: {len(expected)} expected, got {len(got)}; only in one: {extra}"
        else:
            for index, pair in enumerate(zip(expected, got, strict=True)):
                yield from _compare(*pair, f"{where}[{index}]")
    elif expected != got:
        yield f"{where}: {expected!r} expected, got {got!r}"


def _plain(items: Any) -> bool:
    return all(not isinstance(item, Tensor) for item in items)
