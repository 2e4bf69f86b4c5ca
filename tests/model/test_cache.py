"""What the latent cache holds, and how much."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from ic.model import LatentCache
from ic.model.cost import cache_bytes_per_token


def fill(cache: Cache, tokens: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    latent = torch.randn(2, 1, tokens, 5, generator=generator)
    rope = torch.randn(2, 1, tokens, 3, generator=generator)
    cache.update(latent, rope, layer)
    return latent, rope


def test_holds_what_was_put_in_through_growth() -> None:
    cache = LatentCache(1)
    parts = [fill(cache, n) for n in (7, 1, 3000, 2)]
    latent = torch.cat([p[0] for p in parts], 2)
    rope = torch.cat([p[1] for p in parts], 2)
    assert cache.layers[0].keys.equal(latent)
    assert cache.layers[0].values.equal(rope)
    assert cache.layers[0].latents().equal(torch.cat([latent, rope], -1)[:, 0])
    cache.keep(9)
    assert cache.get_seq_length() == 9
    assert cache.layers[0].keys.equal(latent[:, :, :9])
    cache.crop(-2)
    assert cache.layers[0].values.equal(rope[:, :, :7])


def test_crop_counts_what_it_drops_as_transformers_does() -> None:
    ours, theirs = LatentCache(1), DynamicCache()
    for cache in (ours, theirs):
        fill(cache, 8)
    for drop in (0, -3, 0, -100, 0):
        for cache in (ours, theirs):
            cache.crop(drop)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.layers[0].keys.equal(theirs.layers[0].keys)
    for cache in (ours, theirs):
        fill(cache, 5)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
    assert ours.layers[0].keys.equal(theirs.layers[0].keys)
    ours.keep(9)
    assert ours.get_seq_length() == 5
    ours.keep(0)
    assert ours.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"keep\(-1\): .* at least 0"):
        ours.keep(-1)


def test_batch_operations_move_rows() -> None:
    cache = LatentCache(1)
    latent, _ = fill(cache, 4)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].keys.equal(latent[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.equal(latent[[1, 1, 1, 1]])


def test_allocates_exactly_the_cost(make_model) -> None:
    model = make_model()
    cache = LatentCache(3, capacity_tokens=50)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 50)), past_key_values=cache)
    assert cache.nbytes == 50 * cache_bytes_per_token(model.config, bytes_per_number=4)
    assert cache.nbytes == 50 * 3 * (32 + 8) * 4
