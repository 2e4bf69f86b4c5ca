"""`recall`: a sentence of the haystack and its words once more, up to an ending that comes once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from ic.datamodules.facts.exercise_wordings import RECALL
from ic.datamodules.facts.exercises import Draw, draw_exercises
from ic.datamodules.facts.keys import key_families, key_kinds
from ic.datamodules.facts.recall import OWN_WORDS, Recall, draw_recall
from ic.datamodules.facts.splits import split_of
from ic.datamodules.haystacks import Haystack, RowText
from ic.datamodules.needle_names import HAYSTACKS
from ic.datamodules.retrieval import RetrievalBatches
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.model.byte_tokenizer import ByteTokenizer
from tests.datamodules.test_retrieval_data import answers, bpe

LONG = "Nobody in the whole village, as they said, had ever seen the river rise so far at night."


class Texts:
    """The same sentences again and again, of which some are in the row."""

    def __init__(self, *texts: str, held: str = "") -> None:
        self.texts: Iterator[str] = cycle(texts)
        self.held, self.drawn = held, 0

    def draw(self) -> str:
        self.drawn += 1
        return next(self.texts)

    def holds(self, text: str) -> bool:
        return text in self.held


def draw(texts: Texts, others: tuple[Recall, ...] = (), seed: int = 0, most: int = 24) -> Recall:
    rng = np.random.default_rng(seed)
    return draw_recall(rng, "test", texts, others, key_families("test"), most)


def config(files: str, **changes: object) -> RetrievalDataOptions:
    given: dict[str, object] = {
        "context_length": 2048,
        "tokens_per_batch": 8192,
        "task_weights": {"recall": 1.0},
        "train_files": [files],
        "val_files": [files],
        "token_cache": None,
        **changes,
    }
    return RetrievalDataOptions(**given)


@pytest.fixture
def files(tmp_path: Path) -> str:
    """A thousand sentences, each with a number among its first words."""
    lines = [
        f"It was hut {n} that snow fell on, all night and all day, for us." for n in range(999)
    ]
    (tmp_path / "text.txt").write_text(" ".join(lines))
    return str(tmp_path / "text.txt")


def test_the_ending_is_a_key_or_the_next_words_of_the_sentence() -> None:
    kinds: Counter[str] = Counter()
    lengths = set()
    for seed in range(300):
        recall = draw(Texts(LONG), seed=seed)
        assert LONG.startswith(recall.before + " ")
        lengths.add(len(recall.before.split()))
        kinds[recall.kind] += 1
        own = LONG.removeprefix(recall.before).strip()
        if recall.kind == OWN_WORDS:
            assert own.startswith(recall.ending)
            assert 3 <= len(recall.ending.split()) <= 12
        else:
            assert recall.kind in key_kinds("test")
            assert not own.startswith(recall.ending)
    assert lengths == set(range(4, 17))
    assert 70 < kinds[OWN_WORDS] < 130  # a third
    assert set(kinds) == {OWN_WORDS, *key_kinds("test")}
    three = {draw(Texts("a b c d east west north"), seed=seed, most=1).kind for seed in range(30)}
    assert OWN_WORDS not in three  # a key of three words is the test's
    short = {len(draw(Texts(LONG), seed=seed, most=1).before.split()) for seed in range(30)}
    assert short == {4}


@pytest.mark.parametrize(
    ("texts", "others"),
    [
        (Texts("Much too short."), ()),
        (Texts("x" * 300 + " and so it goes on for a while yet as one sees"), ()),
        (Texts("half a \ufffd sign and so it goes on for a while yet as one sees"), ()),
        (Texts(LONG, held=LONG), ()),
        (Texts(LONG), (Recall(LONG, "or so", OWN_WORDS),)),
    ],
    ids=["short", "one long word", "no text", "in the row", "asked already"],
)
def test_a_sentence_that_will_not_do_is_drawn_again_and_words_at_last(
    texts: Texts, others: tuple[Recall, ...]
) -> None:
    recall = draw(texts, others)
    assert texts.drawn == 50
    words = recall.before.casefold().split()
    assert len(words) >= 4
    assert {split_of(word) for word in words} == {"test"}  # of random words of the split
    once = Texts("Much too short.", LONG)
    assert LONG.startswith(draw(once).before)
    assert once.drawn == 2


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("where", ["along", "end", "chat"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_follows_the_words_once_follows_them_again(
    haystack: str, where: str, split: str, files: str
) -> None:
    options = config(files, haystack_weights={haystack: 1.0}, question_weights={where: 1.0})
    tokenizer = ByteTokenizer()
    batch = RetrievalBatches(options, tokenizer)(split=split, step=0, rank=0, context_length=2048)
    asked_for = answers(batch, tokenizer)
    assert len(asked_for) >= 8
    for before, answer, _ in asked_for:
        said = answer.removesuffix("<|eos|>")
        assert said.endswith(".")
        said = said.removesuffix(".").strip()
        asked = re.split(r"<\|user\|>", before)[-1].removesuffix("<|end|><|assistant|>")
        if where == "chat":
            asked = asked.rpartition("\n\n")[2]
            forms = [re.escape(form).replace(r"\{t\}", "(.+)") for form in RECALL[split]]
            matches = [re.fullmatch(form, asked, re.DOTALL) for form in forms]
            repeated = [match[1] for match in matches if match]
        else:
            words = list(re.finditer(r"\S+", asked))[-16:-3]
            repeated = [asked[word.start() :].rstrip() for word in words]
        # Some of them stand before what is answered, and nowhere else but in the question.
        found = [each for each in repeated if f"{each} {said}." in before]
        assert any(before.count(each) == 2 for each in found)
    if split == "test":
        about = [each for row in batch["answers"] for each in row]
        assert {each["task"] for each in about} == {"recall"}
        assert {each["key"] for each in about} <= {OWN_WORDS, *key_kinds("test")}
        assert len({each["key"] for each in about}) > 2


def test_words_of_the_files_are_asked_for(files: str) -> None:
    options = config(files, haystack_weights={"text": 1.0}, question_weights={"end": 1.0})
    for tokenizer in (ByteTokenizer(), bpe()):
        batch = RetrievalBatches(options, tokenizer)(
            split="train", step=1, rank=0, context_length=2048
        )
        for before, _, _ in answers(batch, tokenizer):
            asked = before.rpartition("\n\n")[2]
            assert asked.startswith("It was hut ")
            assert before.count(asked) == 2  # with the number: in the piece and in the question


def test_a_row_is_known_once_it_is_asked(files: str) -> None:
    haystack = Haystack(config(files, haystack_weights={"text": 1.0}), ByteTokenizer())
    row = RowText(haystack, np.random.default_rng(3), "train", 600)
    sentence = row.draw()
    assert re.fullmatch(
        r"It was hut \d+ that snow fell on, all night and all day, for us\.", sentence
    )
    text = bytes(np.concatenate(list(row.sentences(600))).tolist()).decode()
    inside = re.findall(r"It was hut \d+ that", text)
    assert len(inside) >= 8
    assert all(row.holds(each) for each in inside)
    assert row.holds(inside[0].replace("It", "Then"))  # all but the first word
    assert not row.holds(inside[0].replace("hut", "hat"))
    ends = bytes(np.concatenate(list(row.sentences(100))).tolist()).decode()
    assert text.endswith(ends)
    assert len(ends) == 100
    # Where nobody asks, the row is drawn as long as it is to be.
    asked, plain = (np.random.default_rng(3) for _ in range(2))
    unasked = list(RowText(haystack, asked, "train", 600).sentences(100))
    expected = list(haystack.draw(plain, "train", 100))
    assert [part.tolist() for part in unasked] == [part.tolist() for part in expected]


def test_refuses_without_a_haystack() -> None:
    with pytest.raises(ValueError, match="the task 'recall' needs the sentences of a haystack"):
        draw_exercises("recall", Draw(np.random.default_rng(0), "train"))
