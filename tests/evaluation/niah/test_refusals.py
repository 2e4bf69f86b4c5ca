"""What the suite niah refuses, in one line and before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ic.evaluation.niah.grid import Config
from ic.evaluation.niah.haystack import Haystack
from ic.evaluation.niah.suite import build
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.made_up_books import suite_of

BYTES = ByteTokenizer()


def without_digits() -> PreTrainedTokenizerFast:
    """Characters other than small letters and spaces are unknown."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz ."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("given", "tokenizer", "positions", "said"),
    [
        ({"lengths": [4096]}, BYTES, 2048, r"suite.niah.lengths=\[4096\]: the model has 2,048 pos"),
        ({"lengths": [65536]}, BYTES, 10**6, r"the text has \d\d,\d{3} tokens, but .* 65,536; .*repeat"),
        ({"lengths": [128]}, BYTES, 10**6, r"suite.niah.lengths: 128 tokens cannot hold the task mu"),
        ({}, without_digits(), 10**6, r"the tokenizer reads '.*' back as '.*\[UNK\].*suite.niah.kin"),
        ({"tasks": ["multi_attribute"], "num_needles": 30, "lengths": [8192]}, BYTES, 10**6, r"num_needles=30: too many for multi_attribute"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_before_the_work(
    given: dict[str, Any], tokenizer: Any, positions: int, said: str, books: Path
) -> None:
    suite = suite_of(books, **{"tasks": ["multi_key"], **given})
    with pytest.raises(ValueError, match=said):
        suite.check(tokenizer, positions)


def test_a_chat_needs_a_template(books: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt=chat: the tokenizer has no chat template"):
        suite_of(books, prompt="chat").check(without_digits(), 10**6)


def test_short_texts_are_repeated_only_if_asked(books: Path) -> None:
    suite = suite_of(books, lengths=[65536], repeat=True, tasks=["own_words"])
    suite.check(BYTES, 10**6)
    sample = suite.sample(BYTES, next(suite.cells()), 0)
    assert len(sample.ids) + sample.new_tokens == 65536
    haystack = Haystack(["One. Two."], repeat=False)
    with pytest.raises(ValueError, match="fewer than 100 tokens of text"):
        haystack.cut(np.random.default_rng(0), BYTES, 100)
    filler = haystack.cut(np.random.default_rng(0), BYTES, 9)
    assert (bytes(filler.ids_T.tolist()), filler.ends.tolist()) == (b"One. Two.", [4, 9])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": []}, r"suite\.niah\.tasks=\[\]: one or more of own_words, other_words"),
        ({"tasks": ["single"]}, r"suite\.niah\.tasks"),
        ({"forms": "all"}, r"suite\.niah\.forms=all: choose one of train, validation, test"),
        ({"depths": [2.0]}, r"suite\.niah\.depths=\[2\.0\]: at least one, each in \[0, 1\]"),
        ({"depths": [0.5, 0.5]}, r"suite\.niah\.depths"),
        ({"num_needles": 0}, r"suite\.niah\.num_needles=0: must be between 1 and 64"),
        ({"control_samples": -1}, r"suite\.niah\.control_samples=-1"),
        ({"kinds": ["digits"]}, r"suite\.niah\.kinds=\['digits'\]: .* unknown; choose from"),
        (
            {"kinds": ["hex-8"], "forms": "train"},
            r"kinds=\['hex-8'\]: .*held out from split='train'",
        ),
        ({"records": ["jsonl"]}, r"suite\.niah\.records='jsonl': did you mean json\?"),
        ({"haystack": "nowhere"}, r"suite\.niah\.haystack: there is no file 'nowhere'"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(Config(**given))


def test_an_empty_haystack_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suite\.niah\.haystack: no text in the folder"):
        build(Config(haystack=str(tmp_path)))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"there is no text in it; python -m ic prepare_corpus"):
        build(Config(haystack=str(tmp_path)))
