"""Chunked cross-entropy against PyTorch's on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ic.model import loss as loss_module
from ic.model.head import Head
from ic.model.loss import selective_log_probs, shift_labels, summed_linear_cross_entropy


class Wrapped(torch.nn.Linear):
    """A head that is no stock layer, as one with an adapter is none."""


def make_head(kind: type[torch.nn.Linear], weight: torch.Tensor) -> Head:
    layer = kind(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.detach())
    return Head(layer, summed_linear_cross_entropy)


@pytest.mark.parametrize("kind", [torch.nn.Linear, Wrapped])
@pytest.mark.parametrize("tokens", [1, 7, 8, 23])
def test_equals_whole_logits(
    tokens: int, kind: type[torch.nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 6, generator=generator, requires_grad=True)
    head = make_head(kind, torch.randn(11, 6, generator=generator))
    weight = head.layer.weight
    assert isinstance(weight, torch.Tensor)
    labels = torch.randint(0, 11, (tokens,), generator=generator)
    if tokens > 1:
        labels[::3] = -100
    got = head.mean_cross_entropy(hidden, labels)
    got_grads = torch.autograd.grad(got, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        got_grads, torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_targets_is_zero() -> None:
    head = make_head(torch.nn.Linear, torch.randn(5, 4))
    assert head.mean_cross_entropy(torch.randn(3, 4), torch.full((3,), -100)) == 0


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product with the head, in chunks of ten."""
    sizes: list[int] = []
    linear = F.linear

    def watch(x: torch.Tensor, w: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(x.shape[0])
        return linear(x, w, *rest)

    monkeypatch.setattr(F, "linear", watch)
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 10)
    return sizes


def test_never_holds_all_logits(projected: list[int]) -> None:
    hidden = torch.randn(95, 4, requires_grad=True)
    head = make_head(torch.nn.Linear, torch.randn(50, 4))
    head.mean_cross_entropy(hidden, torch.zeros(95, dtype=torch.long)).backward()
    assert max(projected) == 10


def test_shift() -> None:
    assert shift_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]


@pytest.mark.parametrize("tokens", [1, 8, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_selective_log_probs(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    got = selective_log_probs(hidden, weight, targets)
    logits = F.linear(hidden, weight.to(dtype)).float()
    expected = logits.log_softmax(-1)[torch.arange(tokens), targets]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    ours = torch.autograd.grad(got, (hidden, weight), upstream)
    theirs = torch.autograd.grad(expected, (hidden, weight), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        # In bfloat16 each side rounds the gradient of the logits once.
        error = (mine.float() - other.float()).norm() / other.float().norm()
        assert error < (8e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 8, 23])
def test_log_probs_through_a_wrapped_head(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (tokens,), generator=generator)
    weight = torch.randn(11, 6, generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    results = []
    for kind in (torch.nn.Linear, Wrapped):
        head = make_head(kind, weight)
        log_probs = head.log_probs(hidden, targets)
        grads = torch.autograd.grad(log_probs, (hidden, *head.layer.parameters()), upstream)
        results.append([log_probs, head.predicted(hidden), *grads])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_selective_log_probs_of_a_frozen_head_and_of_no_tokens() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    selective_log_probs(hidden, weight, torch.tensor([0, 1, 4])).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    none = hidden[:0]
    assert selective_log_probs(none, weight, torch.tensor([], dtype=torch.long)).shape == (0,)


def test_selective_log_probs_hold_one_chunk_of_logits(projected: list[int]) -> None:
    hidden = torch.randn(95, 4, requires_grad=True)
    selective_log_probs(
        hidden, torch.randn(50, 4), torch.zeros(95, dtype=torch.long)
    ).sum().backward()
    assert len(projected) == 20
    assert max(projected) == 10
