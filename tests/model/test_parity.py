"""Against transformers' DeepSeek-V2 and V3 (dense layers) with the same weights, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from ic.model import MLAConfig, MLAForCausalLM
from tests.conftest import SMALL, randomize

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
KINDS = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


@pytest.fixture(params=["v2", "v3"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[24, None], ids=["q_lora", "full_q"])
def reference(kind: str, request: pytest.FixtureRequest, rope: dict) -> torch.nn.Module:
    config_class, model_class = KINDS[kind]
    config = config_class(
        **{**SMALL, "q_lora_rank": request.param},
        num_key_value_heads=4,
        first_k_dense_replace=3,
        rope_parameters=dict(rope),
    )
    torch.manual_seed(1)
    model = model_class(config).eval()
    randomize(model)
    return model


@pytest.fixture(params=[PLAIN, YARN], ids=["plain", "yarn"])
def rope(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 61), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_their_checkpoint_gives_their_logits_and_text(
    reference: torch.nn.Module, tokens: torch.Tensor, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    ours = MLAForCausalLM.from_pretrained(tmp_path).eval()
    expected = reference(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(tokens).logits, expected, atol=1e-5, rtol=0)
    kwargs = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    assert ours.generate(tokens, **kwargs).equal(reference.generate(tokens, **kwargs))
    mask = torch.ones_like(tokens)
    mask[0, :17] = 0
    padded = tokens.masked_fill(mask == 0, 0)
    assert ours.generate(padded, attention_mask=mask, **kwargs).equal(
        reference.generate(padded, attention_mask=mask, **kwargs)
    )


@torch.no_grad()
def test_our_checkpoint_loads_in_theirs(
    kind: str, reference: torch.nn.Module, tokens: torch.Tensor, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path / "theirs")
    MLAForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back, info = KINDS[kind][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert back.eval()(tokens).logits.equal(reference(tokens).logits)


def test_gradients_equal(
    kind: str, reference: torch.nn.Module, tokens: torch.Tensor, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    ours = MLAForCausalLM.from_pretrained(tmp_path)
    loss, expected = ours(tokens, labels=tokens).loss, reference(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "extension",
    [
        {"length_temperature": "ssmax"},
        {"nope_layers": [1]},
        {"qk_rope_head_dim": 4, "rope_pairs": [5, 1], "rope_pairs_dim": 16},
    ],
)
def test_extensions_do_not_load_in_theirs(kind: str, extension: dict, tmp_path: Path) -> None:
    model = MLAForCausalLM(MLAConfig(**{**SMALL, **extension}))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        Exception, match=r"n_shared_experts(.|\n)*is not DeepSeek's; load this folder"
    ):
        KINDS[kind][1].from_pretrained(tmp_path)
    back = MLAForCausalLM.from_pretrained(tmp_path)
    assert back.config.extensions == model.config.extensions
    assert not isinstance(getattr(back.config, "n_shared_experts", None), str)
