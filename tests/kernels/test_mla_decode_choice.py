"""Which kernel decodes what: asked of a device that need not be there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ic.kernels import mla_decode_launch as launch
from ic.kernels.mla_decode_launch import MANY_HEADS_CODES, Device, choose_decode_config

SHARED_BYTES = 232448
HOPPER = Device(90, 132, SHARED_BYTES)


def strided(cache: torch.Tensor) -> torch.Tensor:
    return cache.repeat(1, 2, 1)[:, ::2]


def unaligned(cache: torch.Tensor) -> torch.Tensor:
    return torch.zeros(cache.numel() + 8, dtype=cache.dtype)[8:].view(cache.shape)


def empty(cache: torch.Tensor) -> torch.Tensor:
    return cache[:0]


def name_changes(changes: dict[str, Any]) -> str:
    return " ".join(f"{name} {getattr(x, '__name__', x)}" for name, x in changes.items())


def chosen(
    monkeypatch: pytest.MonkeyPatch, device: Device = HOPPER, **changes: Any
) -> launch.DecodeConfig:
    """The configuration for 64 rows of 512+64 over e4m3 pages of 64, with changes."""
    options = {
        "num_query": 1, "heads": 64, "latent": 512, "rope": 64, "dtype": torch.bfloat16,
        "kind": torch.float8_e4m3fn, "page_size": 64, "paged": True,
    } | changes  # fmt: skip
    monkeypatch.setattr(launch, "device_of", lambda _tensor: device)
    queries = [
        torch.zeros(2, options["num_query"], options["heads"], width, dtype=options["dtype"])
        for width in (options["latent"], options["rope"])
    ]
    width = options["latent"] + options["rope"]
    cache = torch.zeros(4, options["page_size"], width).to(options["kind"])
    if "cache" in options:
        cache = options["cache"](cache)
    return choose_decode_config(*queries, cache, options["paged"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": torch.int8},
        {"dtype": torch.float16},
        {"page_size": 192},
        {"paged": False, "page_size": 100},
        {"num_query": 4, "heads": 16},
        {"heads": 100},
        {"heads": 17},
        {"num_query": 2, "heads": 16},
    ],
    ids=name_changes,
)
def test_many_heads_over_codes_on_hopper(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert chosen(monkeypatch, **changes) == MANY_HEADS_CODES


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 16},
        {"num_query": 2, "heads": 8},
        {"page_size": 48},
        {"latent": 256},
        {"rope": 32},
        {"dtype": torch.float32},
        {"kind": torch.bfloat16},
        {"device": Device(100, 148, SHARED_BYTES)},
        {"device": Device(80, 108, 166912)},
        {"device": Device(90, 4, SHARED_BYTES, interpreted=True)},
        {"cache": strided},
        {"cache": unaligned},
        {"cache": empty},
    ],
    ids=name_changes,
)
def test_what_other_kernels_take(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert not chosen(monkeypatch, **changes).many_heads_codes


def test_which_many_heads_share_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warpgroups in pairs take more than 16 rows, at latents that fit their registers, from a
    cache that TMA can copy, on Hopper."""

    def pairs(
        latent: int = 192,
        rope: int = 64,
        heads: int = 128,
        page_size: int | None = 64,
        device: Device = HOPPER,
    ) -> launch.DecodeConfig | None:
        monkeypatch.setattr(launch, "device_of", lambda _: device)
        dtype = torch.bfloat16
        query = torch.empty(1, 1, heads, latent + rope, dtype=dtype)
        cache = torch.empty(2, page_size or 100, latent + rope, dtype=dtype)
        config = choose_decode_config(
            query[..., :latent], query[..., latent:], cache, page_size is not None
        )
        return config if config.pairs else None

    for latent, heads in itertools.product((128, 192, 256), (17, 32, 64, 65, 128, 130)):
        for page_size in (None, 64, 192):
            config = pairs(latent, heads=heads, page_size=page_size)
            assert config is not None
            assert config.block_m == (64 if heads <= 64 else 128)
            # The loop holds two tiles; a third is on its way.
            assert config.num_stages >= 3
            held = 64 * config.num_stages + config.block_m
            assert held * (latent + 64) * 2 + 1024 <= SHARED_BYTES
    assert pairs(heads=16) is None
    assert pairs(rope=32) is None
    assert pairs(latent=512) is None
    assert pairs(latent=96) is None
    assert pairs(page_size=16) is None
    assert pairs(device=Device(100, 132, SHARED_BYTES)) is None


@pytest.mark.parametrize("latent", [448, 512])
def test_many_heads_of_wide_latents(latent: int) -> None:
    """Three warpgroups take more rows than a tile of few rows holds, of what TMA can copy."""

    def applies(heads: int, num_query: int = 1, page_size: int | None = 64, rope: int = 64) -> bool:
        query = torch.empty(1, num_query, heads, latent + rope, dtype=torch.bfloat16)
        cache = torch.empty(2, page_size or 100, latent + rope, dtype=torch.bfloat16)
        parts = query[..., :latent], query[..., latent:]
        return launch.many_heads_applies(*parts, cache, page_size is not None)

    for heads in (17, 32, 64, 128):
        assert applies(heads)
        assert applies(heads, page_size=None)
        assert not applies(heads, page_size=16)
    assert applies(16, num_query=2)
    assert not applies(16)
    assert not applies(4, num_query=4)
    assert not applies(64, rope=32)
