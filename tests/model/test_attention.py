"""Expanded = absorbed = cached step by step = chunked prefill, at odd lengths and with left
padding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ic.model import LatentCache, MLAForCausalLM

Make = Callable[..., MLAForCausalLM]
VARIANTS = {
    "plain": {},
    "full_q": {"q_lora_rank": None},
    "half_split": {"rope_interleave": False},
    "ssmax": {"length_temperature": "ssmax"},
    "llama4": {"length_temperature": "llama4", "length_temperature_original": 16},
    "nope": {"nope_layers": [1]},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest, make_model: Make) -> MLAForCausalLM:
    return make_model(**VARIANTS[request.param])


def draw(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


def run_in_pieces(model: MLAForCausalLM, x: torch.Tensor, sizes: list[int], **kw) -> torch.Tensor:
    cache, out, at = LatentCache(model.config.num_hidden_layers), [], 0
    for size in sizes:
        mask = kw.get("attention_mask")
        out.append(
            model(
                x[:, at : at + size],
                past_key_values=cache,
                attention_mask=None if mask is None else mask[:, : at + size],
            ).logits
        )
        at += size
    assert cache.get_seq_length() == x.shape[1]
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 37])
def test_forms_agree(model: MLAForCausalLM, length: int) -> None:
    x = draw(length)
    expected = model(x, use_cache=False).logits
    for limit in (0, 10**6):  # all expanded, all absorbed
        model.config.absorbed_max_queries = limit
        for sizes in ([length], [1] * length, [length // 2, length - length // 2]):
            got = run_in_pieces(model, x, [s for s in sizes if s])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_padding_changes_nothing(model: MLAForCausalLM) -> None:
    x = draw(37)
    expected = model(x[1:, 9:]).logits
    mask = torch.ones_like(x)
    mask[1, :9] = 0
    for limit in (0, 10**6):
        model.config.absorbed_max_queries = limit
        for sizes in ([37], [1] * 37, [20, 17]):
            got = run_in_pieces(model, x, sizes, attention_mask=mask)
            torch.testing.assert_close(got[1:, 9:], expected, atol=1e-5, rtol=0)
            assert got.isfinite().all()


@torch.no_grad()
def test_right_padding_changes_nothing(model: MLAForCausalLM) -> None:
    x = draw(37)
    mask = torch.ones_like(x)
    mask[1, 20:] = 0
    expected = model(x[1:, :20], use_cache=False).logits
    assert (
        model(x, attention_mask=mask, use_cache=False)
        .logits[1:, :20]
        .equal(model(x, use_cache=False).logits[1:, :20])
    )  # no mask was made: causal attention never looks at what stands behind
    torch.testing.assert_close(
        model(x, attention_mask=mask, use_cache=False).logits[1:, :20], expected, atol=1e-5, rtol=0
    )
    # Tokens that follow the padding in a cache do need the mask.
    ones = torch.ones(2, 1, dtype=mask.dtype)
    first = model(x, attention_mask=mask, use_cache=True)
    after = model(
        x[:, :1], attention_mask=torch.cat([mask, ones], 1), past_key_values=first.past_key_values
    ).logits
    whole = model(torch.cat([x[1:, :20], x[1:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(after[1:], whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_documents_do_not_see_each_other(model: MLAForCausalLM) -> None:
    x = draw(40)
    ids = torch.tensor([[0] * 13 + [1] + [2] * 26, [5] * 40], dtype=torch.int32)
    restart = torch.cat([torch.arange(13), torch.arange(1), torch.arange(26)])
    positions = torch.stack([restart, torch.arange(40)])
    got = model(x, document_ids=ids, position_ids=positions).logits
    for start, end in ((0, 13), (13, 14), (14, 40)):
        torch.testing.assert_close(
            got[:1, start:end], model(x[:1, start:end]).logits, atol=1e-5, rtol=0
        )
    torch.testing.assert_close(got[1:], model(x[1:]).logits, atol=1e-5, rtol=0)


def test_gradients_equal_with_and_without_checkpointing(model: MLAForCausalLM) -> None:
    x = draw(29)
    model.train()
    model(x, labels=x).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_generate_with_beams_and_samples(make_model: Make, kwargs: dict) -> None:
    model, x = make_model(), draw(11)
    torch.manual_seed(3)
    ours = model.generate(x, max_new_tokens=12, eos_token_id=None, **kwargs)
    torch.manual_seed(3)
    plain = model.generate(x, max_new_tokens=12, eos_token_id=None, use_cache=False, **kwargs)
    assert ours.equal(plain)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_short_rows_of_documents_stay_apart(make_model: Make, cached: bool) -> None:
    """As few tokens as a pass over a cache takes in absorbed form."""
    model, x = make_model(), draw(8)
    ids = torch.tensor([[0] * 5 + [1] * 3] * 2)
    cache = model.model.new_cache() if cached else None
    out = model(x, document_ids=ids, past_key_values=cache)
    alone = torch.cat([model(part, use_cache=False).logits for part in (x[:, :5], x[:, 5:])], 1)
    torch.testing.assert_close(out.logits, alone, atol=1e-5, rtol=0)
    assert (out.past_key_values is not None) == cached


def test_temperature_counts_visible_keys(make_model: Make) -> None:
    temperature = (
        make_model(length_temperature="llama4", length_temperature_original=4)
        .model.layers[0]
        .self_attn.length_temperature
    )
    got = temperature(torch.tensor([[1, 4, 5, 8, 9]])).flatten()
    expected = 1 + 0.1 * torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0]).log()
    torch.testing.assert_close(got, expected)


def test_bad_inputs(make_model: Make) -> None:
    model = make_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="17 tokens: the model has 16 positions"):
        model(draw(17))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="covers 5 tokens"):
        model(draw(6), attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 2))
    with pytest.raises(ValueError, match="document_ids goes with neither"):
        model(draw(4), document_ids=torch.zeros(2, 4), attention_mask=torch.zeros(2, 4))
