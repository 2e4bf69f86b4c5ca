"""The cache table on the CPU, whose storages count without an allocator's rounding."""

from __future__ import annotations

import pytest
import torch

from ic.config.model import ModelConfig
from ic.model import MLAConfig, MLAForCausalLM
from ic.planning.cache_memory import WEIGHTS, cache_rows


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_and_contexts(weights: str) -> None:
    """16 heads of 128 in two layers; 192 + 64 latent numbers, and a scale where they are codes."""
    config = ModelConfig(num_hidden_layers=2).mla_config(320)
    rows = cache_rows(config, torch.device("cpu"), (512, 1024), (1,), weights=weights)
    expected = {
        "MHA, bf16": 2 * 2 * 2 * 16 * 128,
        "GQA, 8 heads of 64, bf16": 2 * 2 * 2 * 8 * 64,
        "MLA, bf16": 2 * 2 * 256,
        "MLA, e4m3": 2 * (256 + 4),
        "MLA, int8": 2 * (256 + 4),
    }
    if weights != "bf16":
        expected = {name: size for name, size in expected.items() if name.startswith("MLA")}
    assert {row["cache"]: row["bytes_per_token"] for row in rows} == expected
    held = _weight_bytes(config, weights)
    for row in rows:
        per_token = expected[row["cache"]]
        assert row["cache_bytes_by_tokens"] == {"512": 512 * per_token, "1024": 1024 * per_token}
        assert (row["weights"], row["weight_bytes"]) == (weights, held)
        left = 10**9 - held - row["largest_context_tokens"] * per_token
        # Rounded down to 1024 tokens, and to blocks of 2 MiB of each buffer of the two layers.
        buffers = 2 if per_token % 4096 == 0 or row["cache"] == "MLA, bf16" else 4
        assert 0 <= left < 1024 * per_token + 2 * buffers * 2**20, row["cache"]


def _weight_bytes(config: MLAConfig, weights: str) -> int:
    """By hand: codes of a byte or a half, with their scales, of all layers but two kinds."""
    total = 0
    with torch.device("meta"):
        model = MLAForCausalLM(config)
    for name, parameter in model.named_parameters():
        stays = parameter.dim() == 1 or any(x in name for x in ("lm_head", "kv_b_proj", "embed"))
        if weights == "bf16" or stays:
            total += 2 * parameter.numel()
        elif weights == "fp8":
            total += parameter.numel() + 4 * parameter.shape[0]
        else:
            total += parameter.numel() // 2 + parameter.numel() // 64 * 2 + 16
    return total
