"""What an evaluation suite is: cells, their samples, how an answer is scored, what is shown.

`ic.evaluation.runner` does the rest: it answers the samples, continues what was interrupted, shares
the cells over processes and writes the files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Prompts that are answered together, in tokens, where nobody said how many and no memory tells.
BATCH_TOKENS = 65536

# A row of a cells file, or of a results file.
Row = dict[str, Any]


class Cell(Protocol):
    """What is measured as one: a frozen dataclass of numbers and strings, which identify its row.

    `str(cell)` is shown as it ends.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def length_tokens(self) -> int: ...
    @property
    def samples(self) -> int: ...


C = TypeVar("C", bound=Cell)
# Tokens after which an answer is looked at, whether it is decided.
_LOOK_EVERY = 4


@dataclass(frozen=True)
class Sample:
    """A prompt and what should follow.

    Attributes:
        ids: token ids (T,) int64 that end right before the answer.
        expected: what `Suite.score` compares with; strings and numbers, they are written.
        new_tokens: how many tokens to generate.
    """

    ids: np.ndarray
    expected: Any
    new_tokens: int


@dataclass(frozen=True)
class Score:
    """What is written of an answered sample.

    Attributes:
        correct: true or false, or the share that is right where an answer can be partly right; None
            where nothing can be right or wrong, or nobody could tell.
        measured: whatever else the suite's rows are made of; what JSON holds, it is written.
    """

    expected: Any
    text: str
    correct: float | None
    measured: dict[str, Any] = field(default_factory=dict)


class Decoder(Protocol):
    """What reads prompts in pieces and goes on with them, whatever the model."""

    def answers(
        self, ids_BT: Tensor, new_tokens: int, ended: Callable[[Tensor], bool] = ...
    ) -> Tensor:
        """Greedy continuation (B, new_tokens) of prompts of equal length; a shorter one once
        `ended`, which sees it after each token, says so.
        """

    def answers_of_any_length(
        self,
        prompts: Sequence[Tensor],
        new_tokens: int,
        ended: Callable[[Sequence[int], Tensor], bool] = ...,
    ) -> list[Tensor]:
        """Greedy continuations, up to (new_tokens,), of prompts (T,) in their order; shorter ones
        once `ended`, which sees the indices of some and their continuation (B, n) after each token,
        says so.
        """

    def losses(self, ids_BT: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each token after the first: (B, T - 1) fp32."""

    def targets(self, ids_BT: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Of each token from index `start` on, at least 1: its negative log-likelihood in nats,
        (B, T - start) fp32, and whether it is the likeliest, (B, T - start) bool.
        """


class Suite(ABC, Generic[C]):
    """One kind of evaluation, with its settings.

    What is shown takes `rows` of a cells file or of a results file, whichever is at hand.

    Attributes:
        name: in file and metric names, and `what` in results rows.
        title: says in a picture what was measured.
        picture: name of the CSV file and the picture, without suffix.
        cached: whether its samples take longer to draw than to read from a file.
        synthetic: what of its prompts a program wrote, for the report.
        answering: how the model is asked, for the report.
        tokens_per_batch: prompts of a cell that are answered together, in tokens; None is as many
            as memory holds.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        decides: whether `decided` may end an answer.
        texts_by_tokens: texts are as long as so many of the model's own tokens, so that another
            tokenizer makes others.
    """

    name: ClassVar[str]
    title: str
    picture: ClassVar[str]
    cached: ClassVar[bool] = False
    synthetic: str = "every text and every question"
    answering: ClassVar[str] = "Answers are greedy"
    texts_by_tokens: ClassVar[bool] = True
    decides: ClassVar[bool] = False
    tokens_per_batch: int | None
    prefill_chunk_tokens: int

    def connect(self) -> None:
        """Look for what the suite needs beside a model, before that is loaded.

        Raises:
            UsageError: it is not there.
        """

    def begin(self, file: Path | None) -> None:
        """What comes before the first sample is answered.

        Args:
            file: that this process writes answers into; None where another one writes them.
        """

    def keyed_files(self, file: Path) -> Sequence[Path]:
        """Files beside `file` that hold a line of JSON, with a `key`, of whatever else is kept. Of
        several processes each writes its own (`rank_file`); they are merged as answers are.
        """
        return ()

    @abstractmethod
    def cells(self) -> Iterator[C]:
        """All cells, in the order in which to answer and to show them."""

    @abstractmethod
    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: C, index: int) -> Sample:
        """Sample `index` of a cell, from 0; depends on nothing but the settings, cell and index."""

    @abstractmethod
    def score(self, sample: Sample, text: str) -> Score:
        """How a model that continued the sample with `text` did."""

    def answer(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
    ) -> list[Score]:
        """The samples' scores in their order: greedy answers, those of about one length at once.

        An answer ends before the tokenizer's end token, because what a model writes behind it is no
        part, and where it is decided.
        """
        prompts = [torch.from_numpy(sample.ids) for sample in samples]
        new_tokens = max((sample.new_tokens for sample in samples), default=0)
        texts = [partial(_text, tokenizer, sample.new_tokens) for sample in samples]
        over: set[int] = set()

        def ended(indices: Sequence[int], out_BT: Tensor) -> bool:
            if out_BT.shape[1] % _LOOK_EVERY:
                return False
            for index, tokens in zip(indices, out_BT.tolist(), strict=True):
                if index not in over and self.decided(samples[index], texts[index](tokens)):
                    over.add(index)
            return over.issuperset(indices)

        early = (ended,) if self.decides else ()
        answers = decoder.answers_of_any_length(prompts, new_tokens, *early)
        scores = []
        for sample, text, tensor in zip(samples, texts, answers, strict=True):
            tokens = tensor.tolist()
            if self.decides:  # not where the last of those that were answered together was
                least = range(len(tokens))
                decided = partial(self._decided_after, sample, text, tokens)
                tokens = tokens[: bisect_left(least, True, key=decided)]
            scores.append(self.score(sample, text(tokens)))
        return scores

    def decided(self, sample: Sample, text: str) -> bool:
        """Whether no continuation of an answer's beginning changes its score; then it is true of
        each of them. Asked if `decides`.
        """
        return False

    def _decided_after(
        self, sample: Sample, text: Callable[[list[int]], str], tokens: list[int], number: int
    ) -> bool:
        return self.decided(sample, text(tokens[:number]))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Whatever else than a cell's own fields shapes its samples; cells of others are stale."""

    @abstractmethod
    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        """Refuse what cannot be answered, before anything is computed and cells are asked for.

        Args:
            positions: that the model has.

        Raises:
            ValueError: prompts too long for the model, or too short for what they should hold.
        """

    @abstractmethod
    def cheap(self, lengths: Sequence[int], samples: int) -> Suite[C]:
        """A smaller one on other samples, for while a model trains.

        Args:
            samples: of each cell.
        """

    def groups(self, cells: Sequence[C]) -> list[list[C]]:
        """Which cells are answered in turn, sample by sample, because their prompts begin alike."""
        return [[cell] for cell in cells]

    def work(self, cells: Sequence[C]) -> float:
        """Work of cells that are answered in turn, as the (query, key) pairs of their prompts.

        At the lengths that take time nothing else counts.
        """
        return float(sum(cell.samples * cell.length_tokens**2 for cell in cells))

    def progress_text(self, row: Row) -> str:
        """What a line about a cell that has ended says came out: `4/5`, or `3.62/5` of shares."""
        return f"{round(row['correct'], 2):g}/{row['n']}"

    @abstractmethod
    def rows(self, cells: Sequence[Row]) -> list[Row]:
        """Rows of a results file: `what`, and the columns of `statistics.Accuracy`."""

    @abstractmethod
    def counted(self, rows: Sequence[Row]) -> list[Row]:
        """Those that count for an accuracy: controls do not."""

    @abstractmethod
    def table(self, rows: Sequence[Row]) -> Table:
        """A summary for the terminal."""

    @abstractmethod
    def published(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        """A summary for documents: heads, and a line of text each; the first column is a name."""

    @abstractmethod
    def draw(
        self, rows: Sequence[Row], path: Path, *, title: str, trained_length: int | None = None
    ) -> None:
        """Draw the PNG file `path`.

        Args:
            trained_length: longest context in tokens that was trained, to be marked.
        """


def _text(tokenizer: PreTrainedTokenizerBase, new_tokens: int, tokens: list[int]) -> str:
    """What the first tokens of an answer say, up to the end token."""
    own = tokens[:new_tokens]
    if tokenizer.eos_token_id in own:
        own = own[: own.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(own))
