"""The documents that are held out, and the bytes that tokens stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ic.datamodules.options import TextDataOptions
from ic.datamodules.text import TextDataModule
from ic.datamodules.text_stream import DocumentTokenizer, bytes_of_tokens
from ic.model.byte_tokenizer import ByteTokenizer

Corpus = Callable[..., list[str]]


def texts_of(batches: list[dict[str, Any]]) -> list[str]:
    tokens = torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()
    eos, pad = ByteTokenizer().eos_token_id, ByteTokenizer().pad_token_id
    found: list[list[int]] = [[]]
    for token in (token for token in tokens if token != pad):
        found.append([]) if token == eos else found[-1].append(token)
    return [bytes(document).decode() for document in found[:-1]]


def split(files: list[str], **options: Any) -> tuple[list[str], list[str]]:
    """The documents of about three epochs of training, and of validation."""
    options = {"context_length": 64, "tokens_per_batch": 64, "val_fraction": 0.3, **options}
    data = TextDataModule(TextDataOptions(train_files=files, **options), ByteTokenizer())
    data.setup("fit")
    train = texts_of(list(islice(data.train_dataloader(), 300)))
    loader: Any = data.val_dataloader()
    return train, texts_of(list(loader))


def test_every_document_is_on_one_side(documents: list[str], write_corpus: Corpus) -> None:
    train, val = split(write_corpus(documents, "jsonl", 3))
    assert len(val) == len(set(val)) > 0
    assert set(train).isdisjoint(val)
    assert set(train) | set(val) == set(documents)
    assert 0.1 < len(val) / len(documents) < 0.5


def test_neither_files_nor_seed_move_a_document(
    documents: list[str], write_corpus: Corpus, tmp_path: Path
) -> None:
    train, val = split(write_corpus(documents, "jsonl", 3))
    shuffled = tmp_path / "other.jsonl"
    twice = documents[::-1] + documents  # a copy lies on the side of its original
    shuffled.write_text("".join(json.dumps({"text": text}) + "\n" for text in twice))
    other_train, other_val = split([str(shuffled)], seed=5, shuffle_buffer=0)
    assert set(other_val) == set(val)
    assert set(other_train) == set(train)


def test_a_split_that_leaves_nothing_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one document " * 20)
    with pytest.raises(ValueError, match=r"val_fraction=0.5: .*document_unit=paragraph"):
        split([str(tmp_path / "book.txt")], val_fraction=0.5)
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i} of many" for i in range(40)))
    train, val = split([str(tmp_path / "book.txt")], document_unit="paragraph")
    assert len(set(train)) + len(val) == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0: must be from 0 to below 1"),
        ({"val_fraction": -0.1}, r"data\.val_fraction=-0\.1"),
        ({"val_fraction": 0.1, "val_files": ["a.txt"]}, r"data\.val_files are given: choose one"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataOptions(**options)


TEXTS = ["plain words", "größe 東京 🙂 end", "  spaces  ", "é" * 30, "a"]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_add_up_to_the_text(text: str, bpe: PreTrainedTokenizerFast) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        rows = DocumentTokenizer(tokenizer, prepend_bos=False, append_eos=True)(text)
        assert rows[:, 1].sum() == len(text.encode())
        assert rows[-1].tolist() == [tokenizer.eos_token_id, 0]
        assert rows[:-1, 0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    if text.isascii():
        pieces = [len(bpe.decode([token])) for token in rows[:-1, 0]]
        assert rows[:-1, 1].tolist() == pieces
    assert bytes_of_tokens(text, 1, None).tolist() == [len(text.encode())]


def test_bytes_without_offsets_are_spread() -> None:
    assert bytes_of_tokens("abcdefg", 3, None).tolist() == [2, 2, 3]
    assert bytes_of_tokens("", 0, None).tolist() == []
