"""Peak dense bf16 FLOP/s by GPU name: MFU's denominator.

Datasheets print tensor-core numbers with 2:4 sparsity; these are the dense ones (half, where the
sheet gives only the sparse one), with fp32 accumulation, at the boost clock the maker assumes. The
same model in another form factor is another number, so names are matched whole: a card that is not
in the table has no peak, rather than a neighbour's.
"""

from __future__ import annotations

import re

import torch

# (what torch.cuda.get_device_name says after "NVIDIA ", FLOP/s, source)
_PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"B200", 2250e12, "NVIDIA HGX B200 datasheet"),
    (r"H200", 989.4e12, "NVIDIA H200 datasheet, SXM"),
    (r"H100 80GB HBM3", 989.4e12, "NVIDIA H100 datasheet, SXM"),
    (r"A100[- ].*", 312e12, "NVIDIA A100 datasheet"),
    (r"A30", 165e12, "NVIDIA A30 datasheet"),
    (r"L40S", 362.05e12, "NVIDIA L40S datasheet"),
)


def device_name(device: torch.device) -> str:
    """The name by which this table and the reports know a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_bf16_flops(device_name: str) -> tuple[float, str] | None:
    """FLOP/s and their source, or None for a device that is not in the table.

    A slice of a GPU (`... MIG 1g.10gb`) is not in it: it has a share of the chip.
    """
    if "MIG" in device_name:
        return None
    name = device_name.removeprefix("NVIDIA ").strip()
    for pattern, flops, source in _PEAKS:
        if re.fullmatch(pattern, name):
            return flops, source
    return None
