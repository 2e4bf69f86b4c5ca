"""The cache table on the CPU, whose storages count without an allocator's rounding."""

from __future__ import annotations

import torch

from ic.config.model import ModelConfig
from ic.planning.cache_memory import cache_rows


def test_bytes_and_contexts() -> None:
    """16 heads of 128 in two layers; 192 + 64 latent numbers."""
    config = ModelConfig(num_hidden_layers=2).mla_config(320)
    rows = cache_rows(config, torch.device("cpu"), (512, 1024), (1,))
    weights = 2 * sum(p.numel() for p in _parameters(config))
    expected = {
        "MHA, bf16": 2 * 2 * 2 * 16 * 128,
        "GQA, 8 heads of 64, bf16": 2 * 2 * 2 * 8 * 64,
        "MLA, bf16": 2 * 2 * 256,
        "MLA, e4m3": 2 * 256,
    }
    assert {row["cache"]: row["bytes_per_token"] for row in rows} == expected
    for row in rows:
        per_token = expected[row["cache"]]
        assert row["cache_bytes_by_tokens"] == {"512": 512 * per_token, "1024": 1024 * per_token}
        assert row["weight_bytes"] == weights
        left = 10**9 - weights - row["largest_context_tokens"] * per_token
        # Rounded down to 1024 tokens, and to blocks of 2 MiB in each of the two layers.
        assert 0 <= left < 1024 * per_token + 2 * 2 * 2**20, row["cache"]


def _parameters(config: object) -> list[torch.nn.Parameter]:
    from ic.model import MLAForCausalLM

    with torch.device("meta"):
        return list(MLAForCausalLM(config).parameters())
