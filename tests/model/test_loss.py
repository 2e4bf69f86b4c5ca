"""Chunked cross-entropy against PyTorch's on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ic.model import loss as loss_module
from ic.model.loss import linear_cross_entropy, shift_labels


@pytest.mark.parametrize("tokens", [1, 7, 8, 23])
def test_equals_whole_logits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (tokens,), generator=generator)
    if tokens > 1:
        labels[::3] = -100
    got = linear_cross_entropy(hidden, weight, labels)
    got_grads = torch.autograd.grad(got, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        got_grads, torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_targets_is_zero() -> None:
    got = linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.full((3,), -100))
    assert got == 0


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    linear = F.linear

    def watch(x: torch.Tensor, w: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(x.shape[0])
        return linear(x, w, *rest)

    monkeypatch.setattr(F, "linear", watch)
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 10)
    hidden = torch.randn(95, 4, requires_grad=True)
    linear_cross_entropy(hidden, torch.randn(50, 4), torch.zeros(95, dtype=torch.long)).backward()
    assert max(sizes) == 10


def test_shift() -> None:
    assert shift_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]
