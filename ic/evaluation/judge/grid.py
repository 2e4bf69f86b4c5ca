"""What the suite judge asks, whom, and how: its options and cells.

Without PyTorch and NumPy, so that help and errors come at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ic.datamodules.needle_names import PROMPTS
from ic.errors import check_choice, check_once

ABSOLUTE, RELATIVE = "absolute", "relative"
GRADINGS = (ABSOLUTE, RELATIVE)
RUBRICS = ("helpfulness", "harmlessness", "honesty", "factual_validity", "reasoning")


@dataclass
class Config:
    """A model's answers to instructions, graded by another model.

    Attributes:
        instructions: JSONL file with a line for each instruction: `instruction`, and where there
            are such, `reference` (an answer that deserves a 5), `rubric` (instead of the option)
            and `rival` (another model's answer, for the grading `relative`).
        url: of the judge's server, up to and with `/v1`; any server that speaks OpenAI's chat
            completions.
        model: the judge's name on that server.
        api_key_env: name of the environment variable that holds the server's key; null sends none.
        gradings: `absolute` (a score from 1 to 5) and `relative` (the answer or its rival).
        rubric: `helpfulness`, `harmlessness`, `honesty`, `factual_validity` or `reasoning`, as
            published, or the text of one: a criterion in brackets, then a line for each score.
        samples: how many of the instructions, from the first; null is all.
        prompt: `chat` asks in the model's own template, `plain` lets it continue the instruction.
        max_new_tokens: of an answer.
        length: the most tokens of an instruction and its answer; longer ones are refused.
        temperature: of the judge; null leaves it to the server.
        retry_temperature: of the judge where it is asked again; null is `temperature`.
        max_tokens: of a judgement; null leaves it to the server.
        request: whatever else is sent with each request, `{max_completion_tokens: 2048}`.
        times_asked: how often a judgement is asked for until there is a score in it; without one it
            counts as unjudged.
        concurrency: requests at the same time.
        timeout_s: of a request, without a byte from the server.
        attempts: of a request that fails for a reason that may pass: no connection, a timeout, an
            overloaded or broken server.
        tokens_per_batch: prompts that are answered together, in tokens.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        seed: of the resampling for the intervals.
    """

    instructions: str | None = None
    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    gradings: list[str] = field(default_factory=lambda: [ABSOLUTE])
    rubric: str = "helpfulness"
    samples: int | None = None
    prompt: str = "chat"
    max_new_tokens: int = 512
    length: int = 4096
    temperature: float | None = 0.0
    retry_temperature: float | None = 1.0
    max_tokens: int | None = 1024
    request: dict[str, Any] = field(default_factory=dict)
    times_asked: int = 3
    concurrency: int = 8
    timeout_s: float = 120.0
    attempts: int = 5
    tokens_per_batch: int = 65536
    prefill_chunk_tokens: int = 131072
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.gradings:
            raise ValueError(f"suite.judge.gradings=[]: one or more of {', '.join(GRADINGS)}")
        for grading in self.gradings:
            check_choice("suite.judge.gradings", grading, GRADINGS)
        check_once("suite.judge.gradings", self.gradings)
        check_choice("suite.judge.prompt", self.prompt, PROMPTS)
        if self.rubric not in RUBRICS and "\n" not in self.rubric:
            raise ValueError(
                f"suite.judge.rubric={self.rubric!r}: choose one of {', '.join(RUBRICS)}, or give "
                "the text of one, a criterion and a line for each score"
            )
        for name, least in (
            ("max_new_tokens", 1),
            ("length", 2),
            ("times_asked", 1),
            ("concurrency", 1),
            ("attempts", 1),
            ("tokens_per_batch", 1),
            ("prefill_chunk_tokens", 1),
            ("seed", 0),
            ("samples", 1),
            ("max_tokens", 1),
            ("temperature", 0),
            ("retry_temperature", 0),
        ):
            if (given := getattr(self, name)) is not None and given < least:
                raise ValueError(f"suite.judge.{name}={given}: must be at least {least}")
        if not self.timeout_s > 0:
            raise ValueError(f"suite.judge.timeout_s={self.timeout_s}: must be above 0")
        if self.concurrency > 1024:
            raise ValueError(f"suite.judge.concurrency={self.concurrency}: must be at most 1024")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"suite.judge.url={self.url!r}: must begin with http:// or https://, such as "
                "http://localhost:8000/v1"
            )
        if self.url is not None and "@" in self.url.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "suite.judge.url: must hold no name and password, because it is saved; put a key "
                "into an environment variable and name that by suite.judge.api_key_env"
            )
        if fixed := {"model", "messages", "stream", "n"} & set(self.request):
            raise ValueError(f"suite.judge.request: {', '.join(sorted(fixed))} cannot be set there")


@dataclass(frozen=True)
class GradedCell:
    """All instructions under one way of grading."""

    task: str
    length_tokens: int
    samples: int

    def __str__(self) -> str:
        return self.task
