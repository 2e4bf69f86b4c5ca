"""Which kernel decodes what: asked of a device that need not be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ic.kernels import mla_decode_launch as launch
from ic.kernels.mla_decode_launch import MANY_HEADS_CODES, Device, choose_decode_config

HOPPER = Device(90, 132, 232448)


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
    ],
    ids=str,
)
def test_many_heads_over_codes_on_hopper(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert chosen(monkeypatch, **changes) == MANY_HEADS_CODES


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 63},
        {"page_size": 48},
        {"latent": 256},
        {"rope": 32},
        {"dtype": torch.float32},
        {"kind": torch.bfloat16},
        {"device": Device(100, 148, 232448)},
        {"device": Device(80, 108, 166912)},
        {"device": Device(90, 4, 232448, interpreted=True)},
        {"cache": lambda x: x.repeat(1, 2, 1)[:, ::2]},
        {"cache": lambda x: torch.zeros(x.numel() + 8, dtype=x.dtype)[8:].view(x.shape)},
        {"cache": lambda x: x[:0]},
    ],
    ids=str,
)
def test_what_other_kernels_take(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert not chosen(monkeypatch, **changes).many_heads_codes
