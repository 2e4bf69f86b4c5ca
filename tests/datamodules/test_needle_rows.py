"""Conversations about long texts, generated between those of the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from ic.datamodules.batch import Batch
from ic.datamodules.epochs import EpochBatches
from ic.datamodules.options import SFTDataOptions
from ic.datamodules.sft import SFTDataModule
from ic.model.byte_tokenizer import ByteTokenizer

SIZES = {"context_length": 512, "tokens_per_batch": 1024}
CHATS = "bundled:conversations-val.jsonl"


@pytest.fixture
def book(tmp_path: Path) -> str:
    text = " ".join(f"The whale number {n} swam past." for n in range(500))
    (tmp_path / "book.txt").write_text(text)
    return str(tmp_path / "book.txt")


def sft(**changes: object) -> SFTDataModule:
    options = SFTDataOptions(**{"train_files": [CHATS], **SIZES, **changes})
    return SFTDataModule(options, ByteTokenizer())


def batches(data: SFTDataModule, count: int) -> list[Batch]:
    return list(islice(iter(data.train_dataloader()), count))


def is_generated(batch: Batch) -> bool:
    return "whale" in bytes(batch["input_ids"][0].clamp(max=255).tolist()).decode(errors="ignore")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_a_share_is_generated_and_the_users_conversations_stay_in_their_order(book: str) -> None:
    mixed = batches(sft(needle_fraction=0.25, needle_files=[book]), 8)
    plain = batches(sft(), 6)
    assert [is_generated(batch) for batch in mixed] == [False, False, False, True] * 2
    assert [batch["step"] for batch in mixed] == list(range(8))
    for ours, theirs in zip((b for b in mixed if not is_generated(b)), plain, strict=True):
        assert ours["place"] == theirs["place"]
        assert ours["input_ids"].equal(theirs["input_ids"])
    assert all(set(batch) == set(plain[0]) for batch in mixed)  # of one form
    assert {batch["input_ids"].shape for batch in mixed} == {(2, 512)}


@pytest.mark.usefixtures("cache")
def test_only_what_the_assistant_writes_is_a_target(book: str) -> None:
    tokenizer = ByteTokenizer()
    data = sft(needle_fraction=0.5, needle_files=[book], max_position=4096)
    rows = [batch for batch in batches(data, 8) if is_generated(batch)]
    assert len(rows) == 4
    for batch in rows:
        assert not batch["document_ids"].any()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = tokenizer.decode(ids)
            said = re.findall(r"<\|assistant\|>(.*?<\|eos\|>)", text, re.DOTALL)
            assert said
            assert tokenizer.decode(labels[labels != -100]) == "".join(said)
            assert labels[labels != -100].equal(ids[labels != -100])
    positions = torch.cat([batch["position_ids"] for batch in rows])
    skipping = positions[:, -1] > 511
    assert skipping.any()
    assert not skipping.all()
    assert positions.max() < 4096


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_it_was(book: str, workers: int) -> None:
    changes = {"needle_fraction": 0.5, "needle_files": [book]}
    whole = batches(sft(**changes), 8)
    for stop in (3, 4):
        data = sft(**changes, num_workers=workers)
        data.load_state_dict(
            {"next_step": stop, "place": whole[stop - 1]["place"], "data": data._digest()}
        )
        for got, expected in zip(batches(data, 8 - stop), whole[stop:], strict=True):
            for key in ("input_ids", "labels", "position_ids"):
                assert got[key].equal(expected[key])
            assert got["place"] == expected["place"]


@pytest.mark.usefixtures("cache")
def test_ranks_generate_in_the_same_steps_rows_of_their_own(book: str) -> None:
    data = sft(needle_fraction=0.5, needle_files=[book])

    def of_rank(rank: int) -> Iterator[Batch]:
        stream = EpochBatches(
            data._rows_of_epoch, data._collate, 2, rank, 2, (0, (0, 0)), data.generated
        )
        return iter(stream)

    for one, other in islice(zip(of_rank(0), of_rank(1), strict=True), 6):
        assert is_generated(one) == is_generated(other)
        assert one["place"] == other["place"]
        assert not one["input_ids"].equal(other["input_ids"])


def test_without_files_the_text_is_synthetic() -> None:
    batch = batches(sft(needle_fraction=0.5), 2)[1]
    assert "grass is green" in bytes(batch["input_ids"][0].clamp(max=255).tolist()).decode(
        errors="ignore"
    )


def test_files_and_positions_are_checked(book: str) -> None:
    for changes, message in (
        ({"needle_fraction": 1.0}, "data.needle_fraction=1.0: must be from 0 to at most 0.9"),
        ({"needle_files": [book]}, "data.needle_fraction=0 generates no rows"),
        ({"max_position": 4096}, "data.needle_fraction=0 generates no rows"),
        ({"needle_fraction": 0.5, "max_position": 100}, "must be at least data.context_length=512"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTDataOptions(**{**SIZES, **changes})
    assert SFTDataOptions(**SIZES, needle_fraction=0.5, max_position=4096).positions[1] == 4096
    with pytest.raises(ValueError, match=r"data.needle_files: there is no file 'gone.txt'"):
        sft(needle_fraction=0.5, needle_files=["gone.txt"]).check_files()
