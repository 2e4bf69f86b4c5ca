"""A comparison in words and as lines of a table."""

from __future__ import annotations

from collections.abc import Sequence

from ic.display.numbers import probability, tokens
from ic.evaluation.comparison.compare import Comparison, Group
from ic.evaluation.comparison.losses import SURE, Curve
from ic.evaluation.comparison.perplexity_words import perplexity_phrase

HEADS = ["task", "tokens", "n", "A %", "B %", "B - A", "95 %", "p", "better"]


def sentences(comparison: Comparison) -> list[str]:
    """Which model is better where, by how much and how sure: a sentence for each suite and task."""
    said = []
    by_task: dict[tuple[str, str | None], list[Group]] = {}
    for group in comparison.groups:
        by_task.setdefault((group.suite, group.task), []).append(group)
    for groups in by_task.values():
        phrases = [_difference(group) for group in groups if group.better]
        alike = [group for group in groups if not group.better]
        phrases += [f"{_at(same)} both answer all" for same in _only(alike, 1.0)]
        phrases += [f"{_at(same)} neither answers any" for same in _only(alike, 0.0)]
        rest = [group for group in alike if not (_is(group, 1.0) or _is(group, 0.0))]
        if rest:
            phrases.append(
                f"{_at(rest)} no difference can be seen ({_numbers(rest)}; at most "
                f"{_widest(rest)} points either way)"
            )
        said.append(f"{name_of(groups[0], comparison)}: {'; '.join(phrases)}.")
    by_way: dict[tuple[str, str], list[Curve]] = {}
    for curve in comparison.curves:
        by_way.setdefault((curve.suite, curve.task), []).append(curve)
    said += [
        f"{suite} {task}: {'; '.join(map(perplexity_phrase, curves))}."
        for (suite, task), curves in by_way.items()
    ]
    return said


def notes(comparison: Comparison) -> list[str]:
    """What has to be known to read the sentences and the table."""
    many = len(comparison.groups) + len(comparison.curves)
    samples = " and ".join(
        what
        for what, parts in (
            ("the samples that both models answered", comparison.groups),
            ("the documents that both models read", comparison.curves),
        )
        if parts
    )
    said = [
        f"Intervals are those of the paired bootstrap over {samples}, each for its own line. p is "
        "the probability of such a difference between models that do not differ"
        + (
            f"; it is adjusted for {many} comparisons by Holm's method. A difference is claimed "
            f"where it is below {SURE}, and all these claims together are wrong at most once in "
            "twenty times."
            if many > 1
            else f". A difference is claimed where it is below {SURE}."
        )
    ]
    if comparison.curves:
        said.append(
            "Perplexity: a document counts once, by its mean loss per token. A difference is "
            "claimed of all positions of a length; of bands of positions nothing is claimed, and "
            "one is called lower or higher where its interval lies on one side."
        )
    for name, places in (("A", comparison.only_first), ("B", comparison.only_second)):
        if places:
            said.append(f"Left out, because {name} alone was asked: {'; '.join(places)}.")
    if comparison.without_score:
        one = comparison.without_score == 1
        said.append(
            f"{comparison.without_score:,} {'sample' if one else 'samples'} without a score of one "
            f"of the two {'is' if one else 'are'} left out."
        )
    said += [f"Left out: {reason}." for reason in comparison.left_out.values()]
    return said


def lines(comparison: Comparison) -> list[list[str]]:
    """A line of a table for each group, under `HEADS`."""
    return [
        [
            name_of(group, comparison),
            "all" if group.length_tokens is None else f"{group.length_tokens:,}",
            str(group.paired.n),
            f"{100 * group.paired.first:.1f}",
            f"{100 * group.paired.second:.1f}",
            f"{100 * group.paired.difference:+.1f}",
            f"{100 * group.paired.low_95:+.0f} to {100 * group.paired.high_95:+.0f}",
            probability(group.p_adjusted),
            group.better or "-",
        ]
        for group in comparison.groups
    ]


def name_of(group: Group, comparison: Comparison) -> str:
    """What is compared, with the suite where there are several."""
    if group.task is None:
        return f"all of {group.suite}" if group.length_tokens is None else group.suite
    several = len({each.suite for each in comparison.groups}) > 1
    return f"{group.suite} {group.task}" if several else group.task


def _difference(group: Group) -> str:
    """`B answers 12 of 100 more at 32k (31 against 19, 95 % between 6 and 19 more, p = 0.002)`."""
    paired = group.paired
    low, high, more, less = paired.low_95, paired.high_95, paired.second, paired.first
    if group.better == "A":
        low, high, more, less = -high, -low, less, more
    where = "" if group.length_tokens is None else f" {_at([group])}"
    p = probability(group.p_adjusted)
    sure = p if p.startswith("<") else f"= {p}"
    if group.whole:
        n = paired.n
        return (
            f"{group.better} answers {n * (more - less):.0f} of {n} more{where} ({n * more:.0f} "
            f"against {n * less:.0f}, 95 % between {n * low:.0f} and {n * high:.0f} more, p {sure})"
        )
    return (
        f"{group.better} scores {100 * (more - less):.1f} points more{where} ({100 * more:.1f} "
        f"against {100 * less:.1f} %, 95 % between {100 * low:.1f} and {100 * high:.1f} more, "
        f"n = {paired.n}, p {sure})"
    )


def _is(group: Group, score: float) -> bool:
    return group.paired.first == group.paired.second == score


def _only(groups: Sequence[Group], score: float) -> list[list[Group]]:
    """The groups whose every answer has this score, as one list of them, or none."""
    found = [group for group in groups if _is(group, score)]
    return [found] if found else []


def _at(groups: Sequence[Group]) -> str:
    lengths = [group.length_tokens for group in groups]
    names = [tokens(length) for length in lengths if length is not None]
    if not names:
        return "over all samples"
    *before, last = names
    return f"at {', '.join(before)} and {last}" if before else f"at {last}"


def _numbers(groups: Sequence[Group]) -> str:
    counts = sorted({group.paired.n for group in groups})
    if len(counts) > 1:
        return f"n = {counts[0]} to {counts[-1]}"
    return f"n = {counts[0]}" + (" each" if len(groups) > 1 else "")


def _widest(groups: Sequence[Group]) -> str:
    ends = (abs(end) for group in groups for end in (group.paired.low_95, group.paired.high_95))
    return f"{100 * max(ends):.0f}"
