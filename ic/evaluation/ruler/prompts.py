"""Prompts of RULER tasks in a model's tokens, as long as their length allows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.evaluation.framing import encode, frame_prompt
from ic.evaluation.options import TaskCell
from ic.evaluation.ruler.fitting import TooShortError, largest_that_fits
from ic.evaluation.ruler.grid import Config
from ic.evaluation.ruler.task import Draw, Prompt, Task
from ic.evaluation.ruler.tasks import make_task
from ic.evaluation.ruler.texts import Texts


@dataclass(frozen=True)
class Tokenized:
    """A prompt in tokens.

    Attributes:
        ids: token ids (T,) int64, which end with the answer prefix.
        new_tokens: as many as RULER generates, or those that a right answer takes if these are
            more, as with a tokenizer of bytes.
    """

    prompt: Prompt
    ids: np.ndarray
    new_tokens: int

    @property
    def tokens(self) -> int:
        """With those to generate."""
        return len(self.ids) + self.new_tokens


class PromptMaker:
    """Makes the prompts of a configuration for one tokenizer."""

    def __init__(self, config: Config, texts: Texts, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.texts = texts
        self.tokenizer = tokenizer
        self._tasks: dict[str, Task] = {}
        self._guesses: dict[tuple[str, int], int] = {}

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            self._tasks[name] = make_task(name, self.texts, self._count_tokens)
        return self._tasks[name]

    def longest(self, cell: TaskCell, index: int) -> Tokenized:
        """Sample `index` of a cell, with as much haystack as its length allows.

        Raises:
            ValueError: the length cannot hold the task.
        """
        key = cell.task, cell.length_tokens
        if index and key not in self._guesses:
            self.longest(cell, 0)
        try:
            units, made = largest_that_fits(
                lambda units: self.make(cell, index, units),
                self.task(cell.task).least_units(index),
                cell.length_tokens,
                # The same whichever sample is made first: that of the first sample, which has none.
                self._guesses[key] if index else None,
            )
        except TooShortError as error:
            raise ValueError(
                f"suite.ruler.lengths: {cell.length_tokens:,} tokens cannot hold {cell.task}: "
                f"sample {index} takes {error.tokens:,} with the tokens to generate; give longer "
                "lengths or fewer suite.ruler.tasks"
            ) from None
        if not index:
            self._guesses[key] = units
        return made

    def shortest(self, cell: TaskCell, index: int) -> Tokenized:
        """Sample `index` of a cell, with as little haystack as its task needs."""
        return self.make(cell, index, self.task(cell.task).least_units(index))

    def make(self, cell: TaskCell, index: int, units: int) -> Tokenized:
        """Sample `index` of a cell with so many units of haystack, whatever its length."""
        task = self.task(cell.task)
        prompt = task.prompt(Draw(self._seed(cell, index), index, cell.length_tokens), units)
        frame = frame_prompt(self.tokenizer, self.config.prompt, answer_prefix=prompt.answer_prefix)
        ids = np.concatenate([frame.before, encode(self.tokenizer, prompt.text), frame.after])
        answer_tokens = self._count_tokens(prompt.answer)
        return Tokenized(prompt, ids, max(task.tokens_to_generate, answer_tokens))

    def _count_tokens(self, text: str) -> int:
        return len(encode(self.tokenizer, text))

    def _seed(self, cell: TaskCell, index: int) -> int:
        """One of 2^32 for each sample."""
        text = f"{self.config.seed} {cell.task} {cell.length_tokens} {index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
