"""The model over a quantised cache: what is held, in which bytes, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ic.model import LatentCache, MLAForCausalLM
from ic.model.cache import LatentLayer, concatenate_rows
from ic.model.quantised_latents import code_dtype
from ic.model.static_cache import StaticLatentCache

Make = Callable[..., MLAForCausalLM]
NAMES = ("fp8", "int8")


def draw(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


class RoundingLayer(LatentLayer):
    """A plain layer that rounds what it is given, by this file's own arithmetic."""

    def append(self, latent_BTR: Tensor, k_rope_BTP: Tensor) -> None:
        row = torch.cat((latent_BTR, k_rope_BTP), -1).double()
        peak = row.abs().amax(-1, keepdim=True)
        if self.kind == "int8":
            rounded = (row * 127 / peak).round() * peak / 127
        else:
            code = row * 448 / peak
            step = 2.0 ** (code.abs().clamp_min(2.0**-6).log2().floor() - 3)
            rounded = (code / step).round() * step * peak / 448
        rank = latent_BTR.shape[-1]
        super().append(rounded[..., :rank].float(), rounded[..., rank:].float())


def rounding_cache(kind: str) -> LatentCache:
    cache = LatentCache(0)
    cache.layers = [RoundingLayer() for _ in range(3)]
    for layer in cache.layers:
        layer.kind = kind
    return cache


@torch.no_grad()
def in_pieces(model: MLAForCausalLM, x: Tensor, cache: Any, sizes: tuple[int, ...]) -> Tensor:
    assert sum(sizes) == x.shape[1]
    return torch.cat([model(p, past_key_values=cache).logits for p in x.split(list(sizes), 1)], 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_sees_what_rounding_leaves_of_every_token(make_model: Make, name: str) -> None:
    model = make_model()
    x = draw(2, 70)
    model.config.cache_dtype = name
    caches = [model.model.new_cache() for _ in range(2)]
    got = in_pieces(model, x, caches[0], (40, 1, 20, 5, 1, 1, 2))
    expected = in_pieces(model, x, rounding_cache(name), (40, 1, 20, 5, 1, 1, 2))
    # A number that lies between two codes may fall on either side in float32.
    assert ((got - expected).norm() / expected.norm()) < 2e-3
    # The size of a piece changes nothing: a prefill too attends to what the cache holds.
    torch.testing.assert_close(in_pieces(model, x, caches[1], (70,)), got, atol=5e-2, rtol=0)
    plain = model(x, use_cache=False).logits
    assert 1e-3 < ((got - plain).norm() / plain.norm()) < 0.1
    for layer in caches[0].layers:
        assert layer.latents().dtype == code_dtype(name)
        assert layer.scales().shape == (2, 70)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_scale_shows(make_model: Make, name: str) -> None:
    model = make_model()
    x = draw(1, 40)
    model.config.cache_dtype = name
    cache = model.model.new_cache()
    in_pieces(model, x[:, :39], cache, (39,))
    right = model(x[:, 39:], past_key_values=cache).logits
    cache.crop(-1)
    cache.layers[1].scale.mul_(1.25)
    wrong = model(x[:, 39:], past_key_values=cache).logits
    assert (wrong - right).norm() / right.norm() > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_static_and_growing_and_ragged_caches_agree(make_model: Make, name: str) -> None:
    model = make_model()
    codes = code_dtype(name)
    x = draw(2, 60)
    sizes = (30, 1, 2, 17, 1, 1, 8)
    growing = in_pieces(model, x, LatentCache(3, codes=codes), sizes)
    static = StaticLatentCache(3, 64, codes)
    torch.testing.assert_close(in_pieces(model, x, static, sizes), growing, atol=1e-4, rtol=0)
    assert static.layers[0].keys is None
    alone = [LatentCache(3, codes=codes) for _ in range(2)]
    for row, (cache, tokens) in enumerate(zip(alone, (25, 60), strict=True)):
        in_pieces(model, x[row : row + 1, :tokens], cache, (tokens,))
    together = concatenate_rows(alone)
    assert together.is_ragged
    new = draw(2, 3, seed=1)
    got = in_pieces(model, new, together, (1, 2))
    for row, cache in enumerate(alone):
        expected = in_pieces(model, new[row : row + 1], cache, (1, 2))
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=0)
        end = cache.row_lengths[0]
        for joined, own in zip(together.layers, cache.layers, strict=True):
            torch.testing.assert_close(joined.scales()[row, :end], own.scales()[0])
    with pytest.raises(ValueError, match="differ in"):
        concatenate_rows([alone[0], filled(LatentCache(3))])


def filled(cache: Any, tokens: int = 6) -> Any:
    generator = torch.Generator().manual_seed(tokens)
    for layer in range(len(cache.layers)):
        cache.update(
            torch.randn(2, 1, tokens, 32, generator=generator),
            torch.randn(2, 1, tokens, 8, generator=generator),
            layer,
        )
    return cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_rows_move_with_their_scales(name: str, kind: str) -> None:
    codes = code_dtype(name)

    def make(dtype: torch.dtype | None) -> Any:
        return LatentCache(1, 0, dtype) if kind == "growing" else StaticLatentCache(1, 16, dtype)

    quantised, plain = filled(make(codes)), filled(make(None))
    for cache in (quantised, plain):
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.crop(-2)
    new = torch.randn(2, 1, 1, 32), torch.randn(2, 1, 1, 8)
    for got, expected in zip(quantised.update(*new, 0), plain.update(*new, 0), strict=True):
        shown = slice(0, 5)  # behind them a static cache holds what was cropped
        torch.testing.assert_close(got[:, :, shown], expected[:, :, shown], atol=0.2, rtol=0)
        assert not got[:, :, shown].equal(expected[:, :, shown])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_by_allocation(make_model: Make, name: str) -> None:
    """A byte a number and four a token and layer, after growth too."""
    model = make_model()
    model.config.cache_dtype = name
    cache = model.model.new_cache(50)
    in_pieces(model, draw(1, 50), cache, (50,))
    assert cache.nbytes == 50 * 3 * (32 + 8 + 4)
    in_pieces(model, draw(1, 10), cache, (10,))
    assert cache.nbytes == sum(x.buffer.nbytes + x.scale.nbytes for x in cache.layers)
    cache.reset()
    assert cache.nbytes == 0
    in_pieces(model, draw(2, 4), cache, (4,))
    assert cache.layers[0].scales().shape == (2, 4)


def test_generate_runs_over_it(make_model: Make) -> None:
    model = make_model()
    x = draw(2, 12)
    plain = model.generate(x, max_new_tokens=6, do_sample=False)
    model.config.cache_dtype = "int8"
    for kind in (None, "static"):
        out = model.generate(
            x, max_new_tokens=6, do_sample=False, cache_implementation=kind,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert out.past_key_values.layers[0].latents().dtype == torch.int8
        assert out.sequences.equal(plain)


def test_ranks_that_share_a_sequence_refuse_it(make_model: Make) -> None:
    model = make_model()
    model.config.cache_dtype = "fp8"
    model.model.context_parallel = object()
    with pytest.raises(ValueError, match="cache_dtype=fp8: .* not quantised; leave it out"):
        model.model.new_cache()
