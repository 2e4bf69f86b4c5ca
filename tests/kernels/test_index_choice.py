"""The choice of the highest scores against `torch.topk`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from ic.kernels.triton_index_choice import BLOCK, MAX_CHUNKS, chunks_of, index_choice
from ic.model.selection import choose, ranks_of


def whole(rows: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A range of all keys for each of the rows."""
    first = torch.zeros(1, rows, dtype=torch.int32, device=device)
    return first, first + keys - 1


def assert_is_topk(
    scores: torch.Tensor, first: torch.Tensor, last: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The keys of `torch.topk` over ranks that no two keys share, in order of their place."""
    index, count = index_choice(scores, first, last, top_k)
    place = torch.arange(scores.shape[-1], device=scores.device)
    visible = (place >= first[..., None]) & (place <= last[..., None])
    expected = choose(ranks_of(scores, visible), top_k)
    assert index.dtype == count.dtype == torch.int64
    assert index.shape == expected.index_BTK.shape
    assert count.equal(expected.count_BT)
    for row in range(scores.shape[1]):
        for batch in range(len(scores)):
            chosen = int(count[batch, row])
            found = index[batch, row]
            assert found[:chosen].equal(expected.index_BTK[batch, row, :chosen].sort().values)
            repeated = found[0] if chosen else torch.zeros_like(found[0])
            assert found[chosen:].equal(repeated.expand(len(found) - chosen))
    return index


@pytest.mark.parametrize("top_k", [1, 7, 100, 2048, 3000])
@pytest.mark.parametrize("keys", [1, 99, 100, 101, 2047, 2049, 5000])
def test_random_scores(device: torch.device, keys: int, top_k: int) -> None:
    scores = torch.randn(1, 2, keys, generator=torch.Generator().manual_seed(keys)).to(device)
    assert_is_topk(scores, *whole(2, keys, device), top_k)


@pytest.mark.parametrize("kind", ["equal", "zeros", "few", "infinite", "small", "ordered", "nan"])
@pytest.mark.parametrize("top_k", [1, 1000, 4000])
def test_scores_that_are_hard(device: torch.device, kind: str, top_k: int) -> None:
    """Ties across chunks, zeros of both signs, infinities, and floats that differ in one digit."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 2 * BLOCK + 300, generator=g)
    scores = {
        "equal": torch.full_like(x, -1.5),
        "zeros": torch.where(x > 0, 0.0, -0.0).where(x.abs() < 2, x),
        "few": x.round(),
        "infinite": x.masked_fill(x < 0.5, -torch.inf).masked_fill(x > 2.5, torch.inf),
        "small": 1 + torch.randint(0, 300, x.shape, generator=g) * 2.0**-23,
        "ordered": torch.arange(x.numel()).view_as(x) - x.numel() / 2,
        "nan": x.masked_fill(x > 2.5, torch.nan),
    }[kind].to(device)
    last = torch.full((2, 2), x.shape[-1] - 1, dtype=torch.int32, device=device)
    assert_is_topk(scores, torch.zeros_like(last), last, top_k)


def test_of_equal_scores_the_later_key_is_taken(device: torch.device) -> None:
    scores = torch.tensor([[[0.0, 1.0, -0.0, 1.0, 0.0, -1.0]]], device=device)
    index, count = index_choice(scores, *whole(1, 6, device), 3)
    assert index.tolist() == [[[1, 3, 4]]]
    assert count.tolist() == [[3]]
    index, _ = index_choice(scores, *whole(1, 6, device), 4)
    assert index.tolist() == [[[1, 2, 3, 4]]]


def test_keys_outside_the_range_are_neither_read_nor_chosen(device: torch.device) -> None:
    """Ranges of no key, of one, of `top_k` and around it, and beyond the row on both sides."""
    top_k, keys = 40, 3 * BLOCK
    ranges = [
        (0, -1), (5, 4), (7, 7), (BLOCK, BLOCK + top_k - 1), (BLOCK - 3, BLOCK + top_k - 3),
        (100, 100 + top_k - 2), (BLOCK - 1, BLOCK + 10), (-5, 10), (2 * BLOCK + 9, 2**31 - 1),
        (2**31 - 1, -(2**31)),
    ]  # fmt: skip
    first, last = (
        torch.tensor([x], dtype=torch.int32, device=device) for x in zip(*ranges, strict=True)
    )
    scores = torch.randn(1, len(ranges), keys, generator=torch.Generator().manual_seed(1))
    scores = scores.to(device)
    index = assert_is_topk(scores, first, last, top_k)
    place = torch.arange(keys, device=device)
    hidden = (place < first[..., None]) | (place > last[..., None])
    for unread in (torch.nan, torch.inf):
        assert index_choice(scores.masked_fill(hidden, unread), first, last, top_k)[0].equal(index)


def test_rows_with_other_strides(device: torch.device) -> None:
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 3, 2 * BLOCK + 40, generator=g).to(device)
    last = torch.full((2, 3), BLOCK + 20, dtype=torch.int32, device=device)
    views = (
        wide[..., 3 : BLOCK + 30],
        wide[..., ::2],
        wide.transpose(1, 2).contiguous().transpose(1, 2),
        wide[:, :1].expand(-1, 3, -1),
    )
    for scores in views:
        assert_is_topk(scores, torch.zeros_like(last), last, 50)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 2**20), (16, 2**15), (5000, 2**15),
                                            (1, 2**31 - 2**20), (3, 2**22 + 1)])  # fmt: skip
def test_chunks_hold_every_key(rows: int, keys: int) -> None:
    num_chunks, blocks = chunks_of(rows, keys)
    assert 1 <= num_chunks <= MAX_CHUNKS
    assert (num_chunks - 1) * blocks * BLOCK < keys <= num_chunks * blocks * BLOCK < 2**31


def test_chunks_of_many_blocks_give_the_same(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(1, 2, 5 * BLOCK + 1, generator=torch.Generator().manual_seed(3)).round(
        decimals=1
    )
    first, last = whole(2, scores.shape[-1] - 9, device)
    first = first + BLOCK + 7
    for programs in (1, 6, 2048):
        monkeypatch.setattr("ic.kernels.triton_index_choice._PROGRAMS", programs)
        assert_is_topk(scores.to(device), first, last, 3000)


def test_nothing_to_choose_from(device: torch.device) -> None:
    for batch, rows, keys in ((0, 1, 5), (2, 0, 5), (2, 3, 0)):
        none = torch.zeros(batch, rows, dtype=torch.int32, device=device)
        index, count = index_choice(torch.zeros(batch, rows, keys, device=device), none, none, 4)
        assert index.shape == (batch, rows, min(4, keys))
        assert count.equal(torch.zeros(batch, rows, dtype=torch.int64, device=device))


def test_arguments_that_do_not_fit_are_refused(device: torch.device) -> None:
    scores, (first, last) = torch.zeros(1, 2, 5, device=device), whole(2, 5, device)
    for message, given in {
        "scores is torch.float64": (scores.double(), first, last, 1),
        "scores is torch.float32": (scores[0], first, last, 1),
        "first is torch.int64": (scores, first.long(), last, 1),
        "last is torch.int32": (scores, first, last[:, :1], 1),
        "top_k is 0": (scores, first, last, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            index_choice(*given)


def test_the_operator_is_what_pytorch_expects(device: torch.device) -> None:
    scores = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(4)).to(device)
    last = torch.full((2, 3), 49, dtype=torch.int32, device=device)
    for top_k in (7, 80):
        torch.library.opcheck(
            torch.ops.ic.index_choice.default, (scores, torch.zeros_like(last), last, top_k)
        )


@pytest.mark.gpu
def test_in_a_cuda_graph_it_follows_the_lengths(device: torch.device) -> None:
    scores = torch.randn(2, 1, 2**17, generator=torch.Generator().manual_seed(5)).to(device)
    last = torch.full((2, 1), 2**17 - 1, dtype=torch.int32, device=device)
    first = torch.zeros_like(last)
    index_choice(scores, first, last, 2048)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, count = index_choice(scores, first, last, 2048)
    for length in (2**17, 1, 2048, 70_000):
        last.fill_(length - 1)
        scores.copy_(torch.randn_like(scores))
        graph.replay()
        expected, expected_count = index_choice(scores, first, last, 2048)
        assert index.equal(expected)
        assert count.equal(expected_count)
        assert_is_topk(scores, first, last, 2048)
