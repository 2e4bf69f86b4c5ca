"""The gate before the champion, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ic.errors import UsageError
from ic.evaluation.comparison.answers import SuiteAnswers, find_answers
from ic.evaluation.comparison.compare import compare
from ic.evaluation.comparison.words import sentences
from ic.run.registry_options import PromoteOptions
from ic.tracking.registry import CANDIDATE, EVALUATION, REPLACED_TAG, Registry, Version


def promote(config: PromoteOptions) -> Iterator[str]:
    """Move the alias if the version passes -> what was found, in sentences.

    Raises:
        UsageError: it does not pass; there is nothing to judge by; it is the champion already.
    """
    registry = Registry("uri", config.uri)
    if config.version is None:
        version = registry.find(config.name, CANDIDATE)
    else:
        version = registry.find(config.name, number=config.version)
    now = registry.aliases(config.name).get(config.alias)
    if now == version.number:
        raise UsageError(f"{version} is the {config.alias} already")
    answers = _answers(registry, version)
    if config.judged_by is not None:
        yield _past_threshold(config, version, answers)
    if config.compare:
        if now is None:
            raise UsageError(
                f"compare=true: {config.name} has no {config.alias} to be compared with; promote "
                "the first one by judged_by= and at_least="
            )
        yield from _past_champion(registry, registry.find(config.name, number=now), version)
    registry.point(config.alias, version, now or 0)
    before = "" if now is None else f", in place of version {now}"
    yield f"{version} is the {config.alias}{before}"


def roll_back(config: PromoteOptions) -> Iterator[str]:
    """Have the alias point to the version that its present one replaced.

    Raises:
        UsageError: it replaced none.
    """
    registry = Registry("uri", config.uri)
    now = registry.find(config.name, config.alias)
    before = int(now.tags.get(REPLACED_TAG, 0))
    if not before:
        raise UsageError(f"{now} is the first {config.alias}: there is none to go back to")
    version = registry.find(config.name, number=before)
    registry.point(config.alias, version)
    yield f"{version} is the {config.alias} again, in place of version {now.number}"


def _answers(registry: Registry, version: Version) -> dict[str, SuiteAnswers]:
    folder = registry.download(version, EVALUATION) / EVALUATION
    if not Path(folder).is_dir():
        raise UsageError(
            f"{version} was registered without an evaluation, so nothing can be judged; evaluate "
            "it and register it again"
        )
    return find_answers(folder)


def _past_threshold(
    config: PromoteOptions, version: Version, answers: dict[str, SuiteAnswers]
) -> str:
    assert config.judged_by is not None
    assert config.at_least is not None
    if config.judged_by not in answers:
        raise UsageError(
            f"judged_by={config.judged_by}: {version} was not measured on it, but on "
            f"{', '.join(answers)}"
        )
    found = [
        answer
        for answer in answers[config.judged_by].answers.values()
        if config.length_tokens in (None, answer.place.get("length_tokens"))
    ]
    scores = [answer.score for answer in found if answer.score is not None]
    where = "" if config.length_tokens is None else f" at {config.length_tokens:,} tokens"
    if not scores:
        raise UsageError(f"judged_by={config.judged_by}: {version} has no scored answer{where}")
    share = sum(scores) / len(scores)
    said = f"{version}: {config.judged_by}{where} {share:.3f} of {len(scores)} answers"
    if share < config.at_least:
        raise UsageError(f"not promoted: {said}, and the gate is at_least={config.at_least}")
    return f"{said}, at least {config.at_least}"


def _past_champion(registry: Registry, champion: Version, version: Version) -> Iterator[str]:
    comparison = compare(_answers(registry, champion), _answers(registry, version))
    said = sentences(comparison)
    verdicts = [each.better for each in comparison.groups]
    verdicts += [each.better for each in comparison.curves]
    if "A" in verdicts:
        raise UsageError(
            f"not promoted: {version} (B) is worse than {champion} (A): {' '.join(said)}"
        )
    yield f"A is {champion}, B is {version}"
    yield from said
