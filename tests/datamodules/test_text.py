"""What text batches hold, told from the batches alone: documents are taken out of them again."""

from __future__ import annotations

import gzip
import json
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ic.datamodules.options import TextDataOptions
from ic.datamodules.text import TextDataModule
from ic.model.byte_tokenizer import ByteTokenizer

Corpus = Callable[..., list[str]]
T = 64


def make(tokenizer: ByteTokenizer, files: list[str], **settings: Any) -> TextDataModule:
    settings = {"context_length": T, "tokens_per_batch": 2 * T, "shuffle_buffer": 7, **settings}
    return TextDataModule(TextDataOptions(train_files=files, **settings), tokenizer)


def on_rank(datamodule: TextDataModule, rank: int, num_replicas: int) -> TextDataModule:
    kwargs = {"rank": rank, "num_replicas": num_replicas}
    datamodule.trainer = SimpleNamespace(
        distributed_sampler_kwargs=kwargs, accumulate_grad_batches=1, num_devices=1
    )  # type: ignore[assignment]
    return datamodule


def take(datamodule: TextDataModule, count: int) -> list[dict[str, Any]]:
    return list(islice(datamodule.train_dataloader(), count))


def read_back(batches: list[dict[str, Any]], tokenizer: ByteTokenizer) -> list[str]:
    """The documents of batches in a row: the tokens end to end, split after each eos."""
    tokens = torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.eos_token_id:
            found.append([])
        else:
            found[-1].append(token)
    return [bytes(document).decode() for document in found[:-1]]  # the last has not ended


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    assert len(left) == len(right) > 0
    return all(
        a.keys() == b.keys()
        and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
        for a, b in zip(left, right, strict=True)
    )


def epoch_batches(documents: list[str], epochs: int = 1) -> int:
    """Batches of 2 T tokens that hold `epochs` passes in full, by counting bytes."""
    return -(-epochs * sum(len(text.encode()) + 1 for text in documents) // (2 * T))


@pytest.mark.parametrize(("num_files", "shuffle_buffer"), [(1, 7), (40, 1), (3, 1000)])
def test_an_epoch_holds_each_document_once_and_the_next_in_another_order(
    tokenizer: ByteTokenizer,
    documents: list[str],
    write_corpus: Corpus,
    num_files: int,
    shuffle_buffer: int,
) -> None:
    files = write_corpus(documents, "jsonl", num_files)
    datamodule = make(tokenizer, files, shuffle_buffer=shuffle_buffer)
    found = read_back(take(datamodule, epoch_batches(documents, 3)), tokenizer)
    passes = [found[i : i + 40] for i in (0, 40, 80)]
    assert [sorted(each) == sorted(documents) for each in passes] == [True, True, True]
    assert passes[0] != documents
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_each_block_has_its_own_permutation(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    datamodule = make(tokenizer, write_corpus(documents, "jsonl"), shuffle_buffer=10)
    found = read_back(take(datamodule, epoch_batches(documents, 2)), tokenizer)
    places = [documents.index(text) for text in found[:80]]
    blocks = [places[i : i + 10] for i in range(0, 80, 10)]
    # Block b of a pass is documents 10 b to 10 b + 9 in some order, never the same twice.
    orders = {tuple(place - 10 * (b % 4) for place in block) for b, block in enumerate(blocks)}
    assert [sorted(order) for order in orders] == [list(range(10))] * 8


def test_without_shuffling_the_order_is_the_files(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    datamodule = make(tokenizer, write_corpus(documents, "jsonl", 3), shuffle_buffer=0)
    found = read_back(take(datamodule, epoch_batches(documents, 2)), tokenizer)
    assert found[:80] == documents + documents


def test_runs_follow_the_contract(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    batches = take(make(tokenizer, write_corpus(documents, "jsonl")), 30)
    assert [batch["step"] for batch in batches] == list(range(30))
    assert [type(batch["step"]) for batch in batches] == [int] * 30
    num_targets = 0
    for batch in batches:
        assert batch["input_ids"].shape == (2, T)
        for row in range(2):
            tokens, labels, positions, runs = (
                batch[key][row].tolist()
                for key in ("input_ids", "labels", "position_ids", "document_ids")
            )
            # A run begins with the row and after each eos; nothing else is looked at.
            run, position = -1, 0
            for i in range(T):
                if i == 0 or tokens[i - 1] == tokenizer.eos_token_id:
                    run, position = run + 1, 0
                    assert labels[i] == -100  # else its neighbour would predict it
                else:
                    position += 1
                    assert labels[i] == tokens[i]
                    num_targets += 1
                assert (positions[i], runs[i]) == (position, run)
    assert num_targets > 30 * 2 * (T - 4)


def test_eos_and_bos_are_settings(tokenizer: ByteTokenizer, write_corpus: Corpus) -> None:
    files = write_corpus(["abc", "de"], "jsonl")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for settings, expected in (
        ({}, [*b"abc", eos, *b"de", eos]),
        ({"prepend_bos": True}, [bos, *b"abc", eos, bos, *b"de", eos]),
        ({"append_eos": False}, [*b"abcde"]),
    ):
        size = len(expected)
        datamodule = make(
            tokenizer,
            files,
            shuffle_buffer=0,
            context_length=size,
            tokens_per_batch=size,
            **settings,
        )
        assert take(datamodule, 1)[0]["input_ids"].tolist() == [expected]


def test_a_document_that_spells_a_special_token_does_not_become_one(
    tokenizer: ByteTokenizer, write_corpus: Corpus
) -> None:
    text = "before <|eos|> after <|bos|>"
    datamodule = make(
        tokenizer, write_corpus([text], "jsonl"), context_length=28, tokens_per_batch=28
    )
    assert bytes(take(datamodule, 1)[0]["input_ids"][0].tolist()).decode() == text


def test_formats_give_the_same_batches(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus, tmp_path: Path
) -> None:
    count = epoch_batches(documents, 2)
    jsonl = write_corpus(documents, "jsonl", 2)
    expected = take(make(tokenizer, jsonl), count)
    assert same(take(make(tokenizer, write_corpus(documents, "parquet", 2)), count), expected)
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in sorted(Path(jsonl[0]).parent.iterdir()):
        (packed / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert same(take(make(tokenizer, [f"{packed}/*"]), count), expected)

    in_order = take(make(tokenizer, jsonl, shuffle_buffer=0), count)
    files = write_corpus(documents, "text", len(documents))
    one_a_file = take(make(tokenizer, files, shuffle_buffer=0), count)
    for batch in (*in_order, *one_a_file):
        del batch["position"]  # of course another file and row
    assert same(one_a_file, in_order)


def test_text_files_by_line_and_paragraph(tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "odd [name]*.txt"  # taken literally, because it exists
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nthree\nfour")
    expected = {
        "file": ["one\ntwo\n\nthree\nfour"],
        "paragraph": ["one\ntwo", "three\nfour"],
        "line": ["one", "two", "three", "four"],
    }
    for unit, texts in expected.items():
        datamodule = make(
            tokenizer,
            [str(file)],
            document_unit=unit,
            shuffle_buffer=0,
            context_length=5,
            tokens_per_batch=5,
        )
        assert read_back(take(datamodule, 5), tokenizer)[: len(texts)] == texts, unit


@pytest.mark.parametrize("num_streams", [1, 2])
def test_workers_change_nothing(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus, num_streams: int
) -> None:
    files = write_corpus(documents, "parquet", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers that share nothing, and few cores
        batches = [
            take(make(tokenizer, files, num_streams=num_streams, num_workers=workers), 12)
            for workers in (0, 1, 2, 3)
        ]
    assert [same(each, batches[0]) for each in batches[1:]] == [True, True, True]


def test_workers_that_do_not_divide_the_streams_are_warned_about(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    files = write_corpus(documents, "jsonl")
    with pytest.warns(
        UserWarning, match=r"data\.num_workers=2 does not divide data\.num_streams=3"
    ):
        make(tokenizer, files, num_workers=2, num_streams=3).train_dataloader()


def test_seed_decides_the_order(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    files = write_corpus(documents, "jsonl")
    first, again, other = (take(make(tokenizer, files, seed=seed), 10) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("num_files", [1, 5, 40])
def test_ranks_and_streams_share_no_document_in_any_epoch(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus, num_files: int
) -> None:
    files = write_corpus(documents, "jsonl", num_files)
    seen: list[Counter[str]] = []
    for rank in range(2):
        datamodule = on_rank(make(tokenizer, files, num_streams=2), rank, 2)
        batches = take(datamodule, 2 * epoch_batches(documents))
        for stream in range(2):
            seen.append(Counter(read_back(batches[stream::2], tokenizer)))
    # About four passes over each quarter.
    assert [len(each) for each in seen] == [10, 10, 10, 10]
    assert [min(each.values()) >= 3 for each in seen] == [True] * 4
    assert set().union(*seen) == set(documents)


def test_evaluation_holds_every_token_once_and_pads_the_end(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    files = write_corpus(documents, "jsonl", 3)
    whole = list(make(tokenizer, [], val_files=files).val_dataloader())
    assert [batch["step"] for batch in whole] == list(range(len(whole)))
    rows = torch.cat([batch["input_ids"] for batch in whole])
    stream = [token for text in documents for token in [*text.encode(), tokenizer.eos_token_id]]
    padding = -len(stream) % T
    assert rows.flatten().tolist() == stream + [tokenizer.pad_token_id] * padding
    assert padding > 1
    last = {key: value[-1] for key, value in whole[-1].items() if key != "step"}
    assert last["labels"][-padding:].tolist() == [-100] * padding
    assert last["position_ids"][-padding:].tolist() == list(range(padding))
    # Padding is a run of its own.
    assert last["document_ids"][-padding - 1 :].diff().tolist() == [1] + [0] * (padding - 1)


def test_evaluation_over_ranks_is_the_same_rows_in_as_many_batches(
    tokenizer: ByteTokenizer, write_corpus: Corpus
) -> None:
    # 9 full rows over 4 ranks by 2: the last batch has one row for one rank, none for three.
    text = "x" * (9 * T - 1)
    files = write_corpus([text], "jsonl")
    alone = list(make(tokenizer, [], val_files=files).val_dataloader())
    ranks = [
        list(on_rank(make(tokenizer, [], val_files=files), rank, 4).val_dataloader())
        for rank in range(4)
    ]
    assert [len(each) for each in ranks] == [2, 2, 2, 2]
    targets = [sum(int((b["labels"] != -100).sum()) for b in each) for each in [alone, *ranks]]
    assert targets[0] == 9 * (T - 1)
    assert targets[1:] == [3 * (T - 1), 2 * (T - 1), 2 * (T - 1), 2 * (T - 1)]
    assert ranks[1][1]["input_ids"].tolist() == [[tokenizer.pad_token_id] * T]
    assert ranks[1][1]["labels"].tolist() == [[-100] * T]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_evaluation_holds_every_token_once_with_workers_too(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus, num_workers: int
) -> None:
    files = write_corpus(documents, "jsonl", 2)
    alone, shared = (
        list(
            on_rank(
                make(tokenizer, files, val_files=files, num_workers=workers, num_streams=2), 0, 1
            ).val_dataloader()
        )
        for workers in (0, num_workers)
    )
    assert same(alone, shared)


def test_no_validation_files_is_no_validation(
    tokenizer: ByteTokenizer, documents: list[str], write_corpus: Corpus
) -> None:
    assert make(tokenizer, write_corpus(documents, "jsonl")).val_dataloader() == []


def test_the_configuration_group_holds_the_schema_s_fields() -> None:
    values = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "text.yaml")
    assert values.pop("defaults")[:2] == ["text_schema", "_self_"]
    values.seed = 0  # the run's
    schema = OmegaConf.structured(TextDataOptions)
    config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert isinstance(config, TextDataOptions)
    assert set(values) == set(json.loads(json.dumps(vars(config))))
    assert config.train_files == []
