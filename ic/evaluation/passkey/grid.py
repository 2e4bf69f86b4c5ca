"""What a passkey evaluation measures: cells of length, depth, task and filler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ic.datamodules.needle_names import FILLERS, PROMPTS, SPLITS, TASKS
from ic.errors import check_once
from ic.evaluation.options import CONTROL


@dataclass
class PasskeyGridConfig:
    """Passkeys by length and depth.

    Attributes:
        lengths: prompt lengths in tokens, question included, answer not.
        depths: needle positions, 0 the beginning and 1 right before the question.
        samples: samples a cell and filler; a shown cell pools its fillers.
        samples_by_length: other counts for some lengths, `{16384: 2}`; a table, so lengths that
            the grid leaves out may stay in it.
        fillers: `noise` sentences, `random` words.
        fillers_by_length: other fillers for some lengths, as `samples_by_length`.
        tasks: `single, multi_key, multi_value, multi_query`.
        num_needles: distractors of `multi_key`, values or queries of the others.
        control_samples: samples a length and filler without the needle; 0 for none.
        tokens_per_batch: prompts of a cell that are answered together, in tokens.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        share_haystack: the depths of a length share their filler, and `multi_key` asks for each key
            of a text in turn; prompts then begin alike, and what they have in common is processed
            once. For long prompts; tasks `single` and `multi_key`.
        prompt: `plain` text that the model continues, or a `chat` turn that it answers (one named
            key: task `multi_key`), as `make-preferences` writes them.
        split: keys of `validation` or `test`; training uses neither.
        seed: of keys and fillers.
    """

    lengths: list[int] = field(default_factory=lambda: [512, 1024, 4096])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 10
    samples_by_length: dict[int, int] = field(default_factory=dict)
    fillers: list[str] = field(default_factory=lambda: list(FILLERS))
    fillers_by_length: dict[int, list[str]] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=lambda: ["single"])
    num_needles: int = 4
    control_samples: int = 10
    tokens_per_batch: int = 65536
    prefill_chunk_tokens: int = 131072
    share_haystack: bool = False
    prompt: str = "plain"
    split: str = "test"
    seed: int = 1234

    def __post_init__(self) -> None:
        chosen = [("fillers", self.fillers, FILLERS), ("tasks", self.tasks, TASKS)]
        for length, fillers in self.fillers_by_length.items():
            chosen.append((f"fillers_by_length.{length}", fillers, FILLERS))
        for name, values, allowed in chosen:
            if not values or not set(values) <= set(allowed):
                raise ValueError(f"evaluation.{name}={values}: one or more of {', '.join(allowed)}")
        if self.prompt not in PROMPTS:
            raise ValueError(f"evaluation.prompt={self.prompt!r}: choose {' or '.join(PROMPTS)}")
        if self.prompt == "chat" and self.tasks != ["multi_key"]:
            raise ValueError(
                f"evaluation.tasks={self.tasks}: evaluation.prompt=chat asks multi_key"
            )
        if self.share_haystack and not {"single", "multi_key"}.issuperset(self.tasks):
            raise ValueError(
                f"evaluation.tasks={self.tasks}: evaluation.share_haystack takes single, multi_key"
            )
        once: list[tuple[str, list[Any]]] = [("lengths", self.lengths), ("depths", self.depths)]
        for name, given in (*once, *((name, values) for name, values, _ in chosen)):
            check_once(f"evaluation.{name}", given)
        if self.split not in SPLITS[1:]:
            raise ValueError(f"evaluation.split={self.split!r}: choose validation or test")
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"evaluation.lengths={self.lengths}: at least one, each at least 128")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"evaluation.depths={self.depths}: at least one, each in [0, 1]")
        for name, least in (
            ("samples", 1),
            ("num_needles", 1),
            ("control_samples", 0),
            ("tokens_per_batch", 1),
            ("prefill_chunk_tokens", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"evaluation.{name}={getattr(self, name)}: must be at least {least}"
                )
        if min(self.samples_by_length.values(), default=1) < 1:
            raise ValueError(
                f"evaluation.samples_by_length={self.samples_by_length}: counts must be at least 1"
            )

    def cells(self) -> Iterator[Cell]:
        """All cells, short lengths first."""
        for length in sorted(self.lengths):
            samples = self.samples_by_length.get(length, self.samples)
            for task in self.tasks:
                for filler in self.fillers_by_length.get(length, self.fillers):
                    for depth in self.depths:
                        yield Cell(task, length, depth, filler, samples)
                    if self.control_samples:
                        yield Cell(
                            task, length, CONTROL, filler, min(self.control_samples, samples)
                        )


@dataclass(frozen=True)
class Cell:
    """One cell; `depth` is `CONTROL` where no needle is hidden."""

    task: str
    length_tokens: int
    depth: float
    filler: str
    samples: int

    def __str__(self) -> str:
        depth = "no needle" if self.depth == CONTROL else f"depth {self.depth:g}"
        return f"{self.task} {self.length_tokens} tokens, {self.filler}, {depth}"


Config = PasskeyGridConfig  # as the suite's options
