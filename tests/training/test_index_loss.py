"""The indexer's loss against the formula, its gradients, its memory, and who learns from what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ic.model import MLAForCausalLM
from ic.model.index_loss import dense_index_loss
from ic.model.selection import VisibleKeys
from ic.training.indexer import set_trained

Make = Callable[..., MLAForCausalLM]
SIZES = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 3}
DENSE, SPARSE = ({"indexer": mode} | SIZES for mode in ("dense", "sparse"))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(2))


def loss_of(model: MLAForCausalLM, tokens: torch.Tensor, **described: Any) -> torch.Tensor:
    sums = model.target_sums(tokens, tokens, index_loss=True, **described)
    assert sums.index_loss is not None
    return sums.index_loss


def naive_loss(model: MLAForCausalLM, tokens: torch.Tensor, **described: Any) -> torch.Tensor:
    """By the weights that attention reports, one query after the other; differentiable."""
    hidden: list[Any] = []
    layers: Any = model.model.layers
    group = model.config.index_group_size
    for layer in layers[::group]:
        attention = layer.self_attn
        attention.indexer.register_forward_hook(lambda *x: hidden.append(x[-1]))
    context = model.model.make_context(*tokens.shape, tokens.device, **described)
    context = replace(context.recording(), indexing=model.model.new_indexing(has_losses=True))
    model.model(tokens, context=context, use_cache=False)
    for layer in layers[::group]:
        layer.self_attn.indexer._forward_hooks.clear()
    total, count = 0.0, 0
    assert context.recorded is not None
    for index, weights_BHTS in enumerate(context.recorded):
        q, w, k = hidden[index // group]
        target_BTS = weights_BHTS.detach().sum(1)
        target_BTS = target_BTS / target_BTS.sum(-1, keepdim=True)  # L1
        for b in range(len(tokens)):
            for t in range(tokens.shape[1]):
                seen = (target_BTS[b, t] > 0).nonzero().flatten()
                products = torch.einsum("ji,si->js", q[b, t], k[b, seen]).relu()
                scores = (w[b, t, :, None] * products).sum(0)
                p = target_BTS[b, t, seen]
                total = total + (p * (p.log() - scores.log_softmax(-1))).sum()
                count += 1
    return total / count


@pytest.mark.parametrize("mode", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("changes", [{}, {"index_group_size": 3}], ids=["", "shared"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_and_its_gradients_are_the_formulas(
    make_model: Make,
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    mode: dict[str, Any],
    changes: dict[str, Any],
    documents: bool,
) -> None:
    """In one piece and in many."""
    model = make_model(**mode | changes)
    described = {}
    if documents:
        described["document_ids"] = torch.tensor([[0] * 17 + [1] * 24, [0] * 30 + [1] * 11])
    naive_loss(model, tokens, **described).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if "indexer" in n}
    assert all(grad is not None and grad.abs().max() > 1e-6 for grad in expected.values())
    for numbers in (2**26, 5000):
        monkeypatch.setattr("ic.model.sparse_operators.PIECE_NUMBERS", numbers)
        model.zero_grad()
        loss = loss_of(model, tokens, **described)
        assert loss.item() == pytest.approx(naive_loss(model, tokens, **described).item(), abs=1e-5)
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)
            else:
                assert parameter.grad is None, name


@pytest.mark.parametrize("mode", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_each_part_learns_from_its_own_loss(
    make_model: Make, tokens: torch.Tensor, mode: dict[str, Any]
) -> None:
    """Gradients of both losses together are those of each alone; with recomputed activations too."""
    model = make_model(**mode).train()
    sums = model.target_sums(tokens, tokens, index_loss=True)
    assert sums.all_tokens is not None
    sums.all_tokens.backward(retain_graph=True)
    learnt = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in learnt if "indexer" in name]
    model.zero_grad()
    assert sums.index_loss is not None
    sums.index_loss.backward()
    learnt |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert set(learnt) == {n for n, _ in model.named_parameters()}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        sums = model.target_sums(tokens, tokens, index_loss=True)
        (sums.all_tokens + sums.index_loss).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, learnt[name], atol=1e-5, rtol=1e-4)


def test_what_is_frozen(make_model: Make) -> None:
    for mode, trained in (("none", "model"), ("alone", "indexer"), ("with_model", "both")):
        model = make_model(**DENSE)
        set_trained(model, mode)
        kinds = {"indexer" in n for n, p in model.named_parameters() if p.requires_grad}
        assert kinds == {"model": {False}, "indexer": {True}, "both": {False, True}}[trained]


class LargestTensor(TorchDispatchMode):
    """Numbers of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return out


@pytest.mark.parametrize("mode", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_no_tensor_grows_with_the_square_of_the_context(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    """1,500 queries and keys: scores of all heads at once would be 9 million numbers."""
    limit = 200_000
    monkeypatch.setattr("ic.model.sparse_operators.PIECE_NUMBERS", limit)
    model = make_model(**mode | {"num_hidden_layers": 1, "vocab_size": 97})
    tokens = torch.randint(3, 97, (1, 1500), generator=torch.Generator().manual_seed(2))
    with LargestTensor() as largest:
        sums = model.target_sums(tokens, tokens, index_loss=True)
        (sums.all_tokens + sums.index_loss).backward()
    assert 50_000 < largest.numbers <= 1500 * 4 * 40  # queries of all heads, in absorbed form


def test_pieces_of_the_queries_leave_out_the_keys_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the products of the dense loss are half of T x T where pieces are small."""
    g = torch.Generator().manual_seed(0)
    q, w, k, attended, rows = (
        torch.randn(shape, generator=g)
        for shape in ((1, 256, 3, 16), (1, 256, 3), (1, 256, 16), (1, 256, 4, 24), (1, 256, 24))
    )
    visible = VisibleKeys.of(torch.arange(1, 257)[None], None, in_texts=False)
    products, losses = [], []
    for numbers in (2**26, 256 * 17 * 8):
        monkeypatch.setattr("ic.model.sparse_operators.PIECE_NUMBERS", numbers)
        with FlopCounterMode(display=False) as counter:
            losses.append(dense_index_loss(q, w, k, attended, rows, visible, 0.2).item())
        products.append(counter.get_total_flops())
    assert products[0] == 2 * 256 * 256 * (4 * 24 + 3 * 16)
    assert products[1] / products[0] == pytest.approx((1 + 8 / 256) / 2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_loss_needs_the_matrix_of_attention(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model(**DENSE)
    model.model.layers[1].self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="kv_b_proj is a Linear that may be more than a matrix"):
        loss_of(model, tokens)
    wrapped = make_model(**SPARSE)
    plain = wrapped(tokens, use_cache=False).logits
    wrapped.model.layers[1].self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(wrapped(tokens, use_cache=False).logits, plain, atol=2e-5, rtol=0)
