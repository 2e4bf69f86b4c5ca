"""Which `trainer.devices` a host takes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ic.machine.devices import check_devices, num_devices


@pytest.mark.parametrize("devices", ["auto", -1, 1, 2, [0], [0, 1]])
def test_a_host_of_two_gpus_takes(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices("auto", devices)
    assert num_devices("auto", devices) == (1 if devices in (1, [0]) else 2)
    assert num_devices("cpu", "auto") == 1


@pytest.mark.parametrize("devices", [0, -2, 3, [], [2], [-1], "two", [0.5], True])
def test_a_host_of_two_gpus_refuses(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="this host has 2 GPUs; choose auto, a number from 1 to 2"):
        check_devices("gpu", devices)
    with pytest.raises(ValueError, match="on the CPU"):
        check_devices("cpu", -1)
    with pytest.raises(ValueError, match=r"trainer.devices=\[1, 1\]: give each one once"):
        check_devices("gpu", [1, 1])


def test_a_launcher_may_start_more_processes_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ValueError, match="on the CPU choose auto or a number .* from 1 to 2"):
        check_devices("auto", 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    check_devices("auto", 4)
