"""Options that suites by task and length share, and the cells that they measure.

Without PyTorch and NumPy, so that help and errors come at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ic.datamodules.needle_names import PROMPTS
from ic.errors import check_once

# A depth: the needle is left out, and whatever the model answers, it should not be the key.
CONTROL = -1.0


@dataclass(frozen=True)
class TaskCell:
    """One task at one length."""

    task: str
    length_tokens: int
    samples: int

    def __str__(self) -> str:
        return f"{self.task} {self.length_tokens} tokens"


@dataclass
class SuiteOptions:
    """Lengths, samples and batches; a suite's `Config` inherits them and adds its own.

    Attributes:
        lengths: in the model's own tokens, with the chat template and the tokens to generate.
        samples: of each task and length.
        samples_by_length: other counts for some lengths, `{131072: 20}`; a table, so lengths that
            the suite leaves out may stay in it.
        prompt: `plain` text that the model continues, or a `chat` turn that it answers.
        tokens_per_batch: prompts of a cell that are answered together, in tokens; null is as many
            as a GPU's free memory holds, 64 prompts at most, and 65,536 tokens on a CPU.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        seed: of the samples.
    """

    suite: ClassVar[str]

    lengths: list[int] = field(default_factory=lambda: [4096, 32768, 131072])
    samples: int = 50
    samples_by_length: dict[int, int] = field(default_factory=dict)
    prompt: str = "plain"
    tokens_per_batch: int | None = None
    prefill_chunk_tokens: int = 131072
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 128:
            raise ValueError(f"{self.key('lengths')}: at least one, each at least 128")
        check_once(self.setting("lengths"), self.lengths)
        if self.prompt not in PROMPTS:
            raise ValueError(f"{self.key('prompt')}: choose {' or '.join(PROMPTS)}")
        least_of = {"samples": 1, "tokens_per_batch": 1, "prefill_chunk_tokens": 1, "seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{self.key(name)}: must be at least {least}")
        if min(self.samples_by_length.values(), default=1) < 1:
            raise ValueError(f"{self.key('samples_by_length')}: counts must be at least 1")

    def setting(self, name: str) -> str:
        """`suite.ruler.samples`: what the command line calls an option, for an error."""
        return f"suite.{self.suite}.{name}"

    def key(self, name: str) -> str:
        """`suite.ruler.samples=0`, for an error."""
        return f"{self.setting(name)}={getattr(self, name)}"

    def check_positions(self, positions: int, instead: str = "choose shorter lengths") -> None:
        """Refuse lengths that a model cannot hold.

        Args:
            positions: that the model has.
            instead: what to change, for the error.

        Raises:
            ValueError: the longest length is above `positions`.
        """
        if max(self.lengths) > positions:
            raise ValueError(
                f"{self.key('lengths')}: the model has {positions:,} positions "
                f"(max_position_embeddings); {instead}"
            )

    def task_cells(self, tasks: Sequence[str]) -> Iterator[TaskCell]:
        """A cell of each task and length, short lengths first."""
        for length in sorted(self.lengths):
            for task in tasks:
                yield TaskCell(task, length, self.num_samples(length))

    def num_samples(self, length: int) -> int:
        """Samples of each task at a length."""
        return self.samples_by_length.get(length, self.samples)
