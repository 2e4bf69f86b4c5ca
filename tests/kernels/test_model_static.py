"""On our kernels, a static cache decodes as one that grows does; a step fits a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ic.model import MLAForCausalLM
from tests.kernels.test_model_backend import Kernels, error
from tests.kernels.test_model_rows import build

Make = Callable[..., MLAForCausalLM]
TOLERANCE = 1e-5


def draw(device: torch.device, rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, 97, (rows, tokens), generator=generator).to(device)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [48, 41])
def test_pieces_over_a_static_cache(make_model: Make, device: torch.device, capacity: int) -> None:
    """A prefill, one token, four, which one kernel takes, and five; with a capacity in whole pages
    and without, where the append is not fused.
    """
    model, plain = build(make_model, device, length_temperature="ssmax")
    x = draw(device, 2, 41)
    expected = plain(x, use_cache=False).logits
    cache = model.model.new_static_cache(capacity)
    start = 0
    for size in (20, 1, 1, 4, 5, 1):
        with Kernels() as kernels:
            got = model(x[:, start : start + size], past_key_values=cache).logits
        assert error(got, expected[:, start : start + size]) < TOLERANCE
        start += size
    assert int(cache.get_seq_length()) == start
    ran = Counter(kernels.names)
    assert ran["mla_decode"] == 2
    assert ran["append_latent"] == (2 if capacity == 48 else 0)


@torch.no_grad()
def test_tokens_past_the_capacity_stay_out_of_the_next_row(
    make_model: Make, device: torch.device
) -> None:
    model, _ = build(make_model, device)
    x = draw(device, 2, 17)
    cache = model.model.new_static_cache(16)
    model(x[:, :16], past_key_values=cache)
    before = [layer.latents().clone() for layer in cache.layers]
    if device.type == "cpu":
        with pytest.raises(ValueError, match="17 tokens: the static cache has 16 places"):
            model(x[:, 16:], past_key_values=cache)
    else:
        model(x[:, 16:], past_key_values=cache)
    for layer, held in zip(cache.layers, before, strict=True):
        assert layer.latents().equal(held)


@torch.no_grad()
def test_generate(make_model: Make, device: torch.device) -> None:
    model, plain = build(make_model, device)
    x = draw(device, 2, 24)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with Kernels() as kernels:
        text = model.generate(x, **how, cache_implementation="static", disable_compile=True)
    assert text.equal(plain.generate(x, **how))
    assert Counter(kernels.names)["mla_decode"] == 5 * 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_in_a_cuda_graph(make_model: Make, device: torch.device) -> None:
    """Captured once, replayed at every length."""
    torch.use_deterministic_algorithms(False)  # filling memory with NaN is no part of the step
    model, plain = build(make_model, device, length_temperature="ssmax")
    x = draw(device, 2, 41)
    expected = plain(x, use_cache=False).logits
    for each in (model, plain):
        cache = each.model.new_static_cache(48)
        each(x[:, :20], past_key_values=cache)
        token = x[:, :1].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            each(token, past_key_values=cache)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        cache.crop(-1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = each(token, past_key_values=cache).logits
        for at in range(20, 41):
            token.copy_(x[:, at : at + 1])
            graph.replay()
            assert error(logits, expected[:, at : at + 1]) < TOLERANCE
        assert int(cache.get_seq_length()) == 41


@pytest.mark.gpu
@torch.no_grad()
def test_generate_compiles_its_steps(make_model: Make, device: torch.device) -> None:
    """As transformers does by itself with a static cache on a GPU."""
    torch.use_deterministic_algorithms(False)
    model, plain = build(make_model, device)
    x = draw(device, 2, 24)
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for each in (model, plain):
        text = each.generate(x, **how, cache_implementation="static")
        assert text.equal(plain.generate(x, **how))


@torch.no_grad()
@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("kind", ["static", "growing"])
def test_a_quantised_cache_on_our_kernels(
    make_model: Make, device: torch.device, name: str, kind: str
) -> None:
    """Our kernels append and decode what PyTorch's operators append and decode."""
    model, plain = build(make_model, device)
    x = draw(device, 2, 41)
    outputs, caches = [], []
    ran: Counter[str] = Counter()
    for each in (model, plain):
        each.config.cache_dtype = name
        cache = each.model.new_static_cache(48) if kind == "static" else each.model.new_cache()
        parts = []
        with Kernels() as kernels:
            for piece in x.split([36, 1, 1, 3], dim=1):
                parts.append(each(piece, past_key_values=cache).logits)
        ran = ran or Counter(kernels.names)
        outputs.append(torch.cat(parts, 1))
        caches.append(cache)
    layers = model.config.num_hidden_layers
    assert ran["append_latent"] == ran["mla_decode"] == 3 * layers
    assert error(outputs[0], outputs[1]) < 2e-3
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(ours.scales()[:, :41], theirs.scales()[:, :41])
