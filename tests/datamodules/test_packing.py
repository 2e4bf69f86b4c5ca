"""Packing against its definition: concatenate, cut, and number the runs, written out naively."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ic.datamodules.packing import PackedRow, collate_rows, cut_rows, pack_documents, pack_whole

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def make_documents(sizes: list[int]) -> list[tuple[int, np.ndarray]]:
    """Document d of the list holds 100 d, 100 d + 1, ...: every token says where it is from."""
    return [(d, np.arange(size) + 100 * d) for d, size in enumerate(sizes)]


def expected_batch(sizes: list[int], T: int) -> dict[str, list[list[int]]]:
    """The batch contract token by token, in plain Python; pad token 7."""
    stream = [(d, 100 * d + i) for d, size in enumerate(sizes) for i in range(size)]
    out: dict[str, list[list[int]]] = {
        "input_ids": [],
        "labels": [],
        "position_ids": [],
        "document_ids": [],
    }
    for start in range(0, len(stream), T):
        part: list[tuple[int | None, int]] = list(stream[start : start + T])
        part += [(None, 7)] * (T - len(part))
        run, position = -1, 0
        row: list[tuple[int, int, int, int]] = []
        for i, (document, token) in enumerate(part):
            first = i == 0 or document != part[i - 1][0]
            run, position = (run + 1, 0) if first else (run, position + 1)
            row.append((token, -100 if first or document is None else token, position, run))
        for key, values in zip(out, zip(*row, strict=True), strict=True):
            out[key].append(list(values))
    return out


def test_a_batch_written_out() -> None:
    # Documents of 3, 2 and 6 tokens in rows of 4: the third goes over three rows.
    rows = list(pack_documents(make_documents([3, 2, 6]), 4))
    batch = collate_rows([row.runs for row in rows], 4, pad_token_id=7)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 100], [101, 200, 201, 202], [203, 204, 205, 7]]
    assert batch["labels"].tolist() == [
        [-100, 1, 2, -100],
        [-100, -100, 201, 202],
        [-100, 204, 205, -100],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 0]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert [(row.mark, row.num_used_tokens) for row in rows] == [(1, 1), (2, 3), (2, 6)]
    types = {key: value.dtype for key, value in batch.items()}
    assert types == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "document_ids": torch.int32,
    }


@settings(max_examples=200)
@given(lengths, st.integers(1, 17))
def test_packing_equals_its_definition(sizes: list[int], T: int) -> None:
    rows = list(pack_documents(make_documents(sizes), T))
    batch = collate_rows([row.runs for row in rows], T, pad_token_id=7)
    expected = expected_batch(sizes, T)
    assert {key: value.tolist() for key, value in batch.items()} == {
        key: value if value else [] for key, value in expected.items()
    }


@settings(max_examples=200)
@given(lengths, st.integers(1, 17), st.data())
def test_packing_goes_on_after_any_row(sizes: list[int], T: int, data: st.DataObject) -> None:
    documents = make_documents(sizes)
    rows = list(pack_documents(documents, T))
    if not rows:
        return
    stop = data.draw(st.integers(0, len(rows) - 1))
    row = rows[stop]
    again = pack_documents(documents[row.mark :], T, row.num_used_tokens)
    assert [flatten(r) for r in again] == [flatten(r) for r in rows[stop + 1 :]]


@settings(max_examples=100)
@given(lengths.filter(lambda sizes: sum(sizes) >= 12), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_cut_rows_equals_packing_at_that_length(sizes: list[int], length: int) -> None:
    long = [row.runs for row in pack_documents(make_documents(sizes), 12)][: sum(sizes) // 12]
    short = [row.runs for row in pack_documents(make_documents(sizes), length)]
    short = short[: len(long) * (12 // length)]
    cut = cut_rows({**collate_rows(long, 12, pad_token_id=7), "step": 5}, length)
    expected = collate_rows(short, length, pad_token_id=7)
    assert cut.pop("step") == 5
    assert cut.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(cut[key], value), key
        assert cut[key].dtype == value.dtype


def test_cut_rows_refuses_a_length_that_leaves_a_rest() -> None:
    batch = collate_rows([[np.arange(12)]], 12, pad_token_id=7)
    with pytest.raises(ValueError, match="rows of 12 tokens into rows of 5"):
        cut_rows(batch, 5)


def flatten(row: PackedRow) -> tuple[list[list[int]], int, int]:
    return [run.tolist() for run in row.runs], row.mark, row.num_used_tokens


def test_pack_whole_cuts_nothing() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 500).tolist()
    rows = pack_whole(lengths, 100)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100
    assert len(rows) < 1.1 * sum(lengths) / 100
    with pytest.raises(ValueError, match="piece 1 has 101 tokens"):
        pack_whole([1, 101], 100)
