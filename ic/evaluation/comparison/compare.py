"""Two models, sample by sample: the same samples are found, and each task and length compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ic.errors import UsageError
from ic.evaluation.comparison.answers import Answer, SuiteAnswers
from ic.evaluation.paired import RESAMPLES, PairedDifference, holm, paired_difference
from ic.evaluation.registry import build_suite, suite_config
from ic.evaluation.suite import Row

SURE = 0.05

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
        only_first, only_second: samples that the other model was not asked.
        without_score: samples that both were asked, without a score of one of the two.
        left_out: suites that could not be compared, and why.
    """

    groups: list[Group]
    only_first: int
    only_second: int
    without_score: int
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
    """Compare two models on the suites of `in_common`.

    Args:
        asked: suites that have to be compared; others that cannot are left out.

    Raises:
        UsageError: nothing can be compared, or a suite that was asked for cannot: no task at a
            length and no sample in common, other settings, another tokenizer, or another sample in
            the same place.
    """
    groups: list[Group] = []
    left_out: dict[str, str] = {}
    only_first = only_second = without_score = 0
    for suite, a in first.items():
        try:
            pairs = _pairs(a, second[suite])
        except UsageError as error:
            if suite in asked or len(first) == 1:
                raise
            left_out[suite] = str(error)
            continue
        only_first += len(a.answers) - len(pairs)
        only_second += len(second[suite].answers) - len(pairs)
        scored = [pair for pair in pairs if all(each.score is not None for each in pair)]
        if scored:
            without_score += len(pairs) - len(scored)
            groups += _groups(suite, scored, seed, resamples)
        else:
            left_out[suite] = (
                f"{suite}: no sample has a score of both models, so nothing can be compared "
                "(perplexity has none; its report shows intervals)"
            )
            if suite in asked:
                raise UsageError(left_out[suite])
    if not groups:
        raise UsageError("; ".join(left_out.values()))
    adjusted = holm([group.paired.p for group in groups])
    return Comparison(
        [replace(g, p_adjusted=p) for g, p in zip(groups, adjusted, strict=True)],
        only_first,
        only_second,
        without_score,
        left_out,
    )


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
