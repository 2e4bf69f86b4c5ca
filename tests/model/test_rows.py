"""Rows of unequal length decode in one batch as each does alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ic.model import LatentCache, MLAForCausalLM
from ic.model.cache import PAGE_TOKENS, concatenate_rows

Make = Callable[..., MLAForCausalLM]
LENGTHS = (3, 100, 1000)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ssmax": {"length_temperature": "ssmax"},
    "llama4": {"length_temperature": "llama4", "length_temperature_original": 16},
    "yarn": {"rope_parameters": YARN, "length_temperature": "ssmax", "nope_layers": [1]},
}


def draw(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def prefilled(model: MLAForCausalLM, tokens: int) -> LatentCache:
    cache = model.model.new_cache()
    model(draw(1, tokens).to(model.device), past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def assert_equal_alone(
    model: MLAForCausalLM,
    sizes: list[int],
    tolerance: float = 1e-5,
    prefill: MLAForCausalLM | None = None,
) -> None:
    """Steps of `sizes` tokens over rows of LENGTHS against each row over its own cache.

    Args:
        prefill: makes the caches, in place of the model.
    """
    alone = [prefilled(prefill or model, length) for length in LENGTHS]
    together = concatenate_rows(alone)
    assert together.row_lengths == list(LENGTHS)
    for size in sizes:
        x = draw(len(LENGTHS), size).to(model.device)
        got = model(x, past_key_values=together).logits
        pairs = zip(x, alone, strict=True)
        expected = torch.cat([model(row[None], past_key_values=own).logits for row, own in pairs])
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
        if got.dtype == torch.float32:  # in half precision two logits may be equal
            assert got.argmax(-1).equal(expected.argmax(-1))
    grown = [length + sum(sizes) for length in LENGTHS]
    assert together.row_lengths == grown
    for layers in zip(together.layers, *(own.layers for own in alone), strict=True):
        for row, (length, own) in enumerate(zip(grown, layers[1:], strict=True)):
            held = layers[0].latents()[row, :length]
            torch.testing.assert_close(held, own.latents()[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [[1] * 5, [3, 1, 2]], ids=str)
def test_each_row_is_as_it_is_alone(make_model: Make, variant: str, sizes: list[int]) -> None:
    assert_equal_alone(make_model(**VARIANTS[variant]), sizes)


def test_more_tokens_than_are_decoded_in_absorbed_form(make_model: Make) -> None:
    assert_equal_alone(make_model(length_temperature="ssmax"), [20, 1])


@torch.no_grad()
def test_a_ready_context(make_model: Make) -> None:
    """Made by the caller, who may keep it; what it was made from may not be given again."""
    model, x = make_model(length_temperature="ssmax"), draw(3, 1)
    caches = [concatenate_rows([prefilled(model, length) for length in LENGTHS]) for _ in range(2)]
    context = model.model.make_context(3, 1, x.device, caches[0])
    assert context.cos_BTF.shape[:2] == (3, 1)
    assert context.visible_BT is not None
    assert context.visible_BT[:, 0].tolist() == [4, 101, 1001]
    got = model(x, past_key_values=caches[0], context=context).logits
    assert got.equal(model(x, past_key_values=caches[1]).logits)
    with pytest.raises(ValueError, match="context goes without attention_mask, position_ids"):
        model(x, past_key_values=caches[1], context=context, position_ids=x)
    plain = model.model.make_context(3, 1, x.device)
    with pytest.raises(ValueError, match="unequal lengths; give the model an AttentionContext"):
        model(x, past_key_values=caches[1], context=plain)
    # A rotation of one token would be broadcast over all three.
    with pytest.raises(ValueError, match="made for 1 new tokens in 3 rows, and the input has 2 in"):
        model(draw(3, 2), past_key_values=caches[1], context=context)


@torch.no_grad()
def test_rows_leave_and_join(make_model: Make) -> None:
    """As in an engine: a row ends, another one begins, and two that are equal long go on."""
    model = make_model(length_temperature="llama4", length_temperature_original=16)
    cache = concatenate_rows([prefilled(model, length) for length in (40, 7, 25)])
    model(draw(3, 1), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.row_lengths == [41, 26]
    cache = concatenate_rows([cache, prefilled(model, 60)])
    cache.crop(-2)
    assert cache.row_lengths == [39, 24, 58]
    cache.keep(30)
    assert cache.row_lengths == [30, 24, 30]
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    x = draw(3, 2)
    got = model(x, past_key_values=cache).logits
    for row, (length, kept) in enumerate([(60, 30), (25, 24), (40, 30)]):
        own = prefilled(model, length)
        own.keep(kept)
        expected = model(x[row, None], past_key_values=own).logits
        torch.testing.assert_close(got[row, None], expected, atol=1e-5, rtol=0)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert not cache.is_ragged
    assert model(draw(2, 1), past_key_values=cache).logits.isfinite().all()
    assert cache.row_lengths == [33, 33]


@torch.no_grad()
def test_growth_keeps_what_is_behind_a_row_finite(make_model: Make) -> None:
    """A masked key is multiplied by zero, which hides no NaN."""
    model = make_model()
    cache = concatenate_rows([prefilled(model, length) for length in (5, 30)])
    assert [layer.buffer.shape[1] for layer in cache.layers] == [2 * PAGE_TOKENS] * 3
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for _ in range(4):
            logits = model(draw(2, 1), past_key_values=cache).logits
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = previous
    assert cache.layers[0].buffer.shape[1] > 2 * PAGE_TOKENS
    assert logits.isfinite().all()


def test_what_does_not_go_together(make_model: Make) -> None:
    model = make_model(max_position_embeddings=64)
    one, other = prefilled(model, 5), prefilled(model, 62)
    ragged = concatenate_rows([one, other])
    x = draw(2, 1)
    with pytest.raises(ValueError, match="the cache has 2 rows, the input 1"):
        model(x[:1], past_key_values=ragged)
    with pytest.raises(ValueError, match="65 tokens: the model has 64 positions"):
        model(draw(2, 3), past_key_values=ragged)
    for described in ("attention_mask", "document_ids"):
        with pytest.raises(ValueError, match="rows of unequal length goes without attention_mask"):
            model(x, past_key_values=ragged, **{described: torch.ones(2, 63, dtype=torch.long)})
    with pytest.raises(ValueError, match="generate takes a cache with rows of equal length"):
        model.generate(draw(2, 63), past_key_values=ragged, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"2 caches with \[2, 3\] layers"):
        concatenate_rows([one, LatentCache(2)])
    with pytest.raises(ValueError, match="takes LatentCaches that hold tokens"):
        concatenate_rows([one, LatentCache(3)])
    with pytest.raises(ValueError, match=r"0 caches with \[\] layers"):
        concatenate_rows([])
    halves = prefilled(make_model(max_position_embeddings=64).to(torch.bfloat16), 3)
    with pytest.raises(ValueError, match=r"differ in .*bfloat16.*float32"):
        concatenate_rows([one, halves])
