"""`generate` over every kind of cache and every way of decoding, beside DeepseekV3ForCausalLM with
the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache

from ic.model import MLAConfig, MLAForCausalLM
from tests.conftest import SMALL, randomize

GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def theirs() -> DeepseekV3ForCausalLM:
    torch.manual_seed(1)
    config = DeepseekV3Config(**SMALL, num_key_value_heads=4, first_k_dense_replace=3)
    model = DeepseekV3ForCausalLM(config).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def ours(theirs: DeepseekV3ForCausalLM) -> MLAForCausalLM:
    return twin(theirs)


def twin(theirs: DeepseekV3ForCausalLM, **changes: Any) -> MLAForCausalLM:
    """Our class with the same weights."""
    rope = dict(theirs.config.rope_parameters)
    model = MLAForCausalLM(MLAConfig(**{**SMALL, "rope_parameters": rope, **changes})).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def draw(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def repeating(model: torch.nn.Module) -> torch.Tensor:
    """A prompt after which greedy decoding repeats what the prompt holds, so that looking it up
    there proposes tokens that are accepted and others that are not.
    """
    return model.generate(draw(1, 9), **{**GREEDY, "max_new_tokens": 120})


@torch.no_grad()
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "same model as assistant"])
def test_speculation_equals_greedy(
    ours: MLAForCausalLM, theirs: DeepseekV3ForCausalLM, way: str, make_model: Any
) -> None:
    ids = repeating(theirs)
    hows: dict[str, dict[str, Any]] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": make_model()},
        "same model as assistant": {"assistant_model": twin(theirs)},
    }
    greedy = theirs.generate(ids, **GREEDY)
    assert ours.generate(ids, **GREEDY).equal(greedy)
    lengths = Lengths(ours)
    assert ours.generate(ids, **GREEDY, **hows[way]).equal(greedy)
    lengths.remove()
    if way == "assistant":  # whose proposals are all wrong
        assert len(lengths.seen) == 40
    else:
        assert len(lengths.seen) < 30


class Lengths:
    """The number of new tokens of each pass of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[int] = []
        self.remove = model.register_forward_pre_hook(self._see, with_kwargs=True).remove

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(kwargs["input_ids"].shape[1])


CACHES: dict[str, Callable[[MLAForCausalLM], dict[str, Any]]] = {
    "given by us": lambda model: {"past_key_values": model.model.new_cache()},
    "DynamicCache()": lambda model: {"past_key_values": DynamicCache()},
    "DynamicCache(config)": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "StaticCache": lambda model: {
        "past_key_values": StaticCache(config=model.config, max_cache_len=80)
    },
    "StaticLatentCache": lambda model: {"past_key_values": model.model.new_static_cache(77)},
    "static": lambda model: {"cache_implementation": "static"},
    "static, longer": lambda model: {"cache_implementation": "static", "max_cache_len": 200},
    "no cache": lambda model: {"use_cache": False},
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
}


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", WAYS)
def test_every_cache_gives_deepseeks_text(
    ours: MLAForCausalLM, theirs: DeepseekV3ForCausalLM, cache: str, way: str
) -> None:
    """Of a prompt with padding in front, longer than what is decoded in absorbed form."""
    ids = draw(2, 31)
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0
    how = {**GREEDY, "max_new_tokens": 8, "attention_mask": mask, **WAYS[way]}
    torch.manual_seed(0)
    expected = theirs.generate(ids, **how)
    torch.manual_seed(0)
    assert ours.generate(ids, **how, **CACHES[cache](ours)).equal(expected)


@torch.no_grad()
def test_a_quantised_cache_is_read_whole(
    ours: MLAForCausalLM, theirs: DeepseekV3ForCausalLM
) -> None:
    """Its layers' `keys` hold the newest tokens alone; what `update` returns is all of them."""
    how = {**GREEDY, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    ids = draw(1, 31)
    assert ours.generate(ids, **how).equal(theirs.generate(ids, **how))


@torch.no_grad()
def test_hidden_states_are_deepseeks(ours: MLAForCausalLM, theirs: DeepseekV3ForCausalLM) -> None:
    ids = draw(2, 20)
    expected = theirs(ids, output_hidden_states=True).hidden_states
    for got in (
        ours(ids, output_hidden_states=True).hidden_states,
        ours.model(ids, output_hidden_states=True).hidden_states,
    ):
        assert len(got) == len(expected) == 4
        for own, other in zip(got, expected, strict=True):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    assert ours(ids).hidden_states is None
    with pytest.raises(ValueError, match=r"output_hidden_states=\[1\]: give True"):
        ours(ids, output_hidden_states=[1])


@torch.no_grad()
def test_the_configuration_says_what_is_returned(theirs: DeepseekV3ForCausalLM) -> None:
    ours, ids = twin(theirs), draw(2, 20)
    logits, cache = ours(ids, return_dict=False)
    assert logits.equal(ours(ids).logits)
    assert cache.get_seq_length() == 20
    last, cache = ours.model(ids, return_dict=False)
    assert last.equal(ours.model(ids).last_hidden_state)
    assert cache.get_seq_length() == 20
    assert ours(ids, labels=ids, return_dict=False)[0].shape == ()
    ours.config.output_hidden_states = True
    assert ours(ids).hidden_states[-1].equal(ours.model(ids).last_hidden_state)
    assert ours(ids, output_hidden_states=False).hidden_states is None
    ours.config.use_cache = False
    assert ours.model(ids).past_key_values is None
    assert ours(ids).past_key_values is None
    ours.config.return_dict = False
    assert isinstance(ours(ids), tuple)


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"length_temperature": "ssmax"}], ids=str)
@pytest.mark.parametrize("kind", ["StaticLatentCache", "StaticCache", "DynamicCache()"])
@pytest.mark.parametrize("prompt", [5, 40])
def test_logits_over_other_caches(
    make_model: Callable[..., MLAForCausalLM], variant: dict[str, Any], kind: str, prompt: int
) -> None:
    """Prefill, decoding of one and of several tokens, and a second prefill."""
    model = make_model(**variant)
    ids = draw(2, 80)
    expected = model(ids, use_cache=False).logits
    cache = CACHES[kind](model)["past_key_values"]
    start = 0
    for size in (prompt, 1, 1, 5, 20, 3):
        got = model(ids[:, start : start + size], past_key_values=cache).logits
        wanted = expected[:, start : start + size]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        start += size
    assert int(cache.get_seq_length()) == start


@torch.no_grad()
def test_a_static_cache_takes_back_and_refuses(make_model: Callable[..., MLAForCausalLM]) -> None:
    model = make_model(max_position_embeddings=48)
    ids = draw(2, 48)
    expected = model(ids, use_cache=False).logits
    cache = model.model.new_static_cache(48)
    model(ids[:, :30], past_key_values=cache)
    address = cache.layers[0].buffer.data_ptr()
    cache.crop(0)
    assert int(cache.get_seq_length()) == 30
    cache.crop(-6)
    got = model(ids[:, 24:26], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 24:26], atol=1e-5, rtol=0)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(ids[[1, 0], 26:27], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[[1, 0], 26:27], atol=1e-5, rtol=0)
    assert cache.layers[0].buffer.data_ptr() == address
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    got = model(ids[:1, 27:28].expand(2, -1), past_key_values=cache).logits
    torch.testing.assert_close(got, expected[[0, 0], 27:28], atol=1e-5, rtol=0)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    got = model(ids[:, :20], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, :20], atol=1e-5, rtol=0)
    for tokens in (1, 29):
        model(ids[:, :28], past_key_values=cache) if tokens == 1 else None
        with pytest.raises(ValueError, match=r"49 tokens: the (static cache|model) has 48 p"):
            model(ids[:, :tokens], past_key_values=cache)
        cache.crop(-28)
    with pytest.raises(ValueError, match="static cache of 49 tokens: the model has 48 positions"):
        model(ids, past_key_values=model.model.new_static_cache(49))
    with pytest.raises(ValueError, match="a static cache goes with neither"):
        model(ids, past_key_values=cache, document_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"attention_mask covers 60 tokens.* has 48 places"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 60))
    with pytest.raises(ValueError, match=r"crop\(3\): give the tokens to drop as a negative"):
        cache.crop(3)


@torch.no_grad()
def test_an_early_exit_drafts_with_the_first_layers(theirs: DeepseekV3ForCausalLM) -> None:
    model = twin(theirs)
    ids = repeating(theirs)
    layers: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: layers.append(index))
    got = model.generate(ids, **GREEDY, assistant_early_exit=1)
    assert got.equal(theirs.generate(ids, **GREEDY))
    assert layers.count(0) > layers.count(1) == layers.count(2)
    assert model.config.num_hidden_layers == 3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("cached", [0, 12, 50])
def test_a_whole_mask_is_read_as_deepseek_reads_it(
    ours: MLAForCausalLM, theirs: DeepseekV3ForCausalLM, dtype: torch.dtype, cached: int
) -> None:
    """Of a form that causal attention with padding does not have, in the prefill and over a cache.
    One token neither sees nor is seen: what it gives is anything but NaN.
    """
    ids = draw(2, 60)
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(2, 1, 60, 60, generator=generator) < 0.5
    visible |= torch.eye(60, dtype=torch.bool)
    visible[1, :, 55] = visible[1, :, :, 55] = False
    mask = visible
    if dtype != torch.bool:
        mask = torch.zeros(2, 1, 60, 60).masked_fill(~visible, torch.finfo(dtype).min)
    both = []
    for model in (ours, theirs):
        cache = DynamicCache()
        if cached:
            model(
                ids[:, :cached], attention_mask=mask[:, :, :cached, :cached], past_key_values=cache
            )
        rows = mask[:, :, cached:]
        both.append(model(ids[:, cached:], attention_mask=rows, past_key_values=cache).logits)
    assert both[0].isfinite().all()
    for logits in both:
        logits[1, 55 - cached] = 0
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=0)


def test_masks_that_are_refused(ours: MLAForCausalLM) -> None:
    ids = draw(2, 8)
    refused = {
        "has shape (2, 4, 8, 8)": torch.ones(2, 4, 8, 8, dtype=torch.bool),
        "has shape (2, 1, 8, 7)": torch.ones(2, 1, 8, 7, dtype=torch.bool),
        "is of torch.int64": torch.ones(2, 1, 8, 8, dtype=torch.long),
        "adds other numbers than 0": torch.full((2, 1, 8, 8), -0.5),
        "has 3 dimensions": torch.ones(2, 8, 8),
    }
    for message, mask in refused.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            ours(ids, attention_mask=mask)
