"""What the latent cache holds, and how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def test_a_repeated_row_lies_beside_itself() -> None:
    cache = LatentCache(1)
    latent, rope = fill(cache, 4)
    assert not latent[0].equal(latent[1])
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].keys.equal(latent[[0, 0, 0, 1, 1, 1]])
    assert cache.layers[0].values.equal(rope[[0, 0, 0, 1, 1, 1]])


def test_batch_operations_move_rows() -> None:
    cache = LatentCache(1)
    latent, _ = fill(cache, 4)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].keys.equal(latent[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.equal(latent[[1, 1, 1, 1]])


def test_every_method_does_what_transformers_cache_does() -> None:
    ours, theirs = LatentCache(2), DynamicCache()
    steps: list[Callable[[Cache], Any]] = [
        lambda cache: cache.get_seq_length(),
        lambda cache: [fill(cache, 6, layer) for layer in (0, 1)],
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 4])),
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_select_indices(torch.tensor([4, 0])),
        lambda cache: [fill(cache, 3, layer) for layer in (0, 1)],
        lambda cache: cache.batch_select_indices(torch.tensor([True, False])),
        lambda cache: cache.reset(),
        lambda cache: [fill(cache, 2, layer) for layer in (0, 1)],
    ]
    for step in steps:
        for cache in (ours, theirs):
            step(cache)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(5, 0) == theirs.get_mask_sizes(5, 0)
        for own, other in zip(ours.layers, theirs.layers, strict=False):
            if other.keys is not None:
                assert own.keys.equal(other.keys)
                assert own.values.equal(other.values)
    assert ours.get_max_length() == theirs.get_max_length() == -1
    assert len(ours) == len(theirs) == 2
    assert ours.is_croppable
    assert not ours.is_compileable
    assert ours.is_sliding == theirs.is_sliding == [False, False]


def test_allocates_exactly_the_cost(make_model) -> None:
    model = make_model()
    cache = LatentCache(3, capacity_tokens=50)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 50)), past_key_values=cache)
    assert cache.nbytes == 50 * cache_bytes_per_token(model.config, bytes_per_number=4)
    assert cache.nbytes == 50 * 3 * (32 + 8) * 4
