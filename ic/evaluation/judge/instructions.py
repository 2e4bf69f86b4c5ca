"""The instructions that a model is to follow, read from a file of JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ic.errors import UsageError
from ic.evaluation.judge.grid import RELATIVE, RUBRICS, Config

_KNOWN = ("instruction", "reference", "rubric", "rival")


@dataclass(frozen=True)
class Instruction:
    """One line of the file.

    Attributes:
        reference: an answer that deserves the best score.
        rubric: the name or the text of one.
        rival: another model's answer.
    """

    instruction: str
    rubric: str
    reference: str | None = None
    rival: str | None = None


def read_instructions(config: Config) -> list[Instruction]:
    """The instructions that the options choose.

    Raises:
        UsageError: there is no such file, it is empty, or a line of it is none of an instruction.
    """
    if config.instructions is None:
        raise UsageError(
            "suite.judge.instructions: give a JSONL file with a line for each instruction, "
            'such as {"instruction": "Name three rivers."}'
        )
    file = Path(config.instructions)
    if not file.is_file():
        raise UsageError(f"suite.judge.instructions={config.instructions}: no such file")
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            found.append(_instruction(line, f"{file}, line {number}", config))
        if len(found) == config.samples:
            break
    if not found:
        raise UsageError(f"suite.judge.instructions={config.instructions}: holds no instruction")
    if config.samples is not None and len(found) < config.samples:
        raise UsageError(
            f"suite.judge.samples={config.samples}: {file} holds {len(found)} instructions"
        )
    return found


def _instruction(line: bytes, where: str, config: Config) -> Instruction:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not set(row) <= set(_KNOWN):
        other = ", ".join(sorted(set(row) - set(_KNOWN))) if isinstance(row, dict) else str(row)
        raise UsageError(f"{where}: {other[:100]}: a line has the keys {', '.join(_KNOWN)}")
    for key, value in row.items():
        if not (isinstance(value, str) and value.strip()) and (value is not None):
            raise UsageError(f"{where}: {key} must be text that is not empty")
    if row.get("instruction") is None:
        raise UsageError(f"{where}: has no instruction")
    if RELATIVE in config.gradings and row.get("rival") is None:
        raise UsageError(
            f"{where}: has no rival, another model's answer, which the grading relative needs"
        )
    rubric = row.get("rubric") or config.rubric
    if rubric not in RUBRICS and "\n" not in rubric:
        raise UsageError(
            f"{where}: rubric {rubric[:60]!r}: choose one of {', '.join(RUBRICS)}, or give the "
            "text of one, a criterion and a line for each score"
        )
    return Instruction(row["instruction"], rubric, row.get("reference"), row.get("rival"))
