"""What `make_chats` is asked. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ic.checkpoint.identity import source_identity, tokenizer_files_identity
from ic.checkpoint.source import Source, tokenizer_folder
from ic.inference.options import InferenceOptions

# What changes neither what is asked of the model nor what is drawn, but for rounding.
_FREE = ("output", "count", "most_attempts", "accelerator", "attention", "norm", "rope")


@dataclass
class MakeChatsOptions(InferenceOptions):
    """The verb `make_chats`: conversations that an aligned model writes by itself.

    Attributes:
        output: file of conversations to write, `.jsonl`. `NAME.jsonl.batches` beside it holds the
            batches, from which an interrupted run goes on.
        count: conversations to write.
        turns: of the user in each, every one with its answer.
        system: system message in front; null for what the chat template itself begins with.
        question_temperature: of the user's turns, above 0; at 0 all of them would be the same.
        question_top_p: they are drawn from the likeliest tokens that hold this share of the
            probability.
        answer_temperature: of the answers; 0 takes the likeliest token, the model's best answer.
        max_question_tokens: of a user's turn; one that does not end within them is dropped.
        max_answer_tokens: of an answer, likewise.
        keep_unfinished: keep turns that did not end.
        batch_size: conversations that are written at once; those beyond `count` stay in the record.
        most_attempts: give up after so many conversations begun for each of `count`.
        seed: of all draws; each batch has its own, of this and its number.

    Raises:
        ValueError: a value out of its range.
    """

    output: str = "???"
    count: int = 1000
    turns: int = 1
    system: str | None = None
    question_temperature: float = 1.0
    question_top_p: float = 0.95
    answer_temperature: float = 0.0
    max_question_tokens: int = 256
    max_answer_tokens: int = 512
    keep_unfinished: bool = False
    batch_size: int = 32
    most_attempts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output.endswith(".jsonl") and self.output != "???":
            raise ValueError(f"output={self.output!r}: must end in .jsonl")
        for name in (
            *("count", "turns", "max_question_tokens", "max_answer_tokens", "batch_size"),
            "most_attempts",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if not 0 < self.question_temperature <= 2:
            raise ValueError(
                f"question_temperature={self.question_temperature}: must be above 0, where all "
                "questions would be the same, and at most 2"
            )
        if not 0 <= self.answer_temperature <= 2:
            raise ValueError(
                f"answer_temperature={self.answer_temperature}: must be from 0 (greedy) to 2"
            )
        if not 0 < self.question_top_p <= 1:
            raise ValueError(f"question_top_p={self.question_top_p}: must be in (0, 1]")

    def settings(self, source: Source) -> dict[str, Any]:
        """What decides the conversations, but for how many; paths however they were given.

        Args:
            source: the model that `checkpoint` stands for.

        Raises:
            OSError: a file of it cannot be read.
        """
        kept = {name: value for name, value in asdict(self).items() if name not in _FREE}
        kept |= {"checkpoint": str(source.path.resolve()), "identity": source_identity(source)}
        if self.tokenizer not in (None, "bytes"):
            folder = tokenizer_folder(Path(str(self.tokenizer))).resolve()
            kept["tokenizer"] = str(folder)
            kept["tokenizer_identity"] = tokenizer_files_identity(folder)
        return kept
