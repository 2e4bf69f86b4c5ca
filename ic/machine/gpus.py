"""The GPUs that are known: their names, memory, bandwidth and bf16 rate.

`plan` takes all of it, MFU the rate as its denominator. Datasheets print tensor-core numbers with
2:4 sparsity; these are the dense ones (half, where the sheet gives only the sparse one), with fp32
accumulation, at the boost clock the maker assumes. The same model in another form factor is another
number, so names are matched whole: a card that is not in the table has no peak, rather than a
neighbour's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One type of GPU.

    Attributes:
        device_name: as `torch.cuda.get_device_name` gives it.
        memory_bytes: the datasheet's gigabytes; a little less than the driver shows.
        bandwidth_bytes_per_s: of its memory.
        peak_bf16_flops: dense bf16 FLOP/s.
        source: the datasheet.
    """

    device_name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    peak_bf16_flops: float
    source: str


_H100, _H200 = "NVIDIA H100 datasheet, SXM", "NVIDIA H200 datasheet, SXM"
_A100, _A100_PCIE = "NVIDIA A100 datasheet, SXM", "NVIDIA A100 datasheet, PCIe"
# By the names that `plan.gpu` takes.
GPUS: dict[str, Gpu] = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, 3.35e12, 989.4e12, _H100),
    "h200": Gpu("NVIDIA H200", 141 * 10**9, 4.8e12, 989.4e12, _H200),
    "b200": Gpu("NVIDIA B200", 180 * 10**9, 8.0e12, 2250e12, "NVIDIA HGX B200 datasheet"),
    "a100_80gb": Gpu("NVIDIA A100-SXM4-80GB", 80 * 10**9, 2.039e12, 312e12, _A100),
    "a100_40gb": Gpu("NVIDIA A100-SXM4-40GB", 40 * 10**9, 1.555e12, 312e12, _A100),
    "a100_80gb_pcie": Gpu("NVIDIA A100 80GB PCIe", 80 * 10**9, 1.935e12, 312e12, _A100_PCIE),
    "a100_40gb_pcie": Gpu("NVIDIA A100-PCIE-40GB", 40 * 10**9, 1.555e12, 312e12, _A100_PCIE),
    "l40s": Gpu("NVIDIA L40S", 48 * 10**9, 0.864e12, 362.05e12, "NVIDIA L40S datasheet"),
    "a30": Gpu("NVIDIA A30", 24 * 10**9, 0.933e12, 165e12, "NVIDIA A30 datasheet"),
}


def find_gpu(device_name: str) -> Gpu | None:
    """The type of a device by PyTorch's name for it, or None for one that is not in the table.

    A slice of a GPU (`... MIG 1g.10gb`) is not in it: it has a share of the chip.
    """
    name = _without_maker(device_name)
    return next((gpu for gpu in GPUS.values() if _without_maker(gpu.device_name) == name), None)


def _without_maker(device_name: str) -> str:
    """Older drivers leave "NVIDIA " out."""
    return device_name.removeprefix("NVIDIA ").strip()
