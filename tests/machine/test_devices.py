"""Which `trainer.devices` a host takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ic.machine.devices import check_devices


@pytest.mark.parametrize("devices", ["auto", -1, 1, 2, [0], [0, 1]])
def test_a_host_of_two_gpus_takes(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices("auto", devices)


@pytest.mark.parametrize("devices", [0, -2, 3, [], [2], [-1], "two", [0.5], True])
def test_a_host_of_two_gpus_refuses(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="this host has 2 GPUs; choose auto, a number from 1 to 2"):
        check_devices("gpu", devices)
    with pytest.raises(ValueError, match="on the CPU"):
        check_devices("cpu", -1)
    with pytest.raises(ValueError, match=r"trainer.devices=\[1, 1\]: give each one once"):
        check_devices("gpu", [1, 1])
