"""Products with four-bit weights, and rows turned into codes, against the fp32 reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32

from ic.kernels.reference import quantize_per_token
from ic.kernels.triton_quantised_linear import int4_matmul, quantize_rows

# Relative error of a sum of K products, by the dtype that weights are rounded to.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def dtypes(device: torch.device) -> list[torch.dtype]:
    """The interpreter gives garbage in bf16."""
    return [torch.float32, torch.float16, *([torch.bfloat16] if device.type == "cuda" else [])]


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [(1, 40, 256, 128), (16, 17, 320, 64), (5, 1, 96, 32), (3, 33, 1088, 64), (2, 16, 8, 8)],
)
def test_int4_matmul(
    device: torch.device, rows: int, outputs: int, inputs: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, inputs // group, generator=generator) + 0.1
    weight = codes.double() * scale.double().repeat_interleave(group, 1)
    packed = pack_to_int32(codes, 4).to(device)
    for dtype in dtypes(device):
        # A slice of wider rows, as a projection's output may be.
        x = torch.randn(rows, inputs + 24, generator=generator).to(device, dtype)[:, :inputs]
        got = int4_matmul(x, packed, scale.to(device), group)
        assert got.dtype == dtype
        expected = x.cpu().double() @ weight.T
        error = (got.cpu().double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], dtype


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 1000), (3, 4097)])
def test_quantize_rows(device: torch.device, codes: torch.dtype, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes(device):
        x = torch.randn(rows, width + 8, generator=generator).to(device, dtype)[:, :width]
        x[0] = 0
        got, scale = quantize_rows(x, codes)
        expected, expected_scale = quantize_per_token(x, codes)
        torch.testing.assert_close(scale, expected_scale)
        assert got.float().equal(expected.float())


def test_refuses_what_it_does_not_take() -> None:
    x, packed, scale = torch.ones(17, 64), torch.zeros(8, 8, dtype=torch.int32), torch.ones(8, 2)
    with pytest.raises(ValueError, match="x has 17 rows; at most 16"):
        int4_matmul(x, packed, scale, 32)
    with pytest.raises(ValueError, match="group_size=48: must be a multiple of 8 and divide"):
        int4_matmul(x[:1], packed, scale, 48)
    with pytest.raises(ValueError, match=r"scale is \(8, 2\); want a contiguous \(8, 1\)"):
        int4_matmul(x[:1], packed, scale, 64)
    with pytest.raises(ValueError, match="codes in torch.int16"):
        quantize_rows(x, torch.int16)
