"""A matrix times one vector, with the sum, the norm and SwiGLU around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ic.kernels.triton_matvec import matvec, matvec_op

ON_GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
# (inputs, outputs): within a tile, over a tile's edge, several pieces of columns.
SIZES = [(16, 8), (63, 14), (200, 30), (2050, 10)] + ([(5440, 2048)] if ON_GPU else [])


def randn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(got: Tensor, expected: Tensor) -> float:
    got = got.double()
    assert got.isfinite().all(), "an element is not finite, or was never written"
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", ["alone", "norm", "sum", "sum and swiglu"])
def test_equals_the_steps(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], case: str
) -> None:
    inputs, outputs = size
    x = randn(device, dtype, 1, 1, inputs, seed=1)
    weight = randn(device, dtype, outputs, inputs, seed=2)
    norm = None if case == "alone" else 1 + randn(device, dtype, inputs, seed=3) / 4
    residual = randn(device, dtype, 1, 1, inputs, seed=4) if "sum" in case else None
    given = {"norm_weight": norm, "residual": residual, "eps": 1e-3}
    y, total = matvec(x, weight, swiglu="swiglu" in case, **given)

    summed = x if residual is None else x + residual
    assert total.equal(summed)
    wide = summed.double()
    if norm is not None:
        wide = F.rms_norm(wide, (inputs,), norm.double(), 1e-3)
    expected = wide @ weight.double().T
    if "swiglu" in case:
        gate, up = expected.chunk(2, dim=-1)
        expected = F.silu(gate) * up
    assert y.shape == expected.shape
    assert error(y, expected) < TOLERANCE[dtype]


def test_operator(device: torch.device) -> None:
    x, residual = (randn(device, torch.float32, 1, 24, seed=seed) for seed in (1, 2))
    weight, norm = (randn(device, torch.float32, *shape, seed=3) for shape in ((6, 24), (24,)))
    for given in ((None, None, 0.0, False), (norm, residual, 1e-6, True)):
        torch.library.opcheck(matvec_op, (x, weight, *given))
        y, *sums = matvec_op(x, weight, *given)
        eager = matvec(
            x, weight, norm_weight=given[0], residual=given[1], eps=given[2], swiglu=given[3]
        )
        assert y.equal(eager[0])
        assert [total.equal(eager[1]) for total in sums] == [True] * (given[1] is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (2, 24)}, r"x: shape \(2, 24\) given; one contiguous vector"),
        ({"weight": (6, 23)}, "weight"),
        ({"weight": (7, 24), "swiglu": True}, "even number of rows"),
        ({"norm_weight": (23,)}, "norm_weight"),
        ({"residual": (1, 24)}, "residual: goes with a norm"),
    ],
)
def test_refuses(device: torch.device, changes: dict, message: str) -> None:
    shapes = {"x": (1, 24), "weight": (6, 24)} | changes
    options = {"swiglu": shapes.pop("swiglu", False)}
    tensors = {name: randn(device, torch.float32, *shape, seed=1) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        matvec(tensors.pop("x"), tensors.pop("weight"), **tensors, **options)
