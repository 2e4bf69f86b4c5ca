"""The table in `init_weights`' docstring against the weights of a fresh model."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.init import init_weights

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "length_temperature": "ssmax",
    "attention_bias": True,
}


def rules() -> dict[str, str]:
    """The docstring's rows as {tensor: distribution}."""
    found = {}
    for line in (init_weights.__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 2 and cells[0] != "tensor" and not set(cells[0]) <= {"-"}:
            found.update(dict.fromkeys(re.split(r", (?=\w+$|\w+_proj)", cells[0]), cells[1]))
    return found


CONVERTED = {"q_lora_rank": None, "query_bias": True, "qk_norm_dim": 8}
INDEXER = {"indexer": "dense", "index_n_heads": 16, "index_head_dim": 128}


@pytest.mark.parametrize("changes", [{}, CONVERTED, INDEXER], ids=["", "converted", "indexer"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_follows_the_table(tied: bool, changes: dict) -> None:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**{**SIZES, **changes}, tie_word_embeddings=tied))
    table = rules()
    assert len(table) > 8
    for name, tensor in model.named_parameters():
        key = next((k for k in table if name.endswith((k, f"{k}.weight"))), None)
        if name.endswith("bias"):
            key = "every bias"
        elif "norm" in name:
            key = "every norm's weight"
        elif name == "model.embed_tokens.weight" and tied:
            key = "embed_tokens.weight, tied to lm_head"
        assert key is not None, f"{name} is missing from the table"
        rule = table[key]
        if rule == "zero":
            assert not tensor.any(), name
        elif rule == "one":
            assert (tensor == 1).all(), name
        elif rule == "1 / ln(1024)":
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1 / math.log(1024)))
        else:
            std = {
                "std 1": 1.0,
                "std D^-0.5": 256**-0.5,
                "std fan_in^-0.5": tensor.shape[-1] ** -0.5,
            }[rule.removeprefix("normal, ")]
            assert tensor.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(tensor.mean().item()) < 0.02 * std, name
