"""The engine answers as `generate` does, whatever else it has to do at the time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ic.inference.engine.engine import Engine
from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Finish, Request, Sampling
from ic.model import attention
from ic.model.paged_cache import PagedLatentLayer
from tests.inference.engine.serving import (
    SIZES,
    Answer,
    Make,
    ask,
    collect,
    draw_prompt,
    engine_of,
    finish,
    generated,
    load,
    logprobs_of,
    pages_of,
)
from tests.kernels.test_model_backend import CONVERTED
from tests.model.test_rows import VARIANTS

LENGTHS = (1, 15, 16, 17, 40, 100, 33, 3)


@pytest.mark.parametrize("variant", [*VARIANTS, "converted"])
def test_mixed_lengths(make_model: Make, variant: str) -> None:
    model = make_model(**SIZES | (CONVERTED if variant == "converted" else VARIANTS[variant]))
    engine = engine_of(model, max_batch=3, prefill_chunk_tokens=24)
    requests = [ask(f"{n}", draw_prompt(n), 5 + n % 7, logprobs=0) for n in LENGTHS]
    for request in requests:
        engine.add(request)
    answers = finish(engine)
    for request in requests:
        answer = answers[request.id]
        assert answer.token_ids == generated(model, request)
        assert answer.finish == Finish.LENGTH
        whole = [*request.prompt_ids, *answer.token_ids]
        expected = logprobs_of(model, whole, len(request.prompt_ids))
        got = torch.tensor([x.logprob for x in answer.logprobs])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert [x.token_id for x in answer.logprobs] == answer.token_ids
    stats = engine.stats()
    assert stats.prompt_tokens == sum(LENGTHS)
    assert stats.generated_tokens == sum(5 + n % 7 for n in LENGTHS)
    assert stats.preemptions == 0


def test_passes_of_padded_sizes(make_model: Make) -> None:
    """As on a GPU: rows that stand for nobody, and tables wider than any row, change nothing."""
    model = make_model(**SIZES, length_temperature="ssmax")
    engine = engine_of(model, prefill_chunk_tokens=64)
    engine._runner._pads = True
    passes: list[tuple[int, int]] = []
    launch = engine._runner._pass
    engine._runner._pass = lambda rows, width: (  # type: ignore[method-assign]
        passes.append((rows, width)),
        launch(rows, width),
    )[1]
    requests = [ask(f"{n}", draw_prompt(n), 30) for n in (1, 40, 300, 17, 16)]
    for request in requests:
        engine.add(request)
    answers = finish(engine)
    for request in requests:
        assert answers[request.id].token_ids == generated(model, request)
    assert set(passes) >= {(1, 16), (2, 16), (4, 32), (8, 32)}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_prefill_chunks(make_model: Make, chunk: int) -> None:
    model = make_model(**SIZES)
    engine = engine_of(model, prefill_chunk_tokens=chunk)
    requests = [ask("a", draw_prompt(70), 6), ask("b", draw_prompt(23), 6)]
    answers = {}
    for output in engine.generate(requests):
        answers.setdefault(output.request_id, []).extend(output.token_ids)
    assert answers == {request.id: generated(model, request) for request in requests}
    assert engine.stats().pages_used == 0


def test_arrivals_and_cancellations(make_model: Make) -> None:
    model = make_model(**SIZES)
    engine = engine_of(model, max_batch=4, prefill_chunk_tokens=16)
    requests = [ask(f"{i}", draw_prompt(n, i), 12) for i, n in enumerate((50, 9, 64, 30, 5, 20))]
    answers: dict[str, Answer] = {}
    cancelled = {"1": 9, "2": 8, "4": 20}  # while it decodes, while it reads, while it decodes
    for step in range(60):
        if step % 3 == 0 and step // 3 < len(requests):
            engine.add(requests[step // 3])
        for name, when in cancelled.items():
            if when == step:
                before = engine.stats()
                engine.cancel(name)
                engine.cancel(name)
                freed = before.pages_used - engine.stats().pages_used
                assert freed >= len(requests[int(name)].prompt_ids) // 16
        collect(engine.step(), answers)
    engine.cancel("nobody")
    assert not engine.has_work
    assert engine.stats().pages_used == 0
    for request in requests:
        expected, answer = generated(model, request), answers[request.id]
        if request.id in cancelled:
            assert answer.finish == Finish.CANCELLED
            assert len(answer.token_ids) < 12
            assert answer.token_ids == expected[: len(answer.token_ids)]
        else:
            assert (answer.finish, answer.token_ids) == (Finish.LENGTH, expected)


@pytest.mark.parametrize(("prefix_cache", "chunk"), [(True, 1), (False, 20)])
def test_preemption_by_recomputation(make_model: Make, prefix_cache: bool, chunk: int) -> None:
    """A cache that holds one request and a half. What was drawn is read again, and where a chunk
    ends before the last token, that one is decoded.
    """
    model = make_model(**SIZES)
    engine = engine_of(
        model, cache_tokens=7 * 16, prefix_cache=prefix_cache, prefill_chunk_tokens=chunk
    )
    requests = [ask(f"{i}", draw_prompt(n, i), 40, logprobs=0) for i, n in enumerate((30, 20, 40))]
    for request in requests:
        engine.add(request)
    answers = finish(engine)
    assert engine.stats().preemptions >= 1
    for request in requests:
        assert answers[request.id].token_ids == generated(model, request)
        whole = [*request.prompt_ids, *answers[request.id].token_ids]
        expected = logprobs_of(model, whole, len(request.prompt_ids))
        got = torch.tensor([x.logprob for x in answers[request.id].logprobs])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_request_that_is_alone_in_giving_up_its_pages(make_model: Make) -> None:
    """The other one is done, but its last token is on its way: nobody decodes in that step."""
    model = make_model(**SIZES)
    engine = engine_of(model, cache_tokens=5 * 16)
    requests = [ask("a", draw_prompt(4), 20), ask("b", draw_prompt(30), 24)]
    for request in requests:
        engine.add(request)
    answers = finish(engine)
    assert engine.stats().preemptions == 1
    for request in requests:
        assert answers[request.id].token_ids == generated(model, request)


def test_a_preempted_request_draws_what_it_would_have_drawn(make_model: Make) -> None:
    """Random draws with penalties go on where they were."""
    model = make_model(**SIZES)
    sampling = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5}
    requests = [ask(f"{i}", draw_prompt(20, i), 40, seed=i, **sampling) for i in range(3)]
    drawn = []
    for tokens in (7 * 16, 4096):
        engine = engine_of(model, cache_tokens=tokens)
        for request in requests:
            engine.add(request)
        drawn.append({name: answer.token_ids for name, answer in finish(engine).items()})
        assert (engine.stats().preemptions > 0) == (tokens < 4096)
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn[0].values()}) == 3


def test_prompts_that_begin_alike_share_pages(make_model: Make) -> None:
    model = make_model(**SIZES)
    engine = engine_of(model)
    shared = draw_prompt(50)
    for name, tail, cached in (("a", 10, 0), ("b", 11, 48), ("c", 12, 48)):
        request = ask(name, (*shared, *draw_prompt(tail, 1)), 8)
        engine.add(request)
        answers = finish(engine)
        assert answers[name].token_ids == generated(model, request)
        assert answers[name].cached_tokens == cached
    # The next turn of the conversation: the answer is in the cache too.
    turn = ask("d", (*request.prompt_ids, *answers["c"].token_ids, *draw_prompt(5, 2)), 8)
    engine.add(turn)
    answers = finish(engine)
    assert answers["d"].token_ids == generated(model, turn)
    assert answers["d"].cached_tokens == 64  # of 62 tokens of the prompt and 7 of the answer
    # The same prompt again: its last token is computed anew, because its logits are asked for.
    engine.add(ask("e", shared[:48], 3))
    assert finish(engine)["e"].cached_tokens == 32
    assert engine.stats().cached_tokens == 48 + 48 + 64 + 32
    assert engine.stats().pages_cached > 0
    without = engine_of(model, prefix_cache=False)
    for name in ("a", "b"):
        without.add(ask(name, shared, 2))
        assert finish(without)[name].cached_tokens == 0
    assert without.stats().pages_cached == 0


def test_a_corrupted_page_shows(make_model: Make) -> None:
    """The comparison above would notice a wrong number in a page that is shared."""
    model = make_model(**SIZES)
    engine = engine_of(model)
    request = ask("a", draw_prompt(60), 8, logprobs=0)
    engine.add(request)
    before = finish(engine)["a"]
    for layer in engine._runner.cache.layers:
        assert isinstance(layer, PagedLatentLayer)
        layer.pages[pages_of(engine, request.prompt_ids)[1]] *= 1.05
    engine.add(request)
    after = finish(engine)["a"]
    assert after.cached_tokens == 48
    shift = max(
        abs(x.logprob - y.logprob) for x, y in zip(before.logprobs, after.logprobs, strict=True)
    )
    assert shift > 1e-4


def test_another_rows_numbers_do_not_leak(make_model: Make) -> None:
    """What a page held before is no part of what comes after, be it no number at all."""
    model = make_model(**SIZES)
    engine = engine_of(model)
    for layer in engine._runner.cache.layers:
        assert isinstance(layer, PagedLatentLayer)
        layer.pages.fill_(torch.nan)
    request = ask("a", draw_prompt(20), 20)
    engine.add(request)
    assert finish(engine)["a"].token_ids == generated(model, request)


def test_ends_of_answers(make_model: Make) -> None:
    model = make_model(**SIZES)
    request = ask("a", draw_prompt(20), 30)
    whole = generated(model, request)
    end = whole[12]
    first = whole.index(end)
    engine = engine_of(model)
    for sampling in ({"stop_token_ids": (end,)}, {"stop_token_ids": (end, 5), "ignore_end": False}):
        engine.add(ask("a", request.prompt_ids, 30, **sampling))
        answer = finish(engine)["a"]
        assert (answer.token_ids, answer.finish) == (whole[: first + 1], Finish.STOP)
    model.generation_config.eos_token_id = end
    assert engine_of(model)._detokenizers is not None
    engine = engine_of(model)
    engine.add(ask("b", request.prompt_ids, 30, ignore_end=False))
    assert finish(engine)["b"].finish == Finish.STOP
    engine.add(ask("b", request.prompt_ids, 30, ignore_end=True))
    assert finish(engine)["b"].token_ids == whole


def test_logits_that_are_no_numbers_end_one_request_alone(make_model: Make) -> None:
    model = make_model(**SIZES)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    engine = engine_of(model)
    good = ask("good", [5] * 40, 10)
    engine.add(good)
    engine.add(ask("bad", [5, 7, 5], 10))
    answers = finish(engine)
    assert answers["bad"].finish == Finish.ERROR
    assert "not numbers" in (answers["bad"].error or "")
    assert answers["good"].token_ids == generated(model, good)


def test_a_failed_step_gives_up_what_was_asked_and_goes_on(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(**SIZES)
    engine = engine_of(model)
    request = ask("a", draw_prompt(40), 10)
    engine.add(request)
    for _ in range(3):
        engine.step()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert not engine.has_work
    assert (engine.stats().pages_used, engine.stats().pages_cached) == (0, 0)
    engine.add(request)
    answer = finish(engine)["a"]
    assert (answer.token_ids, answer.cached_tokens) == (generated(model, request), 0)


def test_a_wrapped_projection_is_called(make_model: Make) -> None:
    """Where `kv_b_proj` may be more than a matrix, the pages are gathered and expanded."""
    model = make_model(**SIZES, length_temperature="ssmax")
    called: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: called.append(1))
    engine = engine_of(model)
    requests = [ask(f"{n}", draw_prompt(n), 5) for n in (40, 3, 17)]
    for request in requests:
        engine.add(request)
    answers = finish(engine)
    assert len(called) == 2 * (3 + 4 + 2)  # prompts, and passes over the last tokens
    for request in requests:
        assert answers[request.id].token_ids == generated(model, request)


def test_a_long_prompt_takes_no_more_memory_than_its_pieces(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What layers return is as long as a piece, and expanded keys and values are bounded."""
    model = make_model(**SIZES)
    tokens, chunk, head_bytes = 3000, 64, 4 * (16 + 12 + 24)
    monkeypatch.setattr(attention, "EXPANDED_BYTES", 3100 * head_bytes)
    attend = attention.MLAAttention._attend
    expanded_bytes, lengths = [0], [0]

    def measured(self: Any, q: Tensor, kv: Tensor, *rest: Any) -> Tensor:
        expanded_bytes.append(kv.shape[:3].numel() * head_bytes)
        return attend(self, q, kv, *rest)

    monkeypatch.setattr(attention.MLAAttention, "_attend", measured)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    for layer in model.model.layers:  # its matrix is read past the hook
        layer.self_attn.kv_b_proj._forward_hooks.clear()
    engine = engine_of(model, prefill_chunk_tokens=chunk)
    engine.add(ask("a", draw_prompt(tokens), 2))
    finish(engine)
    assert max(lengths) == chunk
    assert 0.9 < max(expanded_bytes) / attention.EXPANDED_BYTES <= 1


def test_models_and_options_that_it_does_not_take(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(ValueError, match="other is a LlamaForCausalLM of transformers") as raised:
        Engine(load(llama, "other"), EngineOptions())
    assert "python -m ic convert" in str(raised.value)
    assert "vllm serve other" in str(raised.value)
    model = make_model(**SIZES)
    with pytest.raises(ValueError, match="cuda_graphs=true: the model is on cpu; leave it out"):
        engine_of(model, cuda_graphs=True)
    attends = model.model.operators.attention
    bare = replace(attends.capabilities, mask=False, row_lengths=False)
    monkeypatch.setattr(type(attends), "capabilities", bare)
    with pytest.raises(ValueError, match="attention=torch takes no rows of unequal length"):
        engine_of(model)


def test_what_is_refused(make_model: Make) -> None:
    model = make_model(**SIZES, max_position_embeddings=128)
    engine = engine_of(model, cache_tokens=96)
    for request, error in (
        (
            ask("a", [1] * 100, 29),
            "This model's maximum context length is 128 tokens. However, you requested 129 tokens "
            "(100 in the prompt, 29 in the completion).",
        ),
        (ask("a", [1] * 90, 7), "The cache of this engine holds 96 tokens (cache_tokens)."),
        (ask("a", [1, 320], 7), "Invalid 'prompt': token 320 is not in the vocabulary of 320"),
        (ask("a", [-1], 7), "token -1 is not in the vocabulary"),
        (
            Request("a", (1,), Sampling(stop_token_ids=(319, 320))),
            "Invalid 'stop_token_ids': token 320 is not in the vocabulary of 320",
        ),
    ):
        with pytest.raises(ValueError, match="However|Invalid") as raised:
            engine.add(request)
        assert error in str(raised.value)
    engine.add(ask("a", [1], 7))
    with pytest.raises(ValueError, match="Invalid 'id': 'a' is the id of a request in work"):
        engine.add(ask("a", [1], 7))
    engine.cancel("a")
    with pytest.raises(ValueError, match="Invalid 'id': 'a'"):  # it was not said yet
        engine.add(ask("a", [1], 7))
    assert finish(engine)["a"].finish == Finish.CANCELLED
    engine.add(ask("a", [1], 7))
    with pytest.raises(ValueError, match="'a' is the id of a request in work"):
        list(engine.generate([ask("b", [1], 7), ask("a", [1], 7)]))
    assert set(finish(engine)) == {"a"}
    outputs = engine.generate([Request("c", (1,), Sampling())])
    next(outputs)
    outputs.close()
    assert not engine.has_work
    assert engine.stats().pages_used == 0
