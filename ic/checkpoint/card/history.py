"""Where a model comes from: the stages that made it, oldest first, as far as files tell.

    a run's checkpoint    its config.yaml, results.json, throughput.json and csv/metrics.csv; then
                          whatever its `model.init_from` stands for
    an export             the stages in its model_card.json
    a conversion          its conversion.json
    a quantisation        the stages of its source, and its quantization.json
    another folder        its name, and what its own README.md says of licence and base model
    a GGUF file           its metadata

A stage is a dictionary that JSON can hold, and is made publishable here.
"""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ic.checkpoint.card.files import CARD_FACTS
from ic.checkpoint.card.outside import folder_source, gguf_source
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.source import Source, find_source
from ic.files.publishable import publishable, published_command, published_path
from ic.files.results import read_json
from ic.files.run_folder import RunFolder, run_of, saved_step
from ic.files.saved_config import read_config

CONVERSION, QUANTISATION = "conversion.json", "quantization.json"
_SHOWN_FILES = 20
_OF_A_CONVERSION = (
    "family",
    "form",
    "original",
    "geometry",
    "calibration",
    "converted_on",
    "seconds",
    "commit",
    "date",
    "device",
    "versions",
)
_OF_A_QUANTISATION = (
    *("scheme", "rounding", "calibration", "cache", "cache_is_balanced"),
    *("kept", "bytes_before", "bytes_after"),
    *("seconds", "commit", "date", "device", "versions"),
)
Stage = dict[str, Any]


def stages_of(source: Source) -> list[Stage]:
    """The stages that made a source, oldest first.

    The first one is of kind `source` where weights came from outside, and `missing` where a run
    names weights that are no longer there.
    """
    return _stages(source, [])


def _stages(source: Source, seen: list[Path]) -> list[Stage]:
    path = source.path.resolve()
    if path in seen:  # a run that was copied over the one it began with
        return [{"kind": "missing", "name": published_path(str(path))}]
    seen = [*seen, path]
    if source.is_gguf:
        return [gguf_source(path)]
    run = run_of(path)
    if run is not None and run.config.is_file():
        config = _config(run)
        return [*_before(run, config, seen), _training(run, config, saved_step(path))]
    if stages := saved(path / CARD_FACTS).get("stages"):
        return list(stages)
    if (path / CONVERSION).is_file():
        return [conversion_stage(path)]
    return [folder_source(path)]


def conversion_stage(folder: Path) -> Stage:
    """What a conversion says of itself, with the errors of its layers in three numbers."""
    found = saved(folder / CONVERSION)
    errors = [row["output_error"] for row in found.get("rows", []) if "output_error" in row]
    files = found.get("calibration_files")
    return {
        "kind": "conversion",
        **publishable({key: found.get(key) for key in _OF_A_CONVERSION}),
        "name": published_path(str(found.get("source"))),
        "files": {"calibration": files} if files else {},
        "command": published_command(str(found.get("command"))),
        "output_error": {"mean": sum(errors) / len(errors), "most": max(errors)}
        if errors
        else None,
    }


def quantisation_stage(folder: Path) -> Stage:
    """What a quantisation says of itself, with the errors of its layers in two numbers."""
    found = saved(folder / QUANTISATION)
    errors = [row["relative_error"] for row in found.get("rows", [])]
    return {
        "kind": "quantisation",
        **publishable({key: found.get(key) for key in _OF_A_QUANTISATION}),
        "name": published_path(str(found.get("source"))),
        "command": published_command(str(found.get("command"))),
        "files": {"calibration": files} if (files := found.get("calibration_files")) else {},
        "layers": len(errors),
        "relative_error": {"mean": sum(errors) / len(errors), "most": max(errors)}
        if errors
        else None,
    }


def _before(run: RunFolder, config: Mapping[str, Any], seen: list[Path]) -> list[Stage]:
    """The stages of what a run began with; none if that was random weights."""
    given = (config.get("model") or {}).get("init_from")
    if given is None:
        return []
    for base in _bases(run, config):
        try:
            return _stages(find_source(base / given), seen)
        except CheckpointError:
            continue
    return [{"kind": "missing", "name": published_path(str(given))}]


def _bases(run: RunFolder, config: Mapping[str, Any]) -> list[Path]:
    """Folders that the relative paths of a run may start from: where it ran, and here."""
    output = Path(str(config.get("output_dir") or "runs"))
    parents = run.path.resolve().parents
    above = 1 + len(output.parts)  # <root>/<output_dir>/<name>/<run_id>
    root = [] if output.is_absolute() or len(parents) <= above else [parents[above]]
    return [*root, Path.cwd()]


def _training(run: RunFolder, config: Mapping[str, Any], step: int) -> Stage:
    results, speed = saved(run.results), saved(run.throughput)
    data, optimizer = config.get("data") or {}, config.get("optimizer") or {}
    trainer = config.get("trainer") or {}
    last = speed.get("last_step") == step
    bases = _bases(run, config)
    teacher = (config.get("distillation") or {}).get("teacher")
    preference = config.get("preference") or {}
    return {
        "kind": "training",
        "run": f"{run.path.resolve().parent.name}/{run.path.resolve().name}",
        "step": step,
        "from": published_path(str(config["model"]["init_from"]))
        if (config.get("model") or {}).get("init_from")
        else None,
        "adapter": publishable((config.get("model") or {}).get("adapter")),
        "data": data.get("name"),
        "files": {
            key: data_files(value, bases)
            for key, value in data.items()
            if key.endswith("files") and isinstance(value, list) and value
        },
        "context_length_tokens": data.get("context_length"),
        "preference": publishable(preference.get("loss_type")),
        "teacher": None if teacher is None else published_path(str(teacher)),
        "optimizer": publishable({key: optimizer.get(key) for key in ("name", "lr")}),
        "precision": trainer.get("precision"),
        "seed": config.get("seed"),
        # Of a checkpoint from the middle of a run nothing counted the tokens.
        "tokens_seen": speed.get("tokens_seen") if last else None,
        "num_devices": speed.get("num_devices"),
        "losses": losses(run, step),
        "command": None if not results else published_command(str(results.get("command"))),
        **{
            key: publishable(results.get(key))
            for key in ("commit", "date", "device", "versions", "status")
        },
    }


def losses(run: RunFolder, step: int) -> dict[str, float]:
    """The last value that was logged up to a step of each of `val/`, and of those below `train/`
    that also stand below `val/`, or are the loss.
    """
    found: dict[str, float] = {}
    if not run.metrics.is_file():
        return found
    with run.metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            # The logger counts steps from 0: the row of the first one is 0.
            if not (row.get("step") or "").isdigit() or int(row["step"]) >= step:
                continue
            found |= {
                key: value for key, text in row.items() if (value := _number(text)) is not None
            }
    held_out = {key.removeprefix("val/") for key in found if key.startswith("val/")} | {"loss"}
    return {
        key: value
        for key, value in sorted(found.items())
        if key.partition("/")[0] in ("train", "val") and key.partition("/")[2] in held_out
    }


def _number(text: Any) -> float | None:
    """A finite number of a file that may still be written to."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def data_files(patterns: list[Any], bases: list[Path]) -> dict[str, Any]:
    """Names and sizes of data files, `{"named": [...], "num_files": n, "bytes": ...}`; sizes are
    None where the files are no longer there.

    Args:
        patterns: paths, globs or `bundled:NAME`.
        bases: folders that relative ones may start from; the first that has any counts.
    """
    named: list[dict[str, Any]] = []
    for pattern in map(str, patterns):
        if pattern.startswith("bundled:"):
            named.append({"name": pattern, "bytes": None})
            continue
        found = next(
            (paths for base in bases if (paths := sorted(glob.glob(str(base / pattern))))), []
        )
        named += [{"name": Path(path).name, "bytes": _size(Path(path))} for path in found] or [
            {"name": published_path(pattern), "bytes": None}
        ]
    sizes = [each["bytes"] for each in named]
    return {
        "named": publishable(named[:_SHOWN_FILES]),
        "num_files": len(named),
        "bytes": None if None in sizes else sum(sizes),
    }


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _config(run: RunFolder) -> dict[str, Any]:
    try:
        return read_config(run.config)
    except ValueError:  # the checkpoint is whole without it, and so is an export
        return {}


def saved(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file, or it is damaged."""
    try:
        found = read_json(file)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
