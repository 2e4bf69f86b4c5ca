"""On our kernels, rows of unequal length decode as each does alone; a step fits a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ic.model import MLAForCausalLM
from ic.model.cache import concatenate_rows
from ic.model.operators import NewTokens, load_operators
from ic.model.registry import backend_names
from tests.kernels.test_model_backend import DIMS, SWITCHES, Kernels, error
from tests.model.test_rows import LENGTHS, VARIANTS, assert_equal_alone, draw, prefilled

Make = Callable[..., MLAForCausalLM]


def build(
    make_model: Make, device: torch.device, switch: str = "all", **changes: Any
) -> tuple[MLAForCausalLM, MLAForCausalLM]:
    """The same model on kernels and on PyTorch; the latter fills caches, which is slow in the
    interpreter.
    """
    sizes = DIMS | changes
    return make_model(**sizes | SWITCHES[switch]).to(device), make_model(**sizes).to(device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_is_as_it_is_alone(make_model: Make, device: torch.device, variant: str) -> None:
    """One token, four, which one kernel takes, and five, which run on PyTorch's operators."""
    model, prefill = build(make_model, device, **VARIANTS[variant])
    assert_equal_alone(model, [1, 4, 5], prefill=prefill)


@pytest.mark.parametrize("switch", ["attention", "norm", "rope"])
def test_each_switch(make_model: Make, device: torch.device, switch: str) -> None:
    model, prefill = build(make_model, device, switch)
    assert_equal_alone(model, [1, 1], prefill=prefill)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_in_half_precision(make_model: Make, device: torch.device, dtype: torch.dtype) -> None:
    """Sums are split by the longest row, so the last bit may differ; nothing more may."""
    model, prefill = (each.to(dtype) for each in build(make_model, device))
    tolerance = 2e-2 if dtype == torch.float16 else 1e-1
    assert_equal_alone(model, [1, 1], tolerance, prefill)


@torch.no_grad()
def test_takes_the_launches_of_equal_rows(make_model: Make, device: torch.device) -> None:
    model, prefill = build(make_model, device)
    x = draw(3, 1).to(device)
    ran = []
    for lengths in (LENGTHS, (100, 100, 100)):
        cache = concatenate_rows([prefilled(prefill, length) for length in lengths])
        with Kernels() as kernels:
            model(x, past_key_values=cache)
        ran.append(Counter(kernels.names))
    assert ran[0] == ran[1]
    assert ran[0]["append_latent"] == ran[0]["mla_decode"] == model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn])
def test_quantised_caches(device: torch.device, quantised: torch.dtype) -> None:
    """Both backends say that they take them: what one appends, both decode."""
    triton, plain = load_operators("triton"), load_operators("torch")
    assert triton.capabilities.quantised_cache
    assert plain.capabilities.quantised_cache
    generator = torch.Generator().manual_seed(0)
    rows, keys, rank, width, heads = 2, 48, 32, 16, 3
    latent, rope, weight = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((rows * keys, rank), (rows * keys, width), (rank,))
    )
    angle = torch.randn(rows * keys, width // 2, generator=generator).to(device)
    pages = torch.zeros(rows, keys, rank + width, dtype=quantised, device=device)
    scale = torch.zeros(rows, keys, device=device)
    slots = torch.arange(rows * keys, device=device)
    options = {"eps": 1e-6, "interleave": True}
    new = NewTokens(latent, rope, angle.cos(), angle.sin(), slots)
    triton.append(new, weight, pages, cache_scale=scale, **options)
    q_latent, q_rope = (
        torch.randn(rows, 2, heads, n, generator=generator).to(device) for n in (rank, width)
    )
    lengths = torch.tensor([keys, 17], dtype=torch.int32, device=device)
    decode = {"scale": 0.2, "lengths_B": lengths, "cache_scale_BS": scale}
    got = triton.absorbed(q_latent, q_rope, pages, **decode)
    assert error(got, plain.absorbed(q_latent, q_rope, pages, **decode)) < 2e-3
    exact = torch.zeros_like(pages, dtype=torch.float32)
    triton.append(new, weight, exact, **options)
    unquantised = {"scale": 0.2, "lengths_B": lengths}
    assert error(got, plain.absorbed(q_latent, q_rope, exact, **unquantised)) < 5e-2


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", backend_names())
@pytest.mark.parametrize("lengths", [LENGTHS, (100, 100, 100)], ids=str)
def test_a_step_in_a_cuda_graph(
    make_model: Make, device: torch.device, name: str, lengths: tuple[int, ...]
) -> None:
    """Captured with a context made before; replayed on another token."""
    assert load_operators(name).capabilities.graph_capture
    torch.use_deterministic_algorithms(False)  # filling memory with NaN is no part of the step
    parts = {f"{part}_backend": name for part in ("attention", "norm", "rope")}
    model = make_model(**DIMS | parts).to(device)
    x = draw(3, 2).to(device)
    cache = concatenate_rows([prefilled(model, length) for length in lengths])
    context = model.model.make_context(3, 1, device, cache)

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(tokens, past_key_values=cache, context=context).logits
        cache.crop(-1)
        return logits

    tokens = x[:, :1].clone()
    expected = []
    for column in (0, 1):
        tokens.copy_(x[:, column : column + 1])
        expected.append(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for column in (0, 1):
        tokens.copy_(x[:, column : column + 1])
        graph.replay()
        torch.testing.assert_close(captured, expected[column], atol=1e-5, rtol=0)
