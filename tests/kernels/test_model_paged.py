"""The engine on our kernels: decode reads the pages of each row where they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ic.model import MLAForCausalLM
from tests.inference.engine.serving import (
    SIZES,
    ask,
    draw_prompt,
    engine_of,
    finish,
    generated,
    pages_of,
)
from tests.kernels.test_model_backend import CONVERTED, DIMS, SWITCHES, Kernels

Make = Callable[..., MLAForCausalLM]
ALL = SIZES | DIMS | SWITCHES["all"]


@pytest.mark.parametrize(
    "changes",
    [{"length_temperature": "llama4", "nope_layers": [1], "rope_interleave": False}, CONVERTED],
    ids=["nope", "converted"],
)
def test_the_engine_on_kernels(
    make_model: Make, device: torch.device, changes: dict[str, Any]
) -> None:
    """Rows of unequal length decode through a table of their pages, and tokens are those of
    `generate` on PyTorch's operators.
    """
    model = make_model(**ALL | changes).to(device)
    plain = make_model(**SIZES | DIMS | changes)
    # PyTorch reads such pieces in absorbed form; a replayed graph would call no kernel from Python.
    engine = engine_of(model, prefill_chunk_tokens=16, cuda_graphs=False)
    requests = [ask(f"{n}", draw_prompt(n), 4) for n in (5, 20, 17)]
    for request in requests:
        engine.add(request)
    with Kernels() as kernels:
        answers = finish(engine)
    ran = Counter(kernels.names)
    # Seven passes of one or two rows, and the ends of two prompts: four tokens, and one.
    assert ran["mla_decode"] == 2 * (7 + 2)
    # With the rotation of the queries in one kernel; a layer that does not rotate appends by itself.
    assert ran["append_with_queries"] == (0 if "latent_norm" in changes else 7 + 5)
    for request in requests:
        assert answers[request.id].token_ids == generated(plain, request)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
def test_kernels_and_torch_write_and_read_the_same_codes(
    make_model: Make, device: torch.device, cache_dtype: str
) -> None:
    engines = [
        engine_of(make_model(**sizes).to(device), cache_dtype=cache_dtype, prefill_chunk_tokens=16)
        for sizes in (ALL, SIZES | DIMS)
    ]
    request = ask("a", draw_prompt(30), 4, logprobs=0)
    answers = []
    for engine in engines:
        engine.add(request)
        answers.append(finish(engine)["a"])
    assert answers[0].token_ids == answers[1].token_ids
    for one, other in zip(answers[0].logprobs, answers[1].logprobs, strict=True):
        assert abs(one.logprob - other.logprob) < 2e-2  # a code may be rounded the other way
    pages = [pages_of(engine, request.prompt_ids)[0] for engine in engines]
    first, second = (
        engine._runner.cache.layers[0].pages[page].float()
        * engine._runner.cache.layers[0].scale[page][..., None]
        for engine, page in zip(engines, pages, strict=True)
    )
    assert first.abs().max() > 0.5
    assert ((first - second).abs() > 1e-3).float().mean() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["triton", "torch"])
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_graphs_change_nothing(make_model: Make, attention: str, cache_dtype: str) -> None:
    torch.use_deterministic_algorithms(False)  # filling memory with NaN is no part of the step
    sizes = ALL if attention == "triton" else SIZES | DIMS
    model = make_model(**sizes).to("cuda")
    requests = [ask(f"{n}", draw_prompt(n), 20, logprobs=0) for n in (5, 40, 31, 100, 64)]
    answers = []
    for graphs in (True, False):
        engine = engine_of(
            model, max_batch=4, cache_tokens=256, cuda_graphs=graphs, cache_dtype=cache_dtype
        )
        for request in requests:
            engine.add(request)
        answers.append(finish(engine))
        assert engine.stats().preemptions > 0
    assert answers[0] == answers[1]
