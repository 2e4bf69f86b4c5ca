"""Two models, sample by sample: the same samples are found, and each task and length compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ic.errors import UsageError
from ic.evaluation.comparison.answers import Answer, SuiteAnswers
from ic.evaluation.comparison.losses import SURE, Curve, compare_losses, has_losses
from ic.evaluation.paired import RESAMPLES, PairedDifference, holm, paired_difference
from ic.evaluation.registry import build_suite, suite_config
from ic.evaluation.suite import Row

# Suites by name.
Side = Mapping[str, SuiteAnswers]


@dataclass(frozen=True)
class Group:
    """Samples that are compared as one: a task at a length, or all of a suite.

    Attributes:
        task, length_tokens: None stands for all of them; tasks of some suites have no length.
        whole: whether every score is right or wrong, and none a share.
        p_adjusted: Holm's, for all groups of the comparison.
    """

    suite: str
    task: str | None
    length_tokens: int | None
    paired: PairedDifference
    whole: bool
    p_adjusted: float = 1.0

    @property
    def better(self) -> str | None:
        """`A`, `B`, or None where no difference can be seen."""
        if self.p_adjusted >= SURE:
            return None
        return "B" if self.paired.difference > 0 else "A"

    @property
    def columns(self) -> Row:
        """A row of the results file."""
        paired = self.paired
        return {
            "what": "comparison",
            "suite": self.suite,
            "task": self.task,
            "length_tokens": self.length_tokens,
            "n": paired.n,
            "first": paired.first,
            "second": paired.second,
            "difference": paired.difference,
            "low_95": paired.low_95,
            "high_95": paired.high_95,
            "p": paired.p,
            "p_adjusted": self.p_adjusted,
            "better": self.better,
        }


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        groups: all of a suite first, then its tasks and lengths.
        curves: of perplexity, for each task and length.
        only_first, only_second: what the other model was not asked: suites, and of suites that both
            have, tasks and lengths with their samples.
        without_score: samples that both were asked, without a score of one of the two.
        left_out: suites that could not be compared, and why.
    """

    groups: list[Group] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    only_first: Sequence[str] = ()
    only_second: Sequence[str] = ()
    without_score: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)


def in_common(
    first: Side, second: Side, suites: Sequence[str] = ()
) -> tuple[dict[str, SuiteAnswers], dict[str, SuiteAnswers]]:
    """The suites that both models were measured on, or those of them that were asked for.

    Raises:
        UsageError: there are none, one that was asked for is missing, or both are one folder.
    """
    for suite in suites:
        for name, side in (("A", first), ("B", second)):
            if suite not in side:
                raise UsageError(
                    f"suites: {name} was not measured on {suite!r}; it has {', '.join(side)}"
                )
    shared = list(suites) or [suite for suite in first if suite in second]
    if not shared:
        raise UsageError(
            f"nothing in common: A was measured on {', '.join(first)}, B on {', '.join(second)}; "
            "evaluate both with the same suite="
        )
    for suite in shared:
        if first[suite].folder.resolve() == second[suite].folder.resolve():
            raise UsageError(f"{suite}: A and B are the same folder, {first[suite].folder}")
    return {n: first[n] for n in shared}, {n: second[n] for n in shared}


def compare(
    first: Side,
    second: Side,
    *,
    asked: Sequence[str] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two models on the suites that both have.

    Args:
        asked: suites that have to be compared, and no others; without, those that cannot be
            compared are left out.

    Raises:
        UsageError: nothing can be compared, or a suite that was asked for cannot: no task at a
            length and no sample in common, other settings, another tokenizer, or another sample in
            the same place.
    """
    groups: list[Group] = []
    found: list[Curve] = []
    left_out: dict[str, str] = {}
    without_score = 0
    shared, others = in_common(first, second, asked)
    only_first, only_second = (
        [] if asked else [suite for suite in side if suite not in shared]
        for side in (first, second)
    )
    for suite, a in shared.items():
        b = others[suite]
        try:
            pairs = _pairs(a, b)
        except UsageError as error:
            if suite in asked or len(shared) == 1:
                raise
            left_out[suite] = str(error)
            continue
        only_first += _alone(a, b)
        only_second += _alone(b, a)
        if all(has_losses(each) for pair in pairs for each in pair):
            found += compare_losses(suite, pairs, seed, resamples)
            continue
        scored = [pair for pair in pairs if all(each.score is not None for each in pair)]
        if scored:
            without_score += len(pairs) - len(scored)
            groups += _groups(suite, scored, seed, resamples)
        else:
            left_out[suite] = (
                f"{suite}: no sample has a score of both models, so nothing can be compared"
            )
            if suite in asked:
                raise UsageError(left_out[suite])
    if not groups and not found:
        raise UsageError("; ".join(left_out.values()))
    adjusted = iter(holm([*(group.paired.p for group in groups), *(each.p for each in found)]))
    return Comparison(
        [replace(group, p_adjusted=next(adjusted)) for group in groups],
        [replace(curve, p_adjusted=next(adjusted)) for curve in found],
        only_first,
        only_second,
        without_score,
        left_out,
    )


def _alone(answers: SuiteAnswers, others: SuiteAnswers) -> list[str]:
    """`passkey single at 1,024 tokens (5 of 20 samples)`: what only one side was asked."""
    counts: dict[tuple[Any, Any], list[bool]] = {}
    for key, answer in answers.answers.items():
        place = (answer.place.get("task"), answer.place.get("length_tokens"))
        counts.setdefault(place, []).append(key not in others.answers)
    alone: dict[tuple[Any, bool], list[tuple[Any, list[bool]]]] = {}
    for (task, length), each in counts.items():
        if any(each):
            alone.setdefault((task, all(each)), []).append((length, each))
    said = []
    for (task, whole), places in alone.items():
        lengths = [f"{length:,}" for length, _ in places if length is not None]
        at = f" at {', '.join(lengths)} tokens" if lengths else ""
        named = answers.suite if task is None else f"{answers.suite} {task}"
        count, total = (sum(map(of, (each for _, each in places))) for of in (sum, len))
        samples = "sample" if total == 1 else "samples"
        of = f"{count:,}" if whole else f"{count:,} of {total:,}"
        said.append(f"{named}{at} ({of} {samples})")
    return said


def _pairs(a: SuiteAnswers, b: SuiteAnswers) -> list[tuple[Answer, Answer]]:
    """The samples that both answered."""
    _check_settings(a, b)
    _check_tokenizers(a, b)
    pairs = [(a.answers[key], b.answers[key]) for key in a.answers if key in b.answers]
    if not pairs:
        raise UsageError(
            f"{a.suite}: nothing in common: A answered {_places(a)}, B {_places(b)}; evaluate "
            "both with the same tasks and lengths"
        )
    _check_samples(a.suite, pairs)
    return pairs


def _groups(
    suite: str, pairs: Sequence[tuple[Answer, Answer]], seed: int, resamples: int
) -> Iterator[Group]:
    parts: dict[tuple[Any, Any], list[tuple[Answer, Answer]]] = {}
    for pair in pairs:
        place = pair[0].place
        parts.setdefault((place.get("task"), place.get("length_tokens")), []).append(pair)
    whole = {(None, None): list(pairs)} if len(parts) > 1 else {}
    tasks = list(dict.fromkeys(task for task, _ in parts))
    ordered = sorted(parts, key=lambda part: (tasks.index(part[0]), part[1] or 0))
    for task, length in [*whole, *ordered]:
        of_part = whole.get((task, length)) or parts[task, length]
        scores = [[answer.score or 0.0 for answer in side] for side in zip(*of_part, strict=True)]
        paired = paired_difference(*scores, seed=seed, resamples=resamples)
        exact = all(score in (0.0, 1.0) for side in scores for score in side)
        yield Group(suite, task, length, paired, exact)


def _check_settings(a: SuiteAnswers, b: SuiteAnswers) -> None:
    if a.settings == b.settings:
        return
    shaping = [_shaping(side) for side in (a, b)]
    names = list(dict.fromkeys(name for side in shaping for name in side))
    said = ", ".join(
        f"{name} {' and '.join(str(side.get(name)) for side in shaping)}"
        for name in names
        if all(shaping) and shaping[0].get(name) != shaping[1].get(name)
    )
    if all(shaping) and not said:
        raise UsageError(
            f"{a.suite}: A and B were measured with the same options, but the suite's rules or a "
            "file have changed between them; evaluate the older one again, or leave the suite out "
            "with suites="
        )
    raise UsageError(
        f"{a.suite}: A and B were measured with other settings, so on other samples"
        + (f" ({said})" if said else "")
        + "; evaluate one of them again with the settings of the other, or leave the suite out "
        "with suites="
    )


def _check_tokenizers(a: SuiteAnswers, b: SuiteAnswers) -> None:
    known = None not in (a.tokenizer, b.tokenizer)
    if known and a.tokenizer != b.tokenizer and build_suite(a.suite).texts_by_tokens:
        raise UsageError(
            f"{a.suite}: A and B have other tokenizers, and so many tokens are another text to "
            "each; compare models of one tokenizer, or leave the suite out with suites="
        )


def _shaping(answers: SuiteAnswers) -> Row:
    """The settings that shaped the samples, where the options are known."""
    if not answers.options:
        return {}
    return build_suite(answers.suite, suite_config(answers.suite)(**answers.options)).settings()


def _check_samples(suite: str, pairs: Sequence[tuple[Answer, Answer]]) -> None:
    for a, b in pairs:
        if a.expected != b.expected:
            raise UsageError(
                f"{suite}: A and B had other samples: {a} asked A for {a.expected} and B for "
                f"{b.expected}; evaluate both with the same tokenizer and version"
            )


def _places(answers: SuiteAnswers) -> str:
    """`single at 512, 1,024 tokens`."""
    lengths: dict[str, set[int]] = {}
    for answer in answers.answers.values():
        of_task = lengths.setdefault(str(answer.place.get("task", answers.suite)), set())
        if (length := answer.place.get("length_tokens")) is not None:
            of_task.add(length)
    return (
        "; ".join(
            f"{task} at {', '.join(f'{length:,}' for length in sorted(of_task))} tokens"
            if of_task
            else task
            for task, of_task in lengths.items()
        )
        or "nothing"
    )
