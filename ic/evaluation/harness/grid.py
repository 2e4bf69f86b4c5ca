"""Options of the suite `harness`, and the cells that it measures.

Without PyTorch and NumPy, so that help and errors come at once.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

from ic.errors import check_choice, check_once

TOO_LONG = ("refuse", "truncate")


@dataclass
class Config:
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: names of tasks, groups or tags, or patterns such as `mmlu_*`.
        include_path: a folder of your own task files, whose names come before the harness's own.
        limit: documents of each task; below 1 a share of them, null for all.
        num_fewshot: examples in front of each question; null for what each task says.
        apply_chat_template: ask in a conversation.
        system_instruction: the conversation's, or text in front of each prompt.
        fewshot_as_multiturn: examples as turns of the conversation, instead of one.
        gen_kwargs: changes to what tasks ask of generated answers, `{max_gen_toks: 64}`.
        metadata: what tasks that make their own documents are told, `{max_seq_lengths: [4096]}`.
        max_length: longest prompt with its answer, in tokens; null for the model's positions.
        too_long: `refuse` prompts that do not fit, or `truncate` their beginnings.
        confirm_run_unsafe_code: run tasks that execute what the model writes.
        tokens_per_batch: prompts that are read together, in tokens.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        seed: of the few-shot examples.
    """

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    too_long: str = "refuse"
    confirm_run_unsafe_code: bool = False
    tokens_per_batch: int = 65536
    prefill_chunk_tokens: int = 131072
    seed: int = 1234

    def __post_init__(self) -> None:
        check_once("suite.harness.tasks", self.tasks)
        check_choice("suite.harness.too_long", self.too_long, TOO_LONG)
        if self.limit is not None and not (self.limit >= 1 or 0 < self.limit < 1):
            raise ValueError(
                f"suite.harness.limit={self.limit}: a number of documents, or a share above 0"
            )
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            raise ValueError(f"suite.harness.limit={self.limit}: give a whole number of documents")
        least_of = {
            "num_fewshot": 0,
            "max_length": 2,
            "tokens_per_batch": 1,
            "prefill_chunk_tokens": 1,
            "seed": 0,
        }
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"suite.harness.{name}={value}: must be at least {least}")


@dataclass(frozen=True)
class HarnessCell:
    """One task.

    Attributes:
        data: identity of its documents and of how they are asked and scored.
        longest_tokens: of its prompts with their answers.
    """

    task: str
    num_fewshot: int
    data: str
    samples: int
    longest_tokens: InitVar[int] = 1

    def __post_init__(self, longest_tokens: int) -> None:
        object.__setattr__(self, "_longest_tokens", longest_tokens)

    @property
    def length_tokens(self) -> int:
        longest: int = getattr(self, "_longest_tokens", 1)
        return longest

    def __str__(self) -> str:
        return self.task
