"""Dimensions that do not fit, and configurations that are not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from ic.model import MLAConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


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
        ({"rope_parameters": {"rope_type": "dynamic"}}, "choose one of default, linear, yarn, lla"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor=0: must be above 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": "8"}}, "needs .'high_freq_factor'"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, "factor='8': must be a number"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "must be above low_freq_factor=4"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "all of qk_rope_head_dim is rotated"),
        ({"rope_parameters": LLAMA3 | {"mscale_all_dim": 1}}, "only YaRN has it"),
        ({"qk_nope_head_dim": -1}, "qk_nope_head_dim=-1: must be at least 0"),
        ({"latent_norm": 0}, "latent_norm=0: must be true or false"),
        ({"rope_repeats": 0}, "rope_repeats=0 and qk_rope_head_dim=64: must be at least 1"),
        ({"rope_repeats": 64}, "an even number"),
        ({"rope_pairs": [0] * 32}, "rope_pairs_dim=None: give both"),
        ({"rope_pairs_dim": 64}, "rope_pairs=None and rope_pairs_dim=64: give both"),
        ({"rope_pairs": [0], "rope_pairs_dim": 64}, "1 pairs, and qk_rope_head_dim=64 .* are 32"),
        ({"rope_pairs": [32] * 32, "rope_pairs_dim": 64}, "rope_pairs_dim=64 has pairs 0 to 31"),
        ({"rope_pairs": [0.5] * 32, "rope_pairs_dim": 64}, "rope_pairs=0.5: must be a whole"),
        ({"rope_pairs": 3, "rope_pairs_dim": 64}, "rope_pairs=3: must be a list"),
        ({"rope_pairs": [0] * 32, "rope_pairs_dim": 7}, "rope_pairs_dim=7: must be even"),
        (
            {"rope_pairs": [0] * 32, "rope_pairs_dim": 64, "rope_repeats": 2},
            "rope_repeats=2 and rope_pairs: .* set rope_repeats=1",
        ),
        (
            {"rope_pairs": [0] * 32, "rope_pairs_dim": 64, "qk_norm_dim": 8},
            "qk_norm_dim=8 and rope_pairs: .* leave one of them out",
        ),
        ({"qk_norm_dim": 48}, "qk_norm_dim=48 and qk_rope_head_dim=64: must be even, and divide"),
        ({"query_bias": True, "q_lora_rank": 8}, "only a full-rank query"),
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


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_what_a_file_of_theirs_leaves_out_has_their_default(kind: str) -> None:
    """As the files of DeepSeek's own models, which are older than transformers' keys."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    given = {"model_type": kind, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    given |= {"rope_theta": 10000, "rope_scaling": yarn, "num_key_value_heads": 16}
    given |= {"num_attention_heads": 16}
    ours, theirs = MLAConfig.from_dict(given), CONFIG_MAPPING[kind].from_dict(given)
    assert ours.pad_token_id is None
    assert ours.rope_parameters["rope_type"] == "yarn"
    shared = set(MLAConfig.__annotations__) & set(theirs.__annotations__)
    assert len(shared) > 20
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_what_follows_from_sizes_is_not_read() -> None:
    """A saved configuration holds it, and is changed by whoever makes another one of it."""
    saved = MLAConfig(qk_nope_head_dim=16, qk_rope_head_dim=16).to_dict()
    changed = MLAConfig.from_dict(saved | {"qk_nope_head_dim": 0, "qk_rope_head_dim": 64})
    assert (changed.qk_head_dim, changed.head_dim) == (64, 64)
    assert changed.softmax_scale == 1 / 8


def test_a_saved_configuration_leaves_the_backends_to_the_machine(tmp_path: Path) -> None:
    parts = ("attention_backend", "norm_backend", "rope_backend")
    MLAConfig(kv_lora_rank=48, **dict.fromkeys(parts, "triton")).save_pretrained(tmp_path)
    loaded = MLAConfig.from_pretrained(tmp_path)
    assert loaded.kv_lora_rank == 48
    assert [getattr(loaded, part) for part in parts] == ["torch"] * 3
