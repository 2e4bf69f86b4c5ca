"""RMSNorm and its fusion with the residual addition: outputs and every gradient."""

import pytest
import torch

from ic.kernels.reference import rms_norm_reference
from ic.kernels.triton_rmsnorm import add_rms_norm, add_rms_norm_op, rms_norm, rms_norm_op

ON_GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
SHAPES = [(1, 1), (1, 63), (7, 111), (3, 5, 64), (1000, 16), (2, 2048)] + (
    [(9, 7168)] if ON_GPU else []
)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    out, reference = out.detach().double(), reference.detach().double()
    assert torch.isfinite(out).all(), "an element is not finite, or was never written"
    return float((out - reference).norm() / reference.norm())


def randn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = randn(device, dtype, *shape, seed=1).requires_grad_()
    weight = (1 + randn(device, dtype, shape[-1], seed=2) / 4).requires_grad_()
    y = rms_norm(x, weight, 1e-6)
    dy = randn(device, dtype, *shape, seed=3)
    gradients = torch.autograd.grad(y, (x, weight), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm_reference(*wide, 1e-6)[0]
    assert relative_error(y, expected) < TOLERANCE[dtype]
    for got, want in zip(gradients, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        if shape[-1] > 1:  # one column: y is sign(x) * weight, dx is rounding
            assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_add_rms_norm(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = (randn(device, dtype, *shape, seed=s).requires_grad_() for s in (1, 2))
    weight = (1 + randn(device, dtype, shape[-1], seed=3) / 4).requires_grad_()
    y, h = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(h, x + residual)
    dy, dh = (randn(device, dtype, *shape, seed=s) for s in (4, 5))
    gradients = torch.autograd.grad((y, h), (x, residual, weight), (dy, dh))
    # The sum is rounded to the dtype, in the reference too: differentiate from there.
    wide = [t.detach().double().requires_grad_() for t in (h, weight)]
    expected = rms_norm_reference(*wide, 1e-6)[0]
    total, dweight = torch.autograd.grad(expected, wide, dy.double())
    assert relative_error(y, expected) < TOLERANCE[dtype]
    for got, want in zip(
        gradients, (total + dh.double(), total + dh.double(), dweight), strict=True
    ):
        assert relative_error(got, want) < TOLERANCE[dtype]


def test_only_one_output_is_used(device: torch.device) -> None:
    x, residual = (randn(device, torch.float32, 3, 64, seed=s).requires_grad_() for s in (1, 2))
    weight = torch.ones(64, device=device, requires_grad=True)
    _, h = add_rms_norm(x, residual, weight, 1e-6)
    dx, dresidual = torch.autograd.grad(h.sum(), (x, residual))
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dresidual, torch.ones_like(x))
    y, _ = add_rms_norm(x, residual, weight, 1e-6)
    plain = (x + residual).detach().requires_grad_()
    want = torch.autograd.grad(rms_norm(plain, weight, 1e-6).square().sum(), plain)[0]
    assert relative_error(torch.autograd.grad(y.square().sum(), x)[0], want) < 1e-6


def test_strided_rows(device: torch.device) -> None:
    wide = randn(device, torch.float32, 4, 7, 96, seed=1)
    weight = torch.ones(64, device=device)
    for x in (wide[..., :64], wide.transpose(0, 1)[..., 32:], wide[:, ::2, 16:80]):
        y = rms_norm(x, weight, 1e-6)
        assert y.is_contiguous()
        assert relative_error(y, rms_norm_reference(x, weight, 1e-6)[0]) < 1e-6
    x = wide[..., :64].detach().requires_grad_()
    y = rms_norm(x, weight, 1e-6)
    broadcast = torch.ones(1, 1, 1, device=device).expand_as(y)  # stride 0, as from sum()
    dx = torch.autograd.grad(y, x, broadcast)[0]
    copy = x.detach().clone().requires_grad_()
    want = torch.autograd.grad(rms_norm_reference(copy, weight, 1e-6)[0].sum(), copy)[0]
    assert float((dx - want).abs().max()) < 1e-5


def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    try:
        storage = torch.zeros(2**31 + 64, dtype=torch.float16, device=device)
    except (RuntimeError, torch.cuda.OutOfMemoryError):
        pytest.skip("no address space for 4 GiB")
    x = storage.as_strided((2, 64), (2**31, 1))
    x.copy_(torch.randn(2, 64))
    weight = torch.ones(64, dtype=torch.float16, device=device)
    y = rms_norm(x, weight, 1e-6)
    assert relative_error(y, rms_norm_reference(x, weight, 1e-6)[0]) < TOLERANCE[torch.float16]


def test_no_rows(device: torch.device) -> None:
    x = torch.zeros(0, 32, device=device, requires_grad=True)
    weight = torch.ones(32, device=device, requires_grad=True)
    dx, dweight = torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), (x, weight))
    assert dx.shape == (0, 32)
    assert not dweight.any()


def test_opcheck(device: torch.device) -> None:
    x, residual = (randn(device, torch.float32, 3, 64, seed=s).requires_grad_() for s in (1, 2))
    weight = torch.ones(64, device=device, requires_grad=True)
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-6))
    torch.library.opcheck(add_rms_norm_op, (x, residual, weight, 1e-6))


def test_bad_input_names_the_argument(device: torch.device) -> None:
    x, weight = torch.zeros(4, 32, device=device), torch.ones(32, device=device)
    with pytest.raises(ValueError, match=r"^x: dtype"):
        rms_norm(x.double(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"^x: the last stride"):
        rms_norm(torch.zeros(32, 4, device=device).T, weight, 1e-6)
    with pytest.raises(ValueError, match=r"^x: shape"):
        rms_norm(torch.zeros(4, 0, device=device), weight[:0], 1e-6)
    with pytest.raises(ValueError, match=r"^weight: shape"):
        rms_norm(x, weight[:16], 1e-6)
    if ON_GPU:
        with pytest.raises(ValueError, match=r"^weight: on cpu"):
            rms_norm(x, weight.cpu(), 1e-6)
    with pytest.raises(ValueError, match=r"^residual: shape"):
        add_rms_norm(x, x[:2], weight, 1e-6)
    with pytest.raises(ValueError, match=r"^residual: dtype"):
        add_rms_norm(x, x.half(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"^eps"):
        rms_norm(x, weight, -1.0)
