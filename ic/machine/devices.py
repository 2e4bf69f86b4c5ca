"""Which accelerator, devices and backends this machine can give a run."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.errors import check_once
from ic.model.backends import Backends, gpu_capability, resolve_backends


def runnable_backends(requested: Backends, accelerator: str) -> Backends:
    """What this machine can run of it; a line on rank 0 says what is different.

    Raises:
        ValueError: Triton asked for without a GPU.
    """
    resolved, notice = resolve_backends(requested, gpu_capability(accelerator))
    if notice is not None:
        rank_zero_info(notice)
    return resolved


def device_name(device: torch.device) -> str:
    """The name by which the table of GPUs and the reports know a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def check_accelerator(accelerator: str) -> None:
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"accelerator={accelerator!r}: choose auto, cpu or gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"accelerator={accelerator}: PyTorch sees no CUDA GPU here; use accelerator=cpu or auto"
        )


def check_devices(accelerator: str, devices: Any) -> None:
    """Refuse what `lightning.Trainer` would, with what this machine has.

    Raises:
        ValueError: devices that are not there, or no number of them.
    """
    gpus = torch.cuda.device_count() if accelerator != "cpu" else 0
    if gpus:
        whole = devices in ("auto", -1) or (type(devices) is int and 1 <= devices <= gpus)
        listed = isinstance(devices, list) and bool(devices) and set(devices) <= set(range(gpus))
        if listed:
            check_once("trainer.devices", devices)
        if not whole and not listed:
            raise ValueError(
                f"trainer.devices={devices}: this host has {gpus} GPUs; choose auto, a number "
                f"from 1 to {gpus}, or indices such as [{gpus - 1}]"
            )
        return
    cores = os.cpu_count() or 1
    if "LOCAL_RANK" in os.environ and type(devices) is int and devices >= 1:
        return  # a launcher has started them already, as many as it was told
    if devices != "auto" and not (type(devices) is int and 1 <= devices <= cores):
        raise ValueError(
            f"trainer.devices={devices}: on the CPU choose auto or a number of processes from 1 to "
            f"{cores}, the cores of this host"
        )


def num_devices(accelerator: str, devices: Any) -> int:
    """How many of this host's devices `trainer.devices` names, once they are checked."""
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) if accelerator != "cpu" else 1
    return int(devices)
