"""Prometheus-Eval's prompts and its score format.

The prompts and rubrics in `prometheus.json` are those of prometheus-eval, word for word, at the
commit that the file names (Apache-2.0). A score is read more strictly than there: only behind the
published mark `[RESULT]`, only at the end of the answer, and only if no other mark contradicts it.
The package's pattern takes "score 5" wherever an answer ends with it, as in a judge's quotation of
the prompt's own "Reference Answer (Score 5)", and `Response A` in brackets at the end of any line.

Source: S. Kim et al., "Prometheus 2: An Open Source Language Model Specialized in Evaluating Other
Language Models" (arXiv 2405.01535).
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from ic.evaluation.judge.grid import ABSOLUTE, RUBRICS

_FILE = Path(__file__).with_name("prometheus.json")

_MARK = re.compile(r"\[\s*result\s*[\]:]", re.IGNORECASE)
_OPEN, _CLOSE = r"[\s:(\[*_`\"']*", r"[\s)\]*_`\"'.]*"
_SCORE = re.compile(
    rf"{_OPEN}(?:(?:score|result)(?:\s+of|\s*[:=])?{_OPEN})?"
    rf"([1-5])(?![\w.,]*\d)(?:\s*/\s*5(?!\d)|\s+out\s+of\s+5(?!\d))?{_CLOSE}",
    re.IGNORECASE,
)
_VERDICT = re.compile(rf"{_OPEN}(?:response\s+)?([AB])\b{_CLOSE}", re.IGNORECASE)

Messages = list[dict[str, str]]


def absolute_messages(
    instruction: str, response: str, rubric: str, reference: str | None
) -> Messages:
    """What asks for a score of a response from 1 to 5."""
    name = ABSOLUTE if reference is not None else "absolute_without_reference"
    text = _prompts()[name].format(
        instruction=instruction, response=response, rubric=rubric, reference_answer=reference
    )
    return _conversation("absolute_system", text)


def relative_messages(
    instruction: str, response_a: str, response_b: str, rubric: str, reference: str | None
) -> Messages:
    """What asks which of two responses is better; of a rubric it shows the criterion alone."""
    name = "relative" if reference is not None else "relative_without_reference"
    text = _prompts()[name].format(
        instruction=instruction,
        response_A=response_a,
        response_B=response_b,
        rubric=rubric.partition("\n")[0],
        reference_answer=reference,
    )
    return _conversation("relative_system", text)


def rubric_text(rubric: str) -> str:
    """A published rubric by its name; any other text is a rubric itself."""
    return "\n".join(_published()["rubrics"][rubric]) if rubric in RUBRICS else rubric


def parse_score(answer: str) -> int | None:
    """The score from 1 to 5 that a judge's answer ends with; None where there is none."""
    found = _parse(answer, _SCORE)
    return None if found is None else int(found)


def parse_verdict(answer: str) -> str | None:
    """`A` or `B`, which a judge's answer ends with; None where there is none."""
    return _parse(answer, _VERDICT)


def _parse(answer: str, value: re.Pattern[str]) -> str | None:
    """What stands behind the last mark, to the end, unless an earlier mark says otherwise."""
    *_, answer = answer.rpartition("</think>")  # a judge that thinks aloud may weigh scores there
    _, *behind = _MARK.split(answer)
    if not behind or (last := value.fullmatch(behind[-1])) is None:
        return None
    earlier = [match[1].upper() for text in behind[:-1] if (match := value.match(text))]
    found = last[1].upper()
    return found if set(earlier) <= {found} else None


def _conversation(system: str, text: str) -> Messages:
    return [{"role": "system", "content": _prompts()[system]}, {"role": "user", "content": text}]


def _prompts() -> dict[str, str]:
    return {name: "\n".join(lines) for name, lines in _published()["prompts"].items()}


@cache
def _published() -> dict[str, Any]:
    published: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return published
