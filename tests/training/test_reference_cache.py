"""The reference cache's file, shared by ranks that arrive in any order."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.training.reference_cache import ReferenceCache

IDENTITY = {"weights": "abc"}
KEYS = ("a", "b", "c", "d")


def row(key: str) -> dict[str, object]:
    return {"row": f"train.jsonl:{key}", "chosen": [-1.5, 0.0], "rejected": [-2.5, 0.0]}


@pytest.mark.parametrize("overtaken_at", ["written", "finished"])
def test_a_rank_that_the_writer_overtakes_has_every_row(tmp_path: Path, overtaken_at: str) -> None:
    path = tmp_path / "reference.jsonl"
    ranks = [ReferenceCache(path, IDENTITY) for _ in range(2)]
    for i, key in enumerate(KEYS):
        ranks[i % 2].append(key, row(key), rank=i % 2)

    def barrier(name: str) -> None:
        # The other rank, before it leaves this barrier, finds that the writer has done all.
        if name.endswith(overtaken_at):
            ranks[0].gather(KEYS, is_writer=True, barrier=lambda name: None)

    ranks[1].gather(KEYS, is_writer=False, barrier=barrier)
    assert [cache.missing(KEYS) for cache in ranks] == [[], []]
    assert [p.name for p in tmp_path.iterdir()] == ["reference.jsonl"]
    assert list(ReferenceCache(path, None).rows) == list(KEYS)  # in the order of the data


def test_reading_leaves_another_ranks_cut_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    ReferenceCache(path, IDENTITY).append("a", row("a"), rank=1)
    partial = tmp_path / "reference.jsonl.rank1.partial"
    with partial.open("a") as file:
        file.write('{"key": "half a li')
    before = partial.read_text()
    cache = ReferenceCache(path, IDENTITY)  # rank 1 may be writing that line at this moment
    assert cache.missing(KEYS) == ["b", "c", "d"]
    assert partial.read_text() == before
    cache.append("b", row("b"), rank=1)  # the next owner of the file drops it
    assert ReferenceCache(path, IDENTITY).missing(KEYS) == ["c", "d"]
