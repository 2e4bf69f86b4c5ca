"""Decoupled RoPE, both layouts: outputs and gradients of q and k."""

import pytest
import torch

from ic.kernels.reference import rope_reference
from ic.kernels.triton_rope import apply_rope, rope_op

ON_GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
SHAPES = [(1, 1, 1, 16), (2, 63, 4, 16), (2, 111, 5, 32), (1, 37, 17, 64), (1, 1000, 1, 16)]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    out, reference = out.detach().double(), reference.detach().double()
    assert torch.isfinite(out).all(), "an element is not finite, or was never written"
    return float((out - reference).norm() / reference.norm())


def make_inputs(
    device: torch.device, dtype: torch.dtype, B: int, T: int, H: int, P: int, batched: bool
) -> list:
    generator = torch.Generator().manual_seed(B + T + H + P)
    q, k = (torch.randn(B, T, n, P, generator=generator).to(device, dtype) for n in (H, 1))
    angle = 3 * torch.randn(B if batched else 1, T, P // 2, generator=generator).to(device)
    return [q.requires_grad_(), k.requires_grad_(), angle.cos(), angle.sin()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_matches_reference(
    device: torch.device,
    dtype: torch.dtype,
    interleaved: bool,
    shape: tuple[int, ...],
    batched: bool,
) -> None:
    q, k, cos, sin = make_inputs(device, dtype, *shape, batched)
    rotated = apply_rope(q, k, cos, sin, interleaved)
    gradients = [torch.randn_like(x) for x in rotated]
    got = torch.autograd.grad(rotated, (q, k), gradients)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    expected = [rope_reference(x, cos, sin, interleaved=interleaved) for x in wide]
    want = torch.autograd.grad(expected, wide, [g.double() for g in gradients])
    for out, reference in zip((*rotated, *got), (*expected, *want), strict=True):
        assert out.dtype == dtype
        assert relative_error(out, reference) < TOLERANCE[dtype]


def test_interleaved_is_complex_multiplication(device: torch.device) -> None:
    """DeepSeek's original code: view_as_complex, multiply, view_as_real, same places."""
    q, k, cos, sin = make_inputs(device, torch.float32, 2, 9, 3, 16, False)
    rotated, _ = apply_rope(q, k, cos, sin, True)
    turn = torch.complex(cos, sin)[:, :, None, :]
    expected = torch.view_as_real(
        torch.view_as_complex(q.detach().unflatten(-1, (-1, 2))) * turn
    ).flatten(-2)
    assert relative_error(rotated, expected) < 1e-6


def test_strided_inputs(device: torch.device) -> None:
    """The RoPE columns of a wider projection, and cos, sin sliced from a longer table."""
    wide = torch.randn(2, 20, 3, 48, device=device)
    key = torch.randn(2, 20, 80, device=device)
    table = torch.randn(1, 64, 16, device=device)
    cos, sin = table.cos()[:, 7:27], table.sin()[:, 7:27]
    for interleaved in (True, False):
        q = wide[..., 16:].detach().requires_grad_()
        k = key[..., 48:].unsqueeze(2).detach().requires_grad_()
        rotated = apply_rope(q, k, cos, sin, interleaved)
        for out, x in zip(rotated, (q, k), strict=True):
            assert relative_error(out, rope_reference(x, cos, sin, interleaved=interleaved)) < 1e-6
        # The gradient of a sum has stride 0.
        dq, dk = torch.autograd.grad(rotated[0].sum() + rotated[1].sum(), (q, k))
        ones = torch.ones_like(q)
        assert relative_error(dq, rope_reference(ones, cos, -sin, interleaved=interleaved)) < 1e-6
        assert (
            relative_error(dk, rope_reference(ones[:, :, :1], cos, -sin, interleaved=interleaved))
            < 1e-6
        )


def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    try:
        storage = torch.zeros(2**31 + 64, dtype=torch.float16, device=device)
    except (RuntimeError, torch.cuda.OutOfMemoryError):
        pytest.skip("no address space for 4 GiB")
    q = storage.as_strided((2, 1, 2, 16), (2**31, 32, 16, 1))
    q.copy_(torch.randn(2, 1, 2, 16))
    k = torch.randn(2, 1, 1, 16, device=device).half()
    angle = torch.randn(1, 1, 8, device=device)
    rotated, _ = apply_rope(q, k, angle.cos(), angle.sin(), True)
    expected = rope_reference(q, angle.cos(), angle.sin(), interleaved=True)
    assert relative_error(rotated, expected) < TOLERANCE[torch.float16]


def test_opcheck(device: torch.device) -> None:
    inputs = make_inputs(device, torch.float32, 1, 5, 2, 16, False)
    torch.library.opcheck(rope_op, (*inputs, True, False))
    torch.library.opcheck(rope_op, (*inputs, False, False))


def test_no_tokens(device: torch.device) -> None:
    q, k, cos, sin = make_inputs(device, torch.float32, 1, 0, 2, 16, False)
    assert apply_rope(q, k, cos, sin, True)[0].shape == (1, 0, 2, 16)


def test_bad_input_names_the_argument(device: torch.device) -> None:
    q, k, cos, sin = (x.detach() for x in make_inputs(device, torch.float32, 2, 5, 2, 16, False))
    for name, arguments in (
        ("q", (q.double(), k, cos, sin)),
        ("q", (q[..., :12], k, cos, sin)),
        ("q", (q.transpose(2, 3), k, cos, sin)),
        ("q", (q[0], k, cos, sin)),
        ("k", (q, q, cos, sin)),
        ("k", (q, k.half(), cos, sin)),
        ("cos", (q, k, cos.transpose(1, 2).contiguous().transpose(1, 2), sin)),
        ("cos", (q, k, cos.half(), sin)),
        ("cos", (q, k, cos[:, :3], sin)),
        ("sin", (q, k, cos, sin[..., :4])),
        ("sin", (q, k, cos, sin.expand(3, -1, -1))),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            apply_rope(*arguments, True)
