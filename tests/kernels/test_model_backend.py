"""The model on our kernels equals the model on PyTorch's: interpreted on a CPU, native on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ic.model import LatentCache, MLAForCausalLM

DIMS = {
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "length_temperature": "ssmax",
}  # fmt: skip
TOLERANCE = 1e-4


@pytest.fixture
def pair(make_model: Callable[..., MLAForCausalLM], device: torch.device) -> list[MLAForCausalLM]:
    return [make_model(**DIMS, attention_backend=name).to(device) for name in ("torch", "triton")]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("documents", [False, True])
def test_training(pair: list[MLAForCausalLM], device: torch.device, documents: bool) -> None:
    x = torch.randint(3, 97, (2, 45), generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor([[0] * 17 + [1] + [2] * 27, [0] * 45], dtype=torch.int32, device=device)
    kwargs = {"document_ids": ids} if documents else {}
    losses = [model(x, labels=x, skip_logits=True, **kwargs).loss for model in pair]
    assert abs(losses[0] - losses[1]) < TOLERANCE
    for loss in losses:
        loss.backward()
    expected = dict(pair[0].named_parameters())
    for name, parameter in pair[1].named_parameters():
        assert error(parameter.grad, expected[name].grad) < TOLERANCE, name


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[30, 1, 1], [7, 20, 4, 1]])
def test_prefill_and_decode(
    pair: list[MLAForCausalLM], device: torch.device, sizes: list[int]
) -> None:
    x = torch.randint(3, 97, (2, sum(sizes)), generator=torch.Generator().manual_seed(1)).to(device)
    caches = [LatentCache(2), LatentCache(2)]
    for piece in x.split(sizes, dim=1):
        logits = [m(piece, past_key_values=c).logits for m, c in zip(pair, caches, strict=True)]
        assert error(logits[1], logits[0]) < TOLERANCE


@torch.no_grad()
def test_padded_batches_run_on_torch(pair: list[MLAForCausalLM], device: torch.device) -> None:
    x = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert pair[0].generate(x, **kwargs).equal(pair[1].generate(x, **kwargs))
