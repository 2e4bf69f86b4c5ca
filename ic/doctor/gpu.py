"""GPUs, their driver against PyTorch's CUDA, and NCCL, tried out where there are two GPUs."""

from __future__ import annotations

import datetime
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ic.display.numbers import gib
from ic.doctor.check import Finding

TIMEOUT_S = 60


def driver() -> Iterator[Finding]:
    """The NVIDIA driver, and whether it is new enough for PyTorch's CUDA."""
    if shutil.which("nvidia-smi") is None:
        yield Finding(
            "GPU driver",
            "warn",
            "no nvidia-smi: no GPU here, runs use the CPU",
            "on a GPU machine install NVIDIA's driver",
        )
        return
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        yield Finding(
            "GPU driver",
            "fail",
            said[0] if said else "nvidia-smi fails",
            "reinstall the driver, or reboot after an update of it",
        )
        return
    version = re.search(r"Driver Version: *([\d.]+)", done.stdout)
    newest = re.search(r"CUDA(?: UMD)? Version: *([\d.]+)", done.stdout)
    shown = f"driver {version[1] if version else 'of unknown version'}"
    yield cuda_match(shown, newest[1] if newest else None, torch.version.cuda)


def cuda_match(driver_text: str, newest: str | None, built_for: str | None) -> Finding:
    """The driver's newest CUDA against the one that PyTorch was built for."""
    if built_for is None:
        return Finding(
            "GPU driver",
            "fail",
            f"{driver_text}, but this PyTorch is for CPUs only",
            "install PyTorch's CUDA build",
        )
    found = f"{driver_text}, CUDA to {newest}, PyTorch built for {built_for}"
    if newest is None:
        return Finding("GPU driver", "warn", found, "compare the driver with PyTorch's CUDA")
    # Drivers run every minor version of a major one that they know.
    if int(newest.split(".")[0]) < int(built_for.split(".")[0]):
        return Finding(
            "GPU driver", "fail", found, f"update the driver, or install PyTorch for CUDA {newest}"
        )
    return Finding("GPU driver", "ok", found)


def gpus() -> Iterator[Finding]:
    """The GPUs that PyTorch sees, and whether they do bf16."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(
                "GPUs",
                "fail",
                "PyTorch sees none",
                "check CUDA_VISIBLE_DEVICES, the job's --gres, and the driver",
            )
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{p.name}, {gib(free, 0, unit='')} of {gib(total, 0)} free"
        if p.major < 8:
            yield Finding(f"GPU {index}", "warn", found, "no bf16: trainer.precision=16-mixed")
        elif free < 0.9 * total:
            yield Finding(f"GPU {index}", "warn", found, "another process uses it: nvidia-smi")
        else:
            yield Finding(f"GPU {index}", "ok", found)


def nccl() -> Iterator[Finding]:
    """NCCL's version, and an all-reduce over the GPUs of this machine."""
    count = torch.cuda.device_count()
    if not dist.is_nccl_available():
        status = "fail" if count > 1 else "warn"
        yield Finding("NCCL", status, "not in this PyTorch", "install PyTorch's CUDA build")  # type: ignore[arg-type]
        return
    if count < 2:
        yield Finding("NCCL", "ok", "not needed on one device")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield all_reduce(f"NCCL {version}", "nccl", count)


def all_reduce(what: str, backend: str, num_ranks: int) -> Finding:
    """Sum the ranks over a real process group, a process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        mp.spawn(_sum_ranks, (backend, num_ranks, port), nprocs=num_ranks)
    except Exception as error:
        last = str(error).strip().splitlines()[-1]
        return Finding(
            what,
            "fail",
            f"all-reduce over {num_ranks} processes: {last}",
            "run with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1, then check the "
            "topology with nvidia-smi topo -m",
        )
    return Finding(what, "ok", f"all-reduce over {num_ranks} processes")


def _sum_ranks(rank: int, backend: str, num_ranks: int, port: int) -> None:
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        f"tcp://127.0.0.1:{port}",
        world_size=num_ranks,
        rank=rank,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    value = torch.full((1024,), float(rank), device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(value)
    expected = num_ranks * (num_ranks - 1) / 2
    if not bool((value == expected).all()):
        raise RuntimeError(f"the sum is {value[0].item()}, not {expected}")
    dist.destroy_process_group()
