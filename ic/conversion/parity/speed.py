"""How fast two models read a prompt and go on from it: batch 1, in turn, on the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ic.conversion.parity.options import ParityConfig
from ic.conversion.parity.pair import Pair, Side
from ic.inference.caches import new_cache, piece_tokens

Row = dict[str, Any]


def speed_rows(
    config: ParityConfig, pair: Pair, on_measurement: Callable[[int], None] = lambda _: None
) -> list[Row]:
    """A row for each length of the cache: tokens per second, the median and the range of several.

    The two models take turns, so that what else the machine does meets both alike; each is warmed
    up by a measurement that does not count. Lengths beyond the original's positions are the
    converted model's alone.
    """
    rows: list[Row] = []
    for tokens in sorted(config.speed_tokens):
        sides = sides_at(config, pair, tokens)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for repeat in range(config.speed_repeats + 1):
            for name, side in sides.items():
                seconds = _measure(side.model, tokens, config)
                if repeat:
                    found[name].append(seconds)
                on_measurement(1)
        row: Row = {
            "what": "speed",
            "cache_tokens": tokens,
            "batch": 1,
            "decode_tokens": config.decode_tokens,
            "n": config.speed_repeats,
            "device": _device(pair.converted),
            "dtype": str(pair.converted.model.dtype).removeprefix("torch."),
        }
        for name in pair.sides:
            prefill, decode = zip(*found[name], strict=True) if name in found else ((), ())
            row |= _rates(f"prefill_tokens_per_s_{name}", tokens, prefill)
            row |= _rates(f"decode_tokens_per_s_{name}", config.decode_tokens, decode)
        for phase in ("prefill", "decode"):
            first, second = (row[f"{phase}_tokens_per_s_{name}"] for name in pair.sides)
            row[f"{phase}_ratio"] = None if first is None else second / first
        rows.append(row)
    return rows


def measurements(config: ParityConfig, pair: Pair) -> int:
    """How many there are, those included that do not count."""
    sides = sum(len(sides_at(config, pair, tokens)) for tokens in config.speed_tokens)
    return sides * (config.speed_repeats + 1)


def sides_at(config: ParityConfig, pair: Pair, tokens: int) -> dict[str, Side]:
    """The models that have the positions."""
    needed = tokens + config.decode_tokens
    return {name: side for name, side in pair.sides.items() if side.positions >= needed}


@torch.no_grad()
def _measure(model: Any, tokens: int, config: ParityConfig) -> tuple[float, float]:
    """Seconds to read a prompt of so many tokens, and to decode behind it."""
    vocabulary = model.config.get_text_config().vocab_size
    # What the tokens are makes no difference to the time.
    ids = torch.arange(tokens + config.decode_tokens, device=model.device)[None] % vocabulary
    cache = new_cache(model, tokens + config.decode_tokens)
    piece = piece_tokens(model, config.prefill_chunk_tokens, tokens)
    began = _now(model)
    for chunk in ids[:, :tokens].split(piece, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    read = _now(model)
    for chunk in ids[:, tokens:].split(1, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return read - began, _now(model) - read


def _now(model: Any) -> float:
    """The time once everything that was asked of the device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _rates(name: str, tokens: int, seconds: tuple[float, ...]) -> Row:
    rates = [tokens / each for each in seconds]
    return {
        name: statistics.median(rates) if rates else None,
        f"{name}_least": min(rates, default=None),
        f"{name}_most": max(rates, default=None),
    }


def _device(side: Side) -> str:
    if side.model.device.type == "cuda":
        return str(torch.cuda.get_device_name(side.model.device))
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"
