"""A quantised cache answers the last turn of a conversation as well as the first."""

from __future__ import annotations

import pytest
import torch

from ic.model import attention
from tests.inference.engine.serving import (
    SIZES,
    Make,
    ask,
    draw_prompt,
    engine_of,
    finish,
    generated,
    logprobs_of,
)

TURNS = 5


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_turns_of_a_conversation(make_model: Make, cache_dtype: str) -> None:
    """Each turn finds what came before in the cache, and its log-probabilities are as near to those
    of an unpaged pass without quantisation as those of the first turn, cold or not.
    """
    model = make_model(**SIZES, length_temperature="ssmax")
    engine = engine_of(model, cache_dtype=cache_dtype, prefill_chunk_tokens=24)
    history: list[int] = []
    errors = []
    for turn in range(TURNS):
        prompt = [*history, *draw_prompt(30, turn)]
        request = ask("a", prompt, 12, logprobs=0)
        engine.add(request)
        answer = finish(engine)["a"]
        whole_pages = (len(history) - 1) // 16 * 16 if history else 0
        assert answer.cached_tokens == whole_pages
        expected = logprobs_of(model, [*prompt, *answer.token_ids], len(prompt))
        got = torch.tensor([x.logprob for x in answer.logprobs])
        errors.append(float((got - expected).abs().max()))
        # What was read from the cache gives what reading all of it anew gives, bit by bit.
        cold = engine_of(model, cache_dtype=cache_dtype, prefill_chunk_tokens=24)
        cold.add(request)
        fresh = finish(cold)["a"]
        assert fresh.token_ids == answer.token_ids
        torch.testing.assert_close(
            torch.tensor([x.logprob for x in fresh.logprobs]), got, atol=2e-3, rtol=0
        )
        history = [*prompt, *answer.token_ids]
    assert max(errors) < (0.12 if cache_dtype == "fp8" else 0.04)
    assert max(errors[1:]) < 3 * errors[0]
    assert min(errors) > 1e-5  # it was quantised


def test_the_scale_of_a_token_matters(make_model: Make) -> None:
    """The test above would notice a scale that stays behind when its page is used again."""
    model = make_model(**SIZES)
    engine = engine_of(model, cache_dtype="int8")
    request = ask("a", draw_prompt(60), 12, logprobs=0)
    engine.add(request)
    before = finish(engine)["a"]
    for layer in engine._runner.cache.layers:
        layer.scale[1:] *= 1.5  # type: ignore[index]
    engine.add(request)
    after = finish(engine)["a"]
    assert after.cached_tokens == 48
    shift = max(
        abs(x.logprob - y.logprob) for x, y in zip(before.logprobs, after.logprobs, strict=True)
    )
    assert shift > 0.1


def test_a_model_with_a_quantised_cache(make_model: Make) -> None:
    """The engine's pages hold what the model was loaded with."""
    model = make_model(**SIZES, cache_dtype="int8")
    for layer in engine_of(model)._runner.cache.layers:
        assert layer.pages.dtype == torch.int8
    fp8 = engine_of(model, cache_dtype="fp8")
    assert fp8._runner.cache.layers[0].pages.dtype == torch.float8_e4m3fn


def test_heads_of_a_long_prompt_are_expanded_in_turn(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where keys and values of all heads would take too much memory; with the same result."""
    model = make_model(**SIZES)
    request = ask("a", draw_prompt(90), 6, logprobs=0)
    expected = logprobs_of(model, [*request.prompt_ids, *generated(model, request)], 90)
    token_bytes = 4 * (16 + 12 + 24)  # of one head
    widths = []
    attend = attention.MLAAttention._attend
    monkeypatch.setattr(
        attention.MLAAttention,
        "_attend",
        lambda self, q, kv, *rest: (widths.append(kv.shape[2]), attend(self, q, kv, *rest))[1],
    )
    monkeypatch.setattr(attention, "EXPANDED_BYTES", 90 * token_bytes * 3)
    engine = engine_of(model, prefill_chunk_tokens=60)
    engine.add(request)
    answer = finish(engine)["a"]
    assert widths == [4, 4, 3, 1, 3, 1]  # two layers of 60 tokens, and two of 90
    torch.testing.assert_close(
        torch.tensor([x.logprob for x in answer.logprobs]), expected, atol=1e-5, rtol=0
    )
