"""Facts in many forms, strewn into a haystack and asked for in other words (`data=retrieval`).

A sequence is a haystack with exercises (`datamodules/facts/exercises.py`) between its sentences:
pieces that state something and, later in the text, the questions for it, each with its answer
marked. The last question ends the sequence, as in an evaluation. Training states and asks in
training's forms, of training's kinds and words; validation and test in theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.datamodules.facts.exercises import Draw, Exercise, Piece, draw_exercises
from ic.datamodules.facts.forms import question_kinds, statement_kinds
from ic.datamodules.facts.keys import KEY_FAMILIES, key_families
from ic.datamodules.facts.splits import pick
from ic.datamodules.generated import GeneratedDataModule, stack_sequences
from ic.datamodules.haystacks import Haystack, encoder
from ic.datamodules.needle_names import SPLITS
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.synthetic import Sequence, draw_positions

_LEAST_SHARE = 0.5  # of the largest share that facts may take
_MOST_REFUSED, _MOST_DRAWS = 3, 500  # exercises that do not fit; before the first does
_TOKENS_PER_FACT, _MOST_FACTS = 128, 24  # how many facts one exercise may have


@dataclass(frozen=True)
class _Part:
    """Tokens that stand together (T,), at a place between 0 and 1; which of them answer, what."""

    place: float
    tokens: np.ndarray
    is_answer: np.ndarray
    about: dict[str, str] | None = None


class RetrievalBatches:
    """Makes the batch of a step; a pure function of the arguments of the call.

    Raises:
        ValueError: the text files cannot be read, or a split has none of the families of keys or of
            the forms.
    """

    def __init__(self, config: RetrievalDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        _check_kinds(config)
        self.config = config
        self._encode = encoder(tokenizer)
        self._haystack = Haystack(config, self._encode)
        self._space = self._encode([" "])[0].tolist()
        self._tasks = [task for task, weight in config.task_weights.items() if weight > 0]
        self._shares = np.cumsum([config.task_weights[task] for task in self._tasks])

    def __call__(self, *, split: str, step: int, rank: int, context_length: int) -> Batch:
        rng = np.random.default_rng([self.config.seed, SPLITS.index(split), step, rank])
        rows = max(1, self.config.tokens_per_batch // context_length)
        return stack_sequences(
            [self.draw_sequence(rng, split, context_length) for _ in range(rows)], step
        )

    def draw_sequence(self, rng: np.random.Generator, split: str, length: int) -> Sequence:
        """A sequence of `length` tokens."""
        parts = self._draw_parts(rng, split, length)
        room = length - sum(len(part.tokens) for part in parts)
        sentences = self._haystack.draw(rng, split)
        # How much of the haystack lies before each part; the last one ends the sequence.
        cuts = [*np.sort(rng.integers(0, room + 1, size=len(parts) - 1)), room]
        filled, pieces = 0, []
        for cut, part in zip(cuts, parts, strict=True):
            while filled < cut:
                sentence = next(sentences)[: room - filled]
                filled += len(sentence)
                pieces.append(_Part(0.0, sentence, np.zeros(len(sentence), dtype=bool)))
            pieces.append(part)
        config = self.config
        told = parts if split != "train" else []
        return Sequence(
            np.concatenate([piece.tokens for piece in pieces]),
            np.concatenate([piece.is_answer for piece in pieces]),
            draw_positions(
                rng, length, config.max_position, config.skip_probability, config.num_skips
            ),
            tuple(part.about for part in told if part.about is not None),
        )

    def _draw_parts(self, rng: np.random.Generator, split: str, length: int) -> list[_Part]:
        """Pieces and queries in the order of the text; a query is the last."""
        budget = int(length * self.config.fact_share * rng.uniform(_LEAST_SHARE, 1.0))
        draw = Draw(
            rng,
            split,
            most=min(_MOST_FACTS, max(1, length // _TOKENS_PER_FACT)),
            key_families=self.config.key_families or KEY_FAMILIES,
            forms=self.config.forms,
        )
        parts: list[_Part] = []
        used, refused = 0, 0
        while refused < (_MOST_REFUSED if parts else _MOST_DRAWS):
            task = self._tasks[
                int(np.searchsorted(self._shares, rng.random() * self._shares[-1], side="right"))
            ]
            drawn = [self._place(rng, e) for e in draw_exercises(task, draw)]
            new = [part for placed in drawn for part in placed]
            size = sum(len(part.tokens) for part in new)
            # A short sequence is filled by its first exercise, however small the share.
            if new and used + size <= (budget if parts else max(budget, length)):
                parts += new
                used += size
            else:
                refused += 1
        if not parts:
            raise ValueError(
                f"{length} tokens are too few for a fact and its question with this tokenizer: "
                "raise data.context_length and callbacks.context_length.start_length"
            )
        asking = [index for index, part in enumerate(parts) if part.is_answer.any()]
        last = parts.pop(pick(rng, asking))
        return [*sorted(parts, key=lambda part: part.place), last]

    def _place(self, rng: np.random.Generator, exercise: Exercise) -> list[_Part]:
        """The parts of an exercise, its pieces in order and its queries behind them."""
        places = np.sort(rng.random(len(exercise.pieces)))
        texts = [_spaced(piece) for piece in exercise.pieces]
        parts = [
            _Part(float(place), tokens, np.zeros(len(tokens), dtype=bool))
            for place, tokens in zip(places, self._encode(texts), strict=True)
        ]
        for query in exercise.queries:
            question, answer = self._encode(
                [
                    f"{chr(10) if query.question.own_line else ' '}{query.question.text}",
                    query.answer,
                ]
            )
            is_answer = np.zeros(len(question) + len(answer), dtype=bool)
            is_answer[len(question) :] = True
            if answer[: len(self._space)].tolist() == self._space:
                is_answer[len(question) : len(question) + len(self._space)] = False
            place = float(rng.uniform(places[-1], 1.0))
            tokens = np.concatenate([question, answer])
            parts.append(_Part(place, tokens, is_answer, query.about))
        return parts


def _check_kinds(config: RetrievalDataOptions) -> None:
    """Raises a ValueError for names that there are not, and where a split is left with nothing."""
    for setting, able_in in (
        ("key_families", key_families),
        ("forms", question_kinds),  # what states a fact can ask for it too, and a request only asks
        ("forms", statement_kinds),
    ):
        given, known = getattr(config, setting), {k for split in SPLITS for k in able_in(split)}
        if able_in is not statement_kinds and (unknown := sorted(set(given) - known)):
            choices = ", ".join(sorted(known))
            raise ValueError(f"data.{setting}: unknown {unknown}; choose from {choices}")
        for split in SPLITS:
            if given and not set(given) & set(able_in(split)):
                what = "no statement" if able_in is statement_kinds else "nothing"
                raise ValueError(
                    f"data.{setting}={given} leaves split={split} with {what}: add one of "
                    f"{', '.join(able_in(split))}"
                )


def _spaced(piece: Piece) -> str:
    return f"\n{piece.text}\n" if piece.own_line else f" {piece.text}"


class RetrievalDataModule(GeneratedDataModule):
    """Facts in a haystack, many questions in a sequence, position skips."""

    def __init__(self, config: RetrievalDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config, RetrievalBatches(config, tokenizer))
        self.tokenizer = tokenizer
