"""The beginning of a long document: the tokens of the whole, from the characters that it needs."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerFast

from ic.datamodules.options import TextDataOptions
from ic.datamodules.text import TextDataModule
from ic.datamodules.text_stream import DocumentTokenizer
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.small_bpe import small_bpe

WORDS = [
    "The",
    "cache",
    " of",
    "latents ",
    "  holds",
    "naïve",
    "東京",
    "🙂",
    "\n\n",
    "1984",
    "x**2",
]


def text(characters: int, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", "", "\n"]) for _ in range(characters))[
        :characters
    ]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return small_bpe()


@pytest.fixture
def read(bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Characters of the texts that the tokenizer was given."""
    seen: list[int] = []
    encode = type(bpe).__call__

    def spy(self: PreTrainedTokenizerFast, text: str, **options: object) -> object:
        seen.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(bpe), "__call__", spy)
    return seen


@pytest.mark.parametrize("tokens", [1, 63, 400])
@pytest.mark.parametrize("characters", [0, 5, 470, 20_000])
def test_beginnings_are_those_of_the_whole(
    bpe: PreTrainedTokenizerFast, characters: int, tokens: int
) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        for bos in (False, tokenizer is bpe):
            tokenize = DocumentTokenizer(tokenizer, prepend_bos=bos, append_eos=True)
            for seed in range(5):
                document = text(characters, seed)
                whole_T2 = tokenize(document)
                assert np.array_equal(tokenize.beginning(document, tokens), whole_T2[:tokens])


def test_a_long_document_is_not_read_to_its_end(
    bpe: PreTrainedTokenizerFast, read: list[int]
) -> None:
    tokenize = DocumentTokenizer(bpe, prepend_bos=False, append_eos=False)
    tokenize.beginning(text(100_000, 1), 128)
    assert sum(read) < 5_000
    read.clear()
    # A token of so many characters takes more of them, and comes to the same.
    spaced = "the cache of latents " * 2_000
    assert np.array_equal(tokenize.beginning(spaced, 500), tokenize(spaced)[:500])


def test_a_run_begins_without_reading_whole_books(
    bpe: PreTrainedTokenizerFast, read: list[int], write_corpus: Callable[..., list[str]]
) -> None:
    files = write_corpus([text(50_000, seed) for seed in range(8)], "jsonl", 1)
    options = TextDataOptions(
        train_files=files,
        val_fraction=0.3,
        context_length=64,
        tokens_per_batch=128,
        num_streams=4,
        num_workers=0,
    )
    TextDataModule(options, bpe).setup(TrainerFn.FITTING)
    assert read
    assert max(read) < 5_000
