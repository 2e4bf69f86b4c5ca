"""Causal attention on PyTorch's operators against the specification of the kernels."""

from __future__ import annotations

import pytest
import torch

from ic.kernels.reference import attention_reference
from ic.model.sdpa import causal_attention


@pytest.mark.parametrize("tokens", [1, 7, 19, 20, 33, 40])  # of 40: both sides of a half
def test_last_queries_equal_the_reference(tokens: int) -> None:
    keys, scale = 40, 0.2
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    q, k, v = draw(2, tokens, 3, 24), draw(2, keys, 3, 24), draw(2, keys, 3, 16)
    expected, _ = attention_reference(q, k, v, scale=scale)
    out = causal_attention(q, k, v, scale=scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    seed = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((out * seed).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * seed).sum(), (q, k, v))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
