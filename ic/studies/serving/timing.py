"""When the tokens of requests came, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass
class RequestTimes:
    """One request.

    Attributes:
        prompt_tokens: of its prompt.
        cached_tokens: those of them that were found in a cache.
        began_s: when it was sent, on any clock.
        arrivals: (time in seconds, tokens that came then), in order.
    """

    prompt_tokens: int
    began_s: float
    cached_tokens: int = 0
    arrivals: list[tuple[float, float]] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def num_tokens(self) -> float:
        return sum(number for _, number in self.arrivals)

    @property
    def time_to_first_s(self) -> float:
        return self.first_s - self.began_s

    @property
    def time_per_token_s(self) -> float:
        """Mean over the tokens after those that came first."""
        return (self.last_s - self.first_s) / (self.num_tokens - self.arrivals[0][1])

    def gaps_s(self) -> list[float]:
        """Times between one arrival and the next."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.arrivals)]


Repeat = Sequence[RequestTimes]


def decode_rate(repeat: Repeat) -> float | None:
    """Tokens per second while all requests have their first token and none has ended; None if that
    was never so.
    """
    begin, end = max(times.first_s for times in repeat), min(times.last_s for times in repeat)
    if begin >= end:
        return None
    found = sum(number for x in repeat for when, number in x.arrivals if begin < when <= end)
    return found / (end - begin)


def prefill_time_s(repeat: Repeat) -> float:
    """Until the last request has its first token."""
    return max(times.first_s for times in repeat) - min(times.began_s for times in repeat)


def summarise(repeats: Sequence[Repeat]) -> dict[str, Any]:
    """The row of a cell. Times are of all requests of all repetitions; rates are the median over
    the repetitions, of which there are `n`.
    """
    every = [times for repeat in repeats for times in repeat]
    rates = [rate for repeat in repeats if (rate := decode_rate(repeat)) is not None]
    row: dict[str, Any] = {"n": len(repeats), "num_requests": len(every)}
    row |= _percentiles("time_to_first_token", [times.time_to_first_s for times in every])
    row |= _percentiles("time_per_output_token", [times.time_per_token_s for times in every])
    row |= _percentiles("inter_token", [gap for times in every for gap in times.gaps_s()])
    read = [sum(x.prompt_tokens - x.cached_tokens for x in repeat) for repeat in repeats]
    prefill = [n / prefill_time_s(repeat) for n, repeat in zip(read, repeats, strict=True)]
    row["decode_tokens_per_s"] = round(statistics.median(rates), 2) if rates else None
    row["output_tokens_per_s"] = round(statistics.median(map(_output_rate, repeats)), 2)
    row["prefill_tokens_per_s"] = round(statistics.median(prefill), 1)
    cached = sum(times.cached_tokens for times in every)
    row["prefix_hit_rate"] = round(cached / sum(times.prompt_tokens for times in every), 4)
    return row


def _output_rate(repeat: Repeat) -> float:
    began = min(times.began_s for times in repeat)
    return sum(x.num_tokens for x in repeat) / (max(x.last_s for x in repeat) - began)


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    shares = np.percentile(values, (50, 95, 99))
    return {
        f"{name}_p{place}_s": float(f"{share:.5g}")
        for place, share in zip((50, 95, 99), shares, strict=True)
    }
