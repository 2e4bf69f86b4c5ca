"""Retrieval data: what is asked stands in the text, in other words; batches are reproducible."""

from __future__ import annotations

import lzma
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ic.datamodules.batch import Batch
from ic.datamodules.facts.keys import key_kinds
from ic.datamodules.facts.recall import OWN_WORDS
from ic.datamodules.facts.words import english_words
from ic.datamodules.needle_names import RETRIEVAL_TASKS
from ic.datamodules.retrieval import RetrievalBatches, RetrievalDataModule
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.model.byte_tokenizer import ByteTokenizer

LISTS = ("values", "entities", "variables", "repeated")


@cache
def bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(english_words()["train"][:2000])], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def options(**changes: object) -> RetrievalDataOptions:
    given = {"context_length": 2048, "tokens_per_batch": 8192, "token_cache": None, **changes}
    return RetrievalDataOptions(**given)


def batch(
    config: RetrievalDataOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **changes: object,
) -> Batch:
    given = {"split": "train", "step": 3, "rank": 0, "context_length": 1024, **changes}
    return RetrievalBatches(config, tokenizer or ByteTokenizer())(**given)


def answers(data: Batch, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, str]]:
    """The text before each marked run of tokens, the run and the text behind it."""
    found = []
    for ids, marks in zip(data["input_ids"], data["answer_mask"], strict=True):
        edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff()
        starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            found.append(
                tuple(
                    tokenizer.decode(ids[a:b])
                    for a, b in ((0, start), (start, end), (end, len(ids)))
                )
            )
    return found


@pytest.mark.parametrize("task", RETRIEVAL_TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_stands_earlier_in_the_text(task: str, split: str) -> None:
    config = options(
        task_weights={task: 1.0}, tokens_per_batch=16384, haystack_weights={"noise": 1.0}
    )
    data = batch(config, split=split, context_length=2048)
    assert data["input_ids"].shape == (8, 2048)
    assert data["labels"].equal(data["input_ids"])
    found = answers(data, ByteTokenizer())
    assert len(found) >= 8
    if split == "train":
        assert "answers" not in data  # nobody asks
    else:
        about = [each for row in data["answers"] for each in row]
        assert [each["task"] for each in about] == [task] * len(found)
        if "key" in about[0] and task != "nonliteral":
            own = {OWN_WORDS} if task == "recall" else set()
            assert {each["key"] for each in about} <= set(key_kinds("test")) | own
            digits = [f[1] for f, a in zip(found, about, strict=True) if a["key"] == "digits-7"]
            assert all(re.fullmatch(r" ?\d{7} ?\D", answer) for answer in digits)
    assert sum(not after for _, _, after in found) == 8  # each sequence ends with an answer
    for before, answer, _ in found:
        value = re.fullmatch(r"(.+?) ?(\n|_|\W)", answer.lstrip(" "), re.DOTALL).group(1)
        items = value.split(", ") if task in LISTS else [value]
        if task == "repeated":
            items = [rf"{item}\b" for item in items for _ in range(2)]
            assert all(len(re.findall(rf"\b{item}", before)) >= 2 for item in items)
        else:
            assert all(item.casefold() in before.casefold() for item in items)
        assert not value.startswith(" ")


def test_a_question_ends_where_a_prompt_would(tmp_path: Path) -> None:
    """The tokens before an answer are those of the question alone, its own those of the answer."""
    tokenizer, told = bpe(), 0
    data = batch(options(task_weights={"fact": 1.0}, haystack_weights={"words": 1.0}), tokenizer)
    assert data["input_ids"].shape == (8, 1024)
    for before, answer, _ in answers(data, tokenizer):
        assert answer.lstrip(" ")[:-2] in before
        request = before[before.rindex("?") + 1 :] if "?" in before[-40:] else ""
        if request:
            ids = tokenizer(request)["input_ids"]
            assert tokenizer(before)["input_ids"][-len(ids) :] == ids
            told += 1
    assert told > 5


def test_many_questions_a_sequence() -> None:
    for length, least in ((128, 1), (1024, 3), (8192, 20)):
        config = options(context_length=length, tokens_per_batch=8192)
        found = answers(batch(config, context_length=length), ByteTokenizer())
        assert len(found) >= least * (8192 // length)


def test_pure_function_of_seed_split_step_rank() -> None:
    config = options()
    same = batch(config)
    again = batch(config)
    assert all(torch.equal(same[k], v) for k, v in again.items() if k != "step")
    for change in ({"step": 4}, {"rank": 1}, {"split": "validation"}):
        assert not torch.equal(same["input_ids"], batch(config, **change)["input_ids"])
    assert not torch.equal(same["input_ids"], batch(options(seed=1))["input_ids"])


def test_validation_asks_in_its_own_forms_for_its_own_kinds() -> None:
    config = options(task_weights={"fact": 1.0}, tokens_per_batch=16384)
    texts = {
        split: bytes(batch(config, split=split)["input_ids"].flatten().tolist()).decode()
        for split in ("train", "validation", "test")
    }
    own = {
        "train": ["Question: ", "User: ", "Teacher: ", "Answer: ", " Can you "],
        "validation": ["Interviewer: ", "INSERT INTO", "Kindly quote", " lot "],
        "test": ["[INST]", "Supply the missing", "Customer: ", "activation string"],
    }
    for split, text in texts.items():
        for other, forms in own.items():
            found = [form for form in forms if form in text]
            assert len(found) >= 2 if split == other else not found


def test_kinds_can_be_chosen() -> None:
    chosen = {"key_families": ["digits", "hex"], "forms": ["sentence", "request", "json"]}
    config = options(task_weights={"fact": 1.0, "block": 1.0}, **chosen)
    for split in ("validation", "test"):
        about = [each for row in batch(config, split=split)["answers"] for each in row]
        assert {each["stated"] for each in about} == {"sentence", "json"}
        assert {each["asked"] for each in about} == {"sentence", "json", "request"}
        kinds = {"validation": {"digits-10", "hex-upper-6"}, "test": {"digits-7", "hex-8"}}
        assert {each["key"] for each in about} == kinds[split]
    found = answers(batch(config), ByteTokenizer())
    assert all(re.fullmatch(r" ?[0-9a-f]{2,10} ?(\n|\W)", answer) for _, answer, _ in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"key_families": ["digit"]},
            "data.key_families: unknown ['digit']; choose from amounts, codes",
        ),
        ({"key_families": ["amounts"]}, "leaves split=validation with nothing: add one of digits"),
        ({"forms": ["sentences"]}, "data.forms: unknown ['sentences']; choose from"),
        ({"forms": ["request"]}, "leaves split=train with no statement: add one of sentence"),
        ({"forms": ["yaml"]}, "leaves split=validation with nothing: add one of request"),
    ],
)
def test_refuses_kinds_that_are_not_there(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RetrievalBatches(options(**changes), ByteTokenizer())


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_where_it_was(workers: int) -> None:
    config = options(context_length=256, tokens_per_batch=512, num_workers=workers)
    data = RetrievalDataModule(config, ByteTokenizer())
    data.load_state_dict({"next_step": 5, "context_length": 128})
    for expected, got in zip(range(5, 9), data.train_dataloader(), strict=False):
        assert got["step"] == expected
        reference = batch(config, step=expected, context_length=128)
        for key in ("input_ids", "position_ids", "answer_mask"):
            assert got[key].equal(reference[key])
    assert data.state_dict() == {"next_step": 5, "context_length": 128}
    data.trainer = SimpleNamespace(
        training=True, accumulate_grad_batches=1, distributed_sampler_kwargs={}
    )  # type: ignore[assignment]
    data.set_context_length(256)
    longer = data.on_before_batch_transfer(reference, 0)
    assert longer["input_ids"].equal(batch(config, step=8, context_length=256)["input_ids"])
    assert data.state_dict() == {"next_step": 9, "context_length": 256}


def test_position_skips_and_their_limit() -> None:
    config = options(max_position=2**16, tokens_per_batch=32768)
    positions = batch(config)["position_ids"]
    assert (positions.diff(dim=-1) >= 1).all()
    assert 2**15 < positions.max() < 2**16
    plain = batch(options(skip_probability=0.0))["position_ids"]
    assert plain.equal(torch.arange(1024).expand(8, -1))


def test_facts_are_strewn_into_the_users_text(tmp_path: Path) -> None:
    books = {
        "train": [f"The {n} whale number {n} swam past us. Nobody saw it go." for n in range(400)],
        "val": [f"Snow fell on hut {n} all night! Who lived there then?" for n in range(400)],
    }
    (tmp_path / "train.txt").write_text("\n\n".join(books["train"]))
    with lzma.open(tmp_path / "val.jsonl.xz", "wt") as file:
        file.writelines(f'"{line}"\n' for line in books["val"])
    files = {"train_files": [f"{tmp_path}/train.txt"], "val_files": [f"{tmp_path}/val.jsonl.xz"]}
    for tokenizer in (ByteTokenizer(), bpe()):
        maker = RetrievalBatches(options(**files, haystack_weights={"text": 1.0}), tokenizer)
        for split, mark in (
            ("train", "whale number"),
            ("validation", "Snow fell"),
            ("test", "Snow fell"),
        ):
            ids = maker(split=split, step=0, rank=0, context_length=2048)["input_ids"]
            for text in (tokenizer.decode(row) for row in ids):
                assert text.count(mark) >= 3
                assert ("whale" in text) == (split == "train")
                assert "The grass is green" not in text
    both = RetrievalBatches(options(train_files=files["train_files"]), ByteTokenizer())
    rows = torch.cat(
        [both(split="train", step=s, rank=0, context_length=512)["input_ids"] for s in range(4)]
    )
    share = np.mean(["whale" in bytes(row.tolist()).decode() for row in rows])
    assert 0.3 < share < 0.7  # 3 of 6
    text = bytes(
        both(split="validation", step=0, rank=0, context_length=512)["input_ids"].flatten().tolist()
    )
    assert b"whale" not in text


def test_text_beyond_the_limit_is_said_to_be_unused(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("It rains. " * 150_000)
    config = options(train_files=[f"{tmp_path}/long.txt"], text_megabytes=1)
    with pytest.warns(
        UserWarning, match="data.train_files: more than data.text_megabytes=1 of text"
    ):
        RetrievalBatches(config, ByteTokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 100}, "data.context_length=100: must be at least 128"),
        ({"tokens_per_batch": 1000}, "data.tokens_per_batch=1000"),
        ({"task_weights": {"facts": 1.0}}, "unknown ['facts']; choose from fact, profile"),
        ({"task_weights": {"fact": 0.0}}, "one above 0"),
        (
            {"haystack_weights": {"hay": 1.0}},
            "unknown ['hay']; choose from noise, random, words, text",
        ),
        (
            {"haystack_weights": {"text": 1.0}},
            "leaves nothing but text: give data.train_files and data.val_files",
        ),
        ({"haystack_weights": {}}, "one above 0"),
        ({"fact_share": 1.0}, "data.fact_share=1.0: must be above 0, at most 0.9"),
        ({"train_files": "book.txt"}, "data.train_files='book.txt': must be a list"),
        ({"format": "pdf"}, "data.format='pdf': choose from auto, text"),
        ({"text_megabytes": 0}, "data.text_megabytes=0: must be at least 1"),
        ({"facts_fraction": 1.1}, "data.facts_fraction=1.1: must be in [0, 1]"),
        ({"least_fact_share": 0.0}, "data.least_fact_share=0.0: must be above 0, at most 1"),
        ({"least_document_tokens": -1}, "data.least_document_tokens=-1: must be at least 0"),
        ({"question_weights": {"up": 1.0}}, "unknown ['up']; choose from along, end, chat"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        options(**changes)


def test_refuses_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.val_files: there is no file 'none.txt'"):
        RetrievalBatches(options(val_files=["none.txt"]), ByteTokenizer())
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"data.train_files: the files hold no text"):
        RetrievalBatches(options(train_files=[f"{tmp_path}/blank.jsonl"]), ByteTokenizer())
    data = RetrievalDataModule(options(), ByteTokenizer())
    with pytest.raises(ValueError, match="must lie between 128 and data.context_length=2048"):
        data.set_context_length(64)
