"""The engine on a thread: many listeners, some of which go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Finish, Output, Request
from ic.inference.engine.threaded import ThreadedEngine
from ic.model import MLAForCausalLM
from tests.inference.engine.serving import (
    SIZES,
    SMALL_PAGES,
    Make,
    ask,
    draw_prompt,
    generated,
    load,
)


@contextmanager
def threaded(model: MLAForCausalLM, **options: Any) -> Iterator[ThreadedEngine]:
    engine = ThreadedEngine(load(model), EngineOptions(**SMALL_PAGES | options))
    try:
        yield engine
    finally:
        engine.close()


async def answer(engine: ThreadedEngine, request: Request, leave_after: int = 1000) -> list[Output]:
    got = []
    async with aclosing(_generator(engine, request)) as outputs:
        async for output in outputs:
            got.append(output)
            if len(got) == leave_after:
                break
    return got


def _generator(engine: ThreadedEngine, request: Request) -> Any:
    outputs: AsyncIterator[Output] = engine.generate(request)
    return outputs


def test_listeners_get_their_answers_and_may_leave(make_model: Make) -> None:
    model = make_model(**SIZES)
    requests = [ask(f"{i}", draw_prompt(10 + 7 * i, i), 9) for i in range(8)]

    async def all_of_them(engine: ThreadedEngine) -> list[list[Output]]:
        async with asyncio.timeout(60):
            leaves = {1: 2, 5: 1}
            return await asyncio.gather(
                *(answer(engine, x, leaves.get(i, 1000)) for i, x in enumerate(requests))
            )

    with threaded(model, max_batch=3, prefill_chunk_tokens=16) as engine:
        answers = asyncio.run(all_of_them(engine))
        # Another loop, and an id that is free again.
        again = asyncio.run(answer(engine, requests[1]))
    assert engine.stats().pages_used == 0
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    for i, (request, outputs) in enumerate(zip(requests, answers, strict=True)):
        tokens = [token for output in outputs for token in output.token_ids]
        expected = generated(model, request)
        if i in (1, 5):
            assert len(outputs) in (1, 2)
            assert tokens == expected[: len(tokens)]
            assert outputs[-1].finish is None
        else:
            assert tokens == expected
            assert outputs[-1].finish == Finish.LENGTH
    assert [token for output in again for token in output.token_ids] == generated(
        model, requests[1]
    )


def test_what_is_refused_comes_at_once(make_model: Make) -> None:
    model = make_model(**SIZES)

    async def refused(engine: ThreadedEngine) -> None:
        with pytest.raises(ValueError, match="The cache of this engine holds 256 tokens"):
            await answer(engine, ask("a", [1] * 250, 7))
        first = engine.generate(ask("a", draw_prompt(20), 200))
        await anext(first)
        with pytest.raises(ValueError, match="'a' is the id of a request in work"):
            await answer(engine, ask("a", [1], 7))
        await first.aclose()

    with threaded(model, cache_tokens=256) as engine:
        asyncio.run(refused(engine))
    with pytest.raises(ValueError, match="the engine is closed"):
        asyncio.run(answer(engine, ask("b", [1], 7)))
    engine.close()


def test_closing_ends_what_is_in_work(make_model: Make) -> None:
    model = make_model(**SIZES)

    async def wait_for_the_end(engine: ThreadedEngine) -> list[Output]:
        outputs = engine.generate(ask("a", draw_prompt(20), 3000))
        await anext(outputs)
        await asyncio.to_thread(engine.close)
        return [output async for output in outputs]

    with threaded(model) as engine:
        rest = asyncio.run(wait_for_the_end(engine))
    assert rest[-1].finish == Finish.CANCELLED
    assert engine.stats().pages_used == 0


def test_a_failed_step_is_told_to_all_and_others_go_on(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(**SIZES)
    requests = [ask(f"{i}", draw_prompt(20, i), 400) for i in range(3)]
    mlp = model.model.layers[1].mlp

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error:\n out of memory")

    async def fail_in_the_middle(engine: ThreadedEngine) -> list[list[Output]]:
        outputs = [engine.generate(request) for request in requests]
        for one in outputs:
            await anext(one)
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "forward", fail)
            return [[output async for output in one] for one in outputs]

    with threaded(model) as engine:
        for outputs in asyncio.run(fail_in_the_middle(engine)):
            assert outputs[-1].finish == Finish.ERROR
            assert outputs[-1].error == "the engine failed: CUDA error: out of memory"
        request = ask("0", draw_prompt(30), 5)
        after = asyncio.run(answer(engine, request))
    assert [token for output in after for token in output.token_ids] == generated(model, request)
    assert engine.stats().pages_used == 0
