"""The greedy decoder: likelihoods behind a shared beginning, answers that end early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM


@pytest.mark.parametrize("piece", [1000, 5])
def test_targets_of_prompts_that_begin_alike_are_those_of_whole_passes(
    make_model: Callable[..., MLAForCausalLM], piece: int
) -> None:
    model = make_model()
    decoder = GreedyDecoder(model, piece)
    generator = torch.Generator().manual_seed(3)
    first_BT = torch.randint(3, 97, (2, 31), generator=generator)
    longer_BT = torch.cat([first_BT[:, :20], torch.randint(3, 97, (2, 17), generator=generator)], 1)
    # The likeliest tokens at the end of one row, so that both answers to the question occur.
    longer_BT[1:, 30:] = decoder.answers(longer_BT[1:, :30], 7)
    processed: list[int] = []
    model.register_forward_pre_hook(lambda _, args: processed.append(args[0].shape[1]))
    for ids_BT, start, new in ((first_BT, 25, 30), (longer_BT, 22, 16), (longer_BT, 1, 36)):
        processed.clear()
        nats_BS, likeliest_BS = decoder.targets(ids_BT, start)
        assert sum(processed) == new  # of the second, 20 tokens were there already
        with torch.no_grad():
            logits = model(ids_BT).logits.float()[:, start - 1 : -1]
        targets_BS = ids_BT[:, start:]
        expected = -logits.log_softmax(-1).gather(-1, targets_BS[..., None])[..., 0]
        torch.testing.assert_close(nats_BS, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(likeliest_BS, logits.argmax(-1) == targets_BS)
    assert bool(likeliest_BS[1, -7:].all())
    assert not bool(likeliest_BS.all())


def test_an_answer_ends_where_it_is_told_to(make_model: Callable[..., MLAForCausalLM]) -> None:
    model = make_model()
    decoder = GreedyDecoder(model, 1000)
    ids_BT = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(4))
    whole_BT = decoder.answers(ids_BT, 9)
    seen: list[torch.Tensor] = []

    def ended(out_BT: torch.Tensor) -> bool:
        seen.append(out_BT.clone())
        return out_BT.shape[1] == 4

    assert torch.equal(decoder.answers(ids_BT, 9, ended), whole_BT[:, :4])
    assert [out.shape[1] for out in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[2], whole_BT[:, :3])
    assert torch.equal(decoder.answers(ids_BT, 9), whole_BT)  # the tokens behind are forgotten


def prompts_of(lengths: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("piece", [1000, 3])
@pytest.mark.parametrize("ends", [(), (5, 17)])
def test_prompts_of_near_lengths_are_answered_as_each_alone(
    make_model: Callable[..., MLAForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    ends: tuple[int, ...],
) -> None:
    monkeypatch.setattr("ic.inference.greedy.PADDING", 4)  # as if they were long
    model = make_model()
    decoder = GreedyDecoder(model, piece, ends=ends)
    first = prompts_of((40, 37, 12, 41, 40), 6)  # the third is much shorter
    # These begin as they did, and what they have in common is there already.
    pairs = zip(first, prompts_of((9, 8, 0, 12, 9), 7), strict=True)
    second = [torch.cat([p[:30], q]) for p, q in pairs if len(q)]
    alone = {
        n: [GreedyDecoder(model, piece, ends=ends).answers(p[None], 12)[0] for p in prompts]
        for n, prompts in enumerate((first, second))
    }
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    for n, (prompts, read) in enumerate(((first, [12, 4 * 41]), (second, [4 * 12]))):
        shapes.clear()
        together = decoder.answers_of_any_length(prompts, 12)
        for answer, expected in zip(together, alone[n], strict=True):
            assert answer[: len(expected)].equal(expected)
            assert set(answer[len(expected) :].tolist()) <= set(ends[:1])
        long = [(rows, tokens) for rows, tokens in shapes if tokens > 1]
        if piece == 1000:
            assert [rows * tokens for rows, tokens in long] == read
        assert {rows for rows, _ in shapes} == ({1, 4} if n == 0 else {4})
    assert len({tuple(answer.tolist()) for answer in alone[0]}) == 5


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ((16, 80, 80, 17), [4, 4]),  # padded by 64 tokens at most
        ((16, 81, 81), [1, 1, 2, 2]),
        ((560, 630), [2, 2]),  # or by an eighth
        ((560, 631), [1, 1, 1, 1]),
    ],
)
def test_much_longer_prompts_are_answered_apart(
    make_model: Callable[..., MLAForCausalLM], lengths: tuple[int, ...], passes: list[int]
) -> None:
    model = make_model(max_position_embeddings=1024)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    GreedyDecoder(model, 1000).answers_of_any_length(prompts_of(lengths, 6), 2)
    assert rows == passes
