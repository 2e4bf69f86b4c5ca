"""Facts in many forms, strewn into a haystack and asked for in other words (`data=retrieval`).

A sequence is a haystack with exercises (`datamodules/facts/exercises.py`) between its sentences:
pieces that state something and, later in the text, the questions for it, each with its answer
marked. The last question ends the sequence, as in an evaluation. Training states and asks in
training's forms, of training's kinds and words; validation and test in theirs. A share of the
sequences may be the haystack alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.datamodules.chat_frames import chat_frames
from ic.datamodules.facts.exercises import Draw, Exercise, Piece, Query, draw_exercises
from ic.datamodules.facts.forms import question_kinds, statement_kinds
from ic.datamodules.facts.keys import KEY_FAMILIES, key_families
from ic.datamodules.facts.splits import pick
from ic.datamodules.generated import GeneratedDataModule, stack_sequences
from ic.datamodules.haystacks import Haystack, RowText
from ic.datamodules.needle_names import SPLITS
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.synthetic import Sequence, draw_positions

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
        ValueError: the text files cannot be read, a split has none of the families of keys or of
            the forms, or questions are to be turns and the tokenizer has no chat template.
    """

    def __init__(self, config: RetrievalDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        _check_kinds(config)
        self.config = config
        self._frames = chat_frames(tokenizer) if config.question_weights.get("chat") else None
        self._haystack = Haystack(config, tokenizer)
        self._encode = self._haystack.encode
        self._space = self._encode([" "])[0].tolist()
        self._blank_line = self._encode(["\n\n"])[0]
        self._tasks = [task for task, weight in config.task_weights.items() if weight > 0]
        self._shares = np.cumsum([config.task_weights[task] for task in self._tasks])
        self._places = [place for place, weight in config.question_weights.items() if weight > 0]
        self._place_shares = np.cumsum([config.question_weights[place] for place in self._places])

    def __call__(self, *, split: str, step: int, rank: int, context_length: int) -> Batch:
        rng = np.random.default_rng([self.config.seed, SPLITS.index(split), step, rank])
        rows = max(1, self.config.tokens_per_batch // context_length)
        draws = [
            # Evenly over rows, steps and ranks, so that hardly a step is without an answer.
            self.draw_sequence
            if _is_chosen(step * rows + rank + row, self.config.facts_fraction)
            else self.draw_text
            for row in range(rows)
        ]
        return stack_sequences([draw(rng, split, context_length) for draw in draws], step)

    def draw_text(self, rng: np.random.Generator, split: str, length: int) -> Sequence:
        """A sequence of `length` tokens of haystack, whose documents do not see each other."""
        tokens, documents = self._haystack.row(rng, split, length)
        return Sequence(
            tokens,
            np.zeros(length, dtype=bool),
            self._draw_positions(rng, length),
            document_ids=documents if documents[-1] else None,
        )

    def draw_sequence(self, rng: np.random.Generator, split: str, length: int) -> Sequence:
        """A sequence of `length` tokens with facts in it."""
        where = self._places[0]
        if len(self._places) > 1:
            drawn = rng.random() * self._place_shares[-1]
            where = self._places[int(np.searchsorted(self._place_shares, drawn, side="right"))]
        text = RowText(self._haystack, rng, split, length)
        pieces, queries = self._draw_parts(rng, split, length, where, text)
        before, pieces, behind = self._arrange(rng, pieces, queries, where)
        room = length - sum(len(part.tokens) for part in (*before, *pieces, *behind))
        sentences = text.sentences(room)
        # How much of the haystack lies before each piece.
        cuts = np.sort(rng.integers(0, room + 1, size=len(pieces))).tolist()
        row, filled = list(before), 0
        for cut, part in zip([*cuts, room], [*pieces, None], strict=True):
            while filled < cut:
                sentence = next(sentences)[: room - filled]
                filled += len(sentence)
                row.append(_plain(sentence))
            row += [] if part is None else [part]
        row += behind
        told = row if split != "train" else []
        return Sequence(
            np.concatenate([part.tokens for part in row]),
            np.concatenate([part.is_answer for part in row]),
            self._draw_positions(rng, length),
            tuple(part.about for part in told if part.about is not None),
        )

    def _draw_positions(self, rng: np.random.Generator, length: int) -> np.ndarray:
        config = self.config
        return draw_positions(
            rng, length, config.max_position, config.skip_probability, config.num_skips
        )

    def _draw_parts(
        self, rng: np.random.Generator, split: str, length: int, where: str, text: RowText
    ) -> tuple[list[_Part], list[_Part]]:
        """Pieces, and queries for them, which together leave room in `length` tokens."""
        config = self.config
        share = config.fact_share * rng.uniform(config.least_fact_share, 1.0)
        budget = int(length * share)
        draw = Draw(
            rng,
            split,
            most=min(_MOST_FACTS, max(1, length // _TOKENS_PER_FACT)),
            key_families=config.key_families or KEY_FAMILIES,
            forms=config.forms,
            in_turns=where == "chat",
            sentences=text,
        )
        pieces: list[_Part] = []
        queries: list[_Part] = []
        used, refused = 0, 0
        while refused < (_MOST_REFUSED if queries else _MOST_DRAWS):
            task = self._tasks[
                int(np.searchsorted(self._shares, rng.random() * self._shares[-1], side="right"))
            ]
            drawn = [self._place(rng, e, where) for e in draw_exercises(task, draw)]
            new_pieces = [part for placed, _ in drawn for part in placed]
            new_queries = [part for _, placed in drawn for part in placed]
            size = sum(len(part.tokens) for part in (*new_pieces, *new_queries))
            most = budget if queries else max(budget, length - self._overhead(where))
            # A short sequence is filled by its first exercise, however small the share.
            if size and used + size <= most:
                pieces += new_pieces
                queries += new_queries
                used += size
            else:
                refused += 1
        if not queries:
            raise ValueError(
                f"{length} tokens are too few for a fact and its question with this tokenizer: "
                "raise data.context_length and callbacks.context_length.start_length"
            )
        return pieces, queries

    def _place(
        self, rng: np.random.Generator, exercise: Exercise, where: str
    ) -> tuple[list[_Part], list[_Part]]:
        """The pieces of an exercise in order, and its queries behind them."""
        places = np.sort(rng.random(len(exercise.pieces)))
        texts = [_spaced(piece) for piece in exercise.pieces]
        pieces = [
            replace(_plain(tokens), place=float(place))
            for place, tokens in zip(places, self._encode(texts), strict=True)
        ]
        queries = [
            replace(self._ask(query, where), place=float(rng.uniform(places[-1], 1.0)))
            for query in exercise.queries
        ]
        return pieces, queries

    def _ask(self, query: Query, where: str) -> _Part:
        """A question and its answer; as turns of a conversation up to the user's next one."""
        question, text = query.question, query.question.text
        if where == "along":
            text = f"{chr(10) if question.own_line else ' '}{text}"
        asked, answer = self._encode([text, query.answer])
        is_answer = np.ones(len(answer), dtype=bool)
        if answer[: len(self._space)].tolist() == self._space:
            is_answer[: len(self._space)] = False
        tokens: list[tuple[np.ndarray, bool | np.ndarray]] = [(asked, False), (answer, is_answer)]
        if where == "end":
            tokens.insert(0, (self._blank_line, False))
        if self._frames is not None and where == "chat":
            frames = self._frames
            tokens.insert(1, (frames.to_answer, False))
            tokens += [(frames.end_of_turn, True), (frames.to_question, False)]
        return _Part(
            0.0,
            np.concatenate([ids for ids, _ in tokens]),
            np.concatenate([np.broadcast_to(marks, len(ids)) for ids, marks in tokens]),
            query.about,
        )

    def _arrange(
        self, rng: np.random.Generator, pieces: list[_Part], queries: list[_Part], where: str
    ) -> tuple[list[_Part], list[_Part], list[_Part]]:
        """What stands before the haystack, in it (in the order of the text) and behind it."""
        if where == "along":
            last = queries.pop(pick(rng, range(len(queries))))
            return [], sorted([*pieces, *queries], key=lambda part: part.place), [last]
        pieces = sorted(pieces, key=lambda part: part.place)
        behind = [queries[int(index)] for index in rng.permutation(len(queries))]
        if self._frames is None or where == "end":
            return [], pieces, behind
        frames, last = self._frames, behind[-1]
        kept = len(last.tokens) - len(frames.to_question)
        behind[-1] = replace(last, tokens=last.tokens[:kept], is_answer=last.is_answer[:kept])
        before, end = _plain(frames.before), _plain(frames.end)
        return [before], pieces, [_plain(self._blank_line), *behind, end]

    def _overhead(self, where: str) -> int:
        """Tokens that a conversation takes beside its facts and questions."""
        frames = self._frames
        if frames is None or where != "chat":
            return 0
        return len(frames.before) + len(self._blank_line) + len(frames.end)


def _plain(tokens: np.ndarray) -> _Part:
    """Tokens that answer nothing."""
    return _Part(0.0, tokens, np.zeros(len(tokens), dtype=bool))


def _is_chosen(number: int, fraction: float) -> bool:
    """Whether one of the numbers 0, 1, 2, ... is among the fraction that is spread over them."""
    return floor((number + 1) * fraction) > floor(number * fraction)


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
