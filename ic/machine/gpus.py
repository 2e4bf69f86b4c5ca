"""GPU types that `plan` knows: memory, bandwidth and bf16 rate, from the makers' datasheets."""

from __future__ import annotations

from dataclasses import dataclass

from ic.machine.peak_flops import peak_bf16_flops


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        device_name: as `torch.cuda.get_device_name` gives it; the bf16 rate hangs on it.
        memory_bytes: the datasheet's gigabytes; a little less than the driver shows.
        bandwidth_bytes_per_s: of its memory.
        source: the datasheet.
    """

    device_name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    source: str

    @property
    def peak_bf16_flops(self) -> float:
        """Dense bf16 FLOP/s (`ic.machine.peak_flops`)."""
        peak = peak_bf16_flops(self.device_name)
        assert peak is not None, self.device_name
        return peak[0]


GPUS: dict[str, Gpu] = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, 3.35e12, "NVIDIA H100 datasheet, SXM"),
    "h200": Gpu("NVIDIA H200", 141 * 10**9, 4.8e12, "NVIDIA H200 datasheet, SXM"),
    "b200": Gpu("NVIDIA B200", 180 * 10**9, 8.0e12, "NVIDIA HGX B200 datasheet"),
    "a100_80gb": Gpu("NVIDIA A100-SXM4-80GB", 80 * 10**9, 2.039e12, "NVIDIA A100 datasheet, SXM"),
    "a100_40gb": Gpu("NVIDIA A100-SXM4-40GB", 40 * 10**9, 1.555e12, "NVIDIA A100 datasheet, SXM"),
    "l40s": Gpu("NVIDIA L40S", 48 * 10**9, 0.864e12, "NVIDIA L40S datasheet"),
    "a30": Gpu("NVIDIA A30", 24 * 10**9, 0.933e12, "NVIDIA A30 datasheet"),
}
