"""An experiment in words and as lines of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ic.display.numbers import probability
from ic.serving.ab.analysis import Compared
from ic.serving.ab.outcomes import Log
from ic.serving.ab.sequential import MIN_USERS

HEADS = [
    "version", "measure", "users", "requests", "mean", "control", "difference", "interval", "p",
    "better",
]  # fmt: skip
_HOW = {
    "answered": ("answers more of its requests", "answers fewer of its requests"),
    "first byte": ("sends its first byte later", "sends its first byte sooner"),
    "whole answer": ("takes longer for a whole answer", "takes less time for a whole answer"),
    "score": ("is scored higher", "is scored lower"),
}


def sentences(compared: Sequence[Compared], control: str) -> list[str]:
    """Which version is better in what, by how much and how sure: a sentence for each measure."""
    return [_sentence(each, control) for each in compared]


def _sentence(each: Compared, control: str) -> str:
    means = f"{_mean(each, each.candidate)} against {_mean(each, each.control)}"
    counts = f"{each.requests[1]:,} and {each.requests[0]:,} requests"
    if not each.enough:
        return (
            f"{each.version}, {each.measure.name}: too early to tell ({means} in {counts} of "
            f"{each.users[1]:,} and {each.users[0]:,} users); it takes {MIN_USERS} users of each "
            "version, and outcomes that differ."
        )
    interval = f"between {_change(each, each.low)} and {_change(each, each.high)}"
    if each.better is None:
        return (
            f"{each.version}, {each.measure.name}: no difference from {control} can be seen "
            f"({means} in {counts}; it lies {interval})."
        )
    more, less = _HOW[each.measure.name]
    p = probability(each.p)
    sure = p if p.startswith("<") else f"= {p}"
    verdict = "better" if each.better else "worse"
    return (
        f"{each.version} is {verdict} than {control}: it {more if each.difference > 0 else less} "
        f"({means} in {counts}, a difference of {_change(each, each.difference)}, which lies "
        f"{interval}; always-valid p {sure})."
    )


def notes(log: Log, compared: Sequence[Compared], alpha: float) -> list[str]:
    """What has to be known to read the sentences and the table."""
    said = [
        "All of this holds however often one looks, and whenever the experiment is stopped: the "
        f"intervals are confidence sequences, and all {len(compared)} of them together ever miss a "
        f"true difference with probability {alpha:g} at most. Users are the units, not requests. "
        "Times are compared by their geometric means."
    ]
    for version, why in log.rolled_back.items():
        said.append(f"{version} was rolled back: {why}.")
    unknown = int((log.ok != log.ok).sum())
    if unknown:
        said.append(
            f"{unknown:,} {'request says' if unknown == 1 else 'requests say'} nothing of a "
            "version: the client was at fault, or went away."
        )
    return said


def lines(compared: Sequence[Compared]) -> list[list[str]]:
    """A line per version and measure, with the columns `HEADS`."""
    return [
        [
            each.version,
            each.measure.name,
            f"{each.users[1]:,}",
            f"{each.requests[1]:,}",
            _mean(each, each.candidate),
            _mean(each, each.control),
            _change(each, each.difference),
            f"{_change(each, each.low)} to {_change(each, each.high)}" if each.enough else "-",
            probability(each.p),
            {None: "-", True: "yes", False: "no"}[each.better],
        ]
        for each in compared
    ]


def _mean(each: Compared, value: float) -> str:
    if each.measure.ratio:
        return f"{value:.3g} s"
    return f"{100 * value:.2f} %" if each.measure.name == "answered" else f"{value:.3f}"


def _change(each: Compared, value: float) -> str:
    """`+3.1 %` of a time, `-0.40 points` of a share."""
    if each.measure.ratio:
        return f"{100 * math.expm1(value):+.1f} %"
    return f"{100 * value:+.2f} points" if each.measure.name == "answered" else f"{value:+.3f}"
