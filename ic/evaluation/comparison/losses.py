"""Two models on the same documents: whose perplexity is lower, at which positions, how sure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ic.evaluation.comparison.answers import Answer
from ic.evaluation.paired import bootstrap_interval, exchange_probability
from ic.evaluation.perplexity.curve import BUCKET, WHOLE, task_name
from ic.evaluation.suite import Row

SURE = 0.05


@dataclass(frozen=True)
class Band:
    """Losses of both models at positions from `from_token` to before `to_token`.

    Attributes:
        n: documents.
        first, second: mean over the documents of each one's mean loss in nats per token.
        low_95, high_95: 95 % interval of `difference`; None for one document.
    """

    from_token: int
    to_token: int
    n: int
    first: float
    second: float
    low_95: float | None
    high_95: float | None

    @property
    def difference(self) -> float:
        """Nats per token that the second loses more than the first."""
        return self.second - self.first

    @property
    def side(self) -> int:
        """On which side of 0 the whole interval lies: -1, 1, or 0 where it holds 0."""
        if self.low_95 is None or self.high_95 is None:
            return 0
        return -1 if self.high_95 < 0 else 1 if self.low_95 > 0 else 0


@dataclass(frozen=True)
class Curve:
    """Documents of a length, read in one way, that are compared as one.

    Attributes:
        task: `full`, or `sliding 4k` with the length of the window.
        whole: all positions.
        bands: the buckets of positions.
        p: probability of a difference of `whole` at least as large between models that do not
            differ.
        p_adjusted: Holm's, for all claims of the comparison.
    """

    suite: str
    task: str
    length_tokens: int
    whole: Band
    bands: Sequence[Band]
    p: float
    p_adjusted: float = 1.0

    @property
    def better(self) -> str | None:
        """`A`, `B`, or None where no difference can be seen; the lower loss is better."""
        if self.p_adjusted >= SURE:
            return None
        return "A" if self.whole.difference > 0 else "B"

    @property
    def columns(self) -> list[Row]:
        """Rows of the results file: all positions, then each band, of which nothing is claimed."""
        return [
            {
                "what": "perplexity comparison",
                "suite": self.suite,
                "task": self.task,
                "length_tokens": self.length_tokens,
                "position": WHOLE if band is self.whole else BUCKET,
                "from_token": band.from_token,
                "to_token": band.to_token,
                "n": band.n,
                "first": math.exp(band.first),
                "second": math.exp(band.second),
                "nll_difference": band.difference,
                "low_95": band.low_95,
                "high_95": band.high_95,
                "p": self.p if band is self.whole else None,
                "p_adjusted": self.p_adjusted if band is self.whole else None,
                "better": self.better if band is self.whole else None,
            }
            for band in (self.whole, *self.bands)
        ]


def has_losses(answer: Answer) -> bool:
    """Whether it holds losses by position instead of a score."""
    return "nats" in answer.measured


def compare_losses(
    suite: str, pairs: Sequence[tuple[Answer, Answer]], seed: int, resamples: int
) -> Iterator[Curve]:
    """A curve for each task and length, tasks in their order, short lengths first.

    Args:
        pairs: documents that both models read.
    """
    parts: dict[tuple[str, int], list[tuple[Answer, Answer]]] = {}
    for pair in pairs:
        task = task_name({**pair[0].measured, "task": pair[0].place["task"]})
        parts.setdefault((task, pair[0].place["length_tokens"]), []).append(pair)
    tasks = list(dict.fromkeys(task for task, _ in parts))
    for task, length in sorted(parts, key=lambda part: (tasks.index(part[0]), part[1])):
        of_part = parts[task, length]
        edges = of_part[0][0].measured["edges"]
        nats_SDE = np.array(
            [[answer.measured["nats"] for answer in side] for side in zip(*of_part, strict=True)]
        )
        spans = [(0, len(edges) - 1), *((i, i + 1) for i in range(len(edges) - 1))]
        found = []
        for begin, end in spans:
            count = edges[end] - edges[begin]
            first_D, second_D = nats_SDE[:, :, begin:end].sum(axis=2) / count
            low, high = _interval(second_D - first_D, seed, resamples) or (None, None)
            means = float(first_D.mean()), float(second_D.mean())
            found.append(Band(edges[begin], edges[end], len(of_part), *means, low, high))
        totals_SD = nats_SDE.sum(axis=2)
        p = exchange_probability(totals_SD[1] - totals_SD[0], seed=seed, resamples=resamples)
        yield Curve(suite, task, length, found[0], found[1:], p)


def _interval(differences_D: np.ndarray, seed: int, resamples: int) -> tuple[float, float] | None:
    """Of their mean; None for one document, which does not tell how others would differ."""
    if len(differences_D) == 1:
        return None
    if np.ptp(differences_D) == 0:  # one model twice
        return float(differences_D[0]), float(differences_D[0])
    return bootstrap_interval(
        differences_D, least=-math.inf, most=math.inf, seed=seed, resamples=resamples
    )
