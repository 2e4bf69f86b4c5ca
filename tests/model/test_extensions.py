"""Switches of a model whose attention was another: against transformers' Llama, Mistral, Qwen2 and
Qwen3 in float32, as they are and written as MLA without loss.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ic.checkpoint.folder import load_model
from ic.model import MLAForCausalLM
from ic.model.adapter import add_adapter, join_adapter, merge_adapter, split_adapter
from ic.model.options import AdapterOptions
from tests.gqa import FAMILIES, exact_twin
from tests.model.test_rows import assert_equal_alone

LAYOUTS = {"half_split": False, "interleaved": True}


@pytest.fixture(params=FAMILIES)
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILIES[request.param].model()


@pytest.fixture(params=LAYOUTS)
def ours(theirs: PreTrainedModel, request: pytest.FixtureRequest) -> MLAForCausalLM:
    return exact_twin(theirs, interleave=LAYOUTS[request.param])


def draw(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_exact_in_every_form(theirs: PreTrainedModel, ours: MLAForCausalLM) -> None:
    x = draw(37)
    expected = theirs(x).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(x, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    for limit in (0, 10**6):  # all expanded, all absorbed
        ours.config.absorbed_max_queries = limit
        cache, out = ours.model.new_cache(), []
        for piece in x.split([20, 9, *[1] * 8], dim=1):
            out.append(ours(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-5, rtol=0)


def test_gradients(theirs: PreTrainedModel) -> None:
    """Of everything before and after the attention, whose own weights are other ones."""
    ours, x = exact_twin(theirs, interleave=True), draw(29)
    losses = [model(x, labels=x).loss for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if "self_attn" not in name}
    for name, parameter in ours.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name in expected:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_biases", "qwen3"])
def test_generate_with_every_cache(family: str) -> None:
    theirs = FAMILIES[family].model()
    ours, x = exact_twin(theirs, interleave=False), draw(21)
    mask = torch.ones_like(x)
    mask[1, :9] = 0
    x = x.masked_fill(mask == 0, 0)
    how = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(x, **how)
    for cache in ({}, {"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
        assert ours.generate(x, **how, **cache).equal(expected)


@torch.no_grad()
def test_a_cache_is_as_large_as_that_of_grouped_queries() -> None:
    theirs = FAMILIES["qwen3"].model()
    ours, x = exact_twin(theirs, interleave=True), draw(32)
    own = ours(x, past_key_values=ours.model.new_cache(32)).past_key_values
    other = theirs(x, past_key_values=DynamicCache()).past_key_values
    assert own.nbytes == sum(x.keys.nbytes + x.values.nbytes for x in other.layers)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_rows_of_unequal_length(family: str) -> None:
    theirs = FAMILIES[family].model(max_position_embeddings=2048)
    assert_equal_alone(exact_twin(theirs, interleave=False), [3, 1])


def test_an_adapter_on_biased_layers() -> None:
    """Merged, split off and joined again as without biases."""
    model = exact_twin(FAMILIES["qwen2"].model(), interleave=False)
    names, x = list(model.state_dict()), draw(17)
    add_adapter(model, AdapterOptions(r=3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    base, adapter = split_adapter(model.state_dict())
    assert list(base) == names
    assert set(join_adapter(base, adapter)) == set(model.state_dict())
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=0)
        merge_adapter(model)
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names


def test_zeros_beside_a_query_get_gradients_of_its_size() -> None:
    """Other blocks begin at zero: a norm of each would divide their gradient by the root of eps."""
    model = exact_twin(FAMILIES["qwen3"].model(), interleave=True)
    model(draw(29), labels=draw(29)).loss.backward()
    attention = model.model.layers[0].self_attn
    gradient_HGEX = attention.q_proj.weight.grad.unflatten(0, (4, 2, 16))
    own, other = gradient_HGEX[0, 0].norm(), gradient_HGEX[0, 1].norm()
    assert 0 < other < 3 * own


def test_weights_of_another_attention_are_named(tmp_path: Path) -> None:
    """Saved and loaded with what it extends, and refused where that is not."""
    model = exact_twin(FAMILIES["qwen3"].model(), interleave=False)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.extensions == ["latent_norm=False", "rope_repeats=2", "qk_norm_dim=16"]
    with torch.no_grad():
        assert loaded(draw(9)).logits.equal(model(draw(9)).logits)
    with pytest.raises(Exception, match=r"none: latent_norm=False and rope_repeats=2 and qk_norm"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
