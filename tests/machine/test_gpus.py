"""The datasheet table: who is in it under which name, and whose numbers nobody else gets."""

from __future__ import annotations

import pytest

from ic.machine.gpus import GPUS, find_gpu

PUBLISHED = {
    # name of the driver: (bf16 TFLOP/s dense, GB, TB/s)
    "NVIDIA H100 80GB HBM3": (989.4, 80, 3.35),
    "NVIDIA H200": (989.4, 141, 4.8),
    "NVIDIA B200": (2250, 180, 8.0),
    "NVIDIA A100-SXM4-80GB": (312, 80, 2.039),
    "A100-SXM4-40GB": (312, 40, 1.555),
    "NVIDIA A100 80GB PCIe": (312, 80, 1.935),
    "NVIDIA A100-PCIE-40GB": (312, 40, 1.555),
    "NVIDIA L40S": (362.05, 48, 0.864),
    "NVIDIA A30": (165, 24, 0.933),
}


@pytest.mark.parametrize(("name", "numbers"), PUBLISHED.items())
def test_numbers_by_name(name: str, numbers: tuple[float, float, float]) -> None:
    gpu = find_gpu(name)
    assert gpu is not None
    found = (gpu.peak_bf16_flops, gpu.memory_bytes, gpu.bandwidth_bytes_per_s)
    assert found == pytest.approx((numbers[0] * 1e12, numbers[1] * 1e9, numbers[2] * 1e12))
    assert gpu.source.startswith("NVIDIA")


def test_the_names_of_plan() -> None:
    assert [find_gpu(gpu.device_name) for gpu in GPUS.values()] == list(GPUS.values())
    assert GPUS["a100_80gb_pcie"].device_name == "NVIDIA A100 80GB PCIe"


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA A10G",
        "NVIDIA H20",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Tesla T4",
    ],
)
def test_no_neighbours_numbers_are_guessed(name: str) -> None:
    assert find_gpu(name) is None
