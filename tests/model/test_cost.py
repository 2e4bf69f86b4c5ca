"""Costs against counts that PyTorch makes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.cost import (
    cache_bytes_per_token,
    decode_flops_per_token,
    forward_flops_per_token,
    num_parameters,
    train_flops_per_token,
)
from tests.conftest import SMALL


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"length_temperature": "ssmax"},
        {"latent_norm": False, "rope_repeats": 2, "qk_nope_head_dim": 0},
        {"q_lora_rank": None, "query_bias": True, "attention_bias": True},
        {"qk_norm_dim": 4},
    ],
)
def test_parameters_are_counted(changes: dict) -> None:
    config = MLAConfig(**{**SMALL, **changes})
    assert num_parameters(config) == sum(p.numel() for p in MLAForCausalLM(config).parameters())


def test_flops_match_pytorchs_counter(make_model) -> None:
    """PyTorch counts the products of full attention, ours the causal half: add the other half back."""
    model, tokens = make_model(v_head_dim=24), 64
    x = torch.randint(3, 97, (1, tokens))
    # The counter does not know the CPU's fused attention, so plain matrix products are run.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, use_cache=False, labels=x, skip_logits=True).loss.backward()
    config = model.config
    heads, dims = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    above = 2 * heads * dims * (tokens - 1) / 2 * config.num_hidden_layers
    expected = tokens * (train_flops_per_token(config, tokens) + 3 * above)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_the_1b_shape() -> None:
    """The numbers that documents quote."""
    config = MLAConfig(length_temperature="ssmax")
    assert num_parameters(config) == 724_899_072
    assert cache_bytes_per_token(config) == 8192
    assert cache_bytes_per_token(config) * 2**20 == 8 * 2**30
    # By hand: 2 x 723.5 M matrix parameters + 16 layers x 2 x 16 heads x 320 x 16384.5 keys.
    assert forward_flops_per_token(config, 32768) == pytest.approx(4.13e9, rel=0.01)
    assert decode_flops_per_token(config, 1) < forward_flops_per_token(config, 1) * 1.01
