"""Dimensions that do not fit, and configurations that are not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.model import MLAConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15: must be even"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0: must be at least 1"),
        ({"q_lora_rank": -3}, "q_lora_rank=-3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: MLA expands"),
        ({"length_temperature": "hot"}, "choose one of none, llama4, ssmax"),
        ({"attention_backend": "cuda"}, "choose one of torch, triton"),
        ({"nope_layers": [3]}, "layer indices run from 0 to 2"),
        ({"first_k_dense_replace": 1}, "mixture-of-experts layers are not supported"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"attention_dropout": 0.1}, "only 0 is supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "default, yarn",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "above 1"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLAConfig(num_hidden_layers=3, num_attention_heads=4, **changes)


def test_round_trip(tmp_path) -> None:
    config = MLAConfig(length_temperature="ssmax", nope_layers=[2], q_lora_rank=96)
    config.save_pretrained(tmp_path)
    assert MLAConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_a_saved_configuration_leaves_the_backends_to_the_machine(tmp_path: Path) -> None:
    parts = ("attention_backend", "norm_backend", "rope_backend")
    MLAConfig(kv_lora_rank=48, **dict.fromkeys(parts, "triton")).save_pretrained(tmp_path)
    loaded = MLAConfig.from_pretrained(tmp_path)
    assert loaded.kv_lora_rank == 48
    assert [getattr(loaded, part) for part in parts] == ["torch"] * 3
