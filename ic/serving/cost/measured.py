"""Throughput that was measured: rows of results files, each with the file it stands in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ic.errors import UsageError
from ic.files.results import read_json
from ic.machine.gpus import GPUS, find_gpu

_DEVICE = re.compile(r"(?:(\d+) x )?(.+)")


@dataclass(frozen=True)
class ServingRate:
    """A cell of `benchmark serving`: so many requests at once at one context.

    Attributes:
        file: that it stands in.
        gpu: the type, as prices name it.
        gpus: that were in use.
        prefill_tokens_per_s, decode_tokens_per_s: of all requests together; None where the cell
            could not tell.
        answer_tokens_per_s: tokens of answers over the whole time, the prompts' included.
    """

    file: str
    gpu: str
    gpus: int
    model: str
    context_tokens: int
    batch: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    answer_tokens_per_s: float
    first_token_p95_s: float
    per_token_p95_s: float


@dataclass(frozen=True)
class TrainingRate:
    """What `fit` or `scaling` measured of one run at one context."""

    file: str
    gpu: str
    gpus: int
    model: str
    context_tokens: int
    tokens_per_s: float


def read_rates(
    results: Sequence[str], model: str | None
) -> tuple[list[ServingRate], list[TrainingRate]]:
    """Every measurement on a GPU whose type is known.

    Args:
        results: files, or folders of them.
        model: what must be in the model's name.

    Raises:
        UsageError: no such file or folder, or nothing that measured throughput on a known GPU.
        ValueError: a file that is no JSON, or a measurement that lacks a number.
    """
    serving: list[ServingRate] = []
    training: list[TrainingRate] = []
    for file in _files(results):
        try:
            content: Any = read_json(file)
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            continue
        serving += _serving(file, content)
        training += _training(file, content)
    if model is not None:
        serving = [rate for rate in serving if model in rate.model]
        training = [rate for rate in training if model in rate.model]
    if not serving and not training:
        of = f" of a model with {model!r} in its name" if model else ""
        raise UsageError(
            f"results={list(results)}: no measurement{of} on a GPU of {', '.join(GPUS)}; measure "
            "with python -m ic benchmark serving, scaling or fit"
        )
    return serving, training


def _files(results: Sequence[str]) -> Iterator[Path]:
    for given in results:
        path = Path(given)
        if path.is_dir():
            yield from sorted(path.glob("*.json"))
        elif path.is_file():
            yield path
        else:
            raise UsageError(f"results: {given}: no such file or folder")


def _serving(file: Path, content: dict[str, Any]) -> Iterator[ServingRate]:
    config = _config(content)
    if config.get("url") is not None:
        return  # the device is the client's: which one served is not known
    gpu, gpus = _gpu(content.get("device"))
    for row in content["rows"]:
        if gpu is None or not isinstance(row, dict) or "output_tokens_per_s" not in row:
            continue
        yield ServingRate(
            str(file),
            gpu,
            gpus,
            Path(str(config.get("checkpoint"))).name,
            int(_number(file, row, "context_tokens")),
            int(_number(file, row, "batch")),
            _rate(file, row, "prefill_tokens_per_s"),
            _rate(file, row, "decode_tokens_per_s"),
            _number(file, row, "output_tokens_per_s"),
            _number(file, row, "time_to_first_token_p95_s"),
            _number(file, row, "time_per_output_token_p95_s"),
        )


def _training(file: Path, content: dict[str, Any]) -> Iterator[TrainingRate]:
    name = _config(content).get("name")
    for row in content["rows"]:
        if not isinstance(row, dict) or not row.get("tokens_per_s"):
            continue
        if row.get("what") == "training":  # of a run
            gpu, gpus = _gpu(content.get("device"))
            model = str(name)
        elif row.get("status") == "measured":  # of a scaling study
            gpu = _gpu(row.get("device"))[0]
            gpus = 0 if gpu is None else int(_number(file, row, "num_gpus"))
            overrides = [str(each) for each in row.get("overrides") or []]
            chosen = [each for each in overrides if each.startswith("model=")]
            model = f"{chosen[0].partition('=')[2] if chosen else '?'}, {row.get('name')}"
        else:
            continue
        if gpu is not None:
            context = int(_number(file, row, "context_length_tokens"))
            tokens_per_s = _number(file, row, "tokens_per_s")
            yield TrainingRate(str(file), gpu, gpus, model, context, tokens_per_s)


def _config(content: dict[str, Any]) -> dict[str, Any]:
    config = content.get("config")
    return config if isinstance(config, dict) else {}


def _rate(file: Path, row: dict[str, Any], name: str) -> float | None:
    """A column that a cell may leave empty."""
    return None if row.get(name) is None else _number(file, row, name)


def _number(file: Path, row: dict[str, Any], name: str) -> float:
    """Raises:
    ValueError: a measurement without this number.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(
            f"{file}: a measurement has {name}={value!r}, which must be a number of at least 0; "
            "measure again, or leave the file out of results"
        )
    return value


def _gpu(device: Any) -> tuple[str | None, int]:
    """`4 x NVIDIA H200` -> (h200, 4); no type for what is none that is known."""
    match = _DEVICE.fullmatch(str(device))
    found = find_gpu(match[2]) if match else None
    name = next((name for name, gpu in GPUS.items() if gpu is found), None)
    return name, int(match[1] or 1) if match else 1
