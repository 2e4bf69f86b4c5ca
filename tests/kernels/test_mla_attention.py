"""Causal attention against the reference: output, log-sum-exp and every gradient."""

import pytest
import torch

from ic.kernels.reference import attention_reference, document_bounds
from ic.kernels.triton_mla_attention import attend_piece, mla_attention, mla_attention_op

ON_GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 5e-3}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
# On a GPU also what the Hopper kernels take; on the CPU the widths of the tiny model.
WIDTHS = [(48, 32), (32, 16)] + ([(192, 128), (128, 64), (96, 64)] if ON_GPU else [])


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    out, reference = out.detach().double(), reference.detach().double()
    assert torch.isfinite(out).all(), "an element is not finite, or was never written"
    scale = reference.norm()
    return float((out - reference).norm() / scale) if scale > 0 else float(out.abs().max())


def make_inputs(
    device: torch.device, dtype: torch.dtype, B: int, T: int, S: int, H: int, D: int, V: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B * 1000 + T + S + D)
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((B, T, H, D), (B, S, H, D), (B, S, H, V))
    )
    return q, k, v


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ids: torch.Tensor | None = None
) -> None:
    scale = q.shape[-1] ** -0.5
    tolerance = TOLERANCE[q.dtype]
    out, lse = mla_attention_op(q, k, v, scale, document_ids)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out_ref, lse_ref = attention_reference(*wide, scale=scale, document_ids=document_ids)
    gradients_ref = torch.autograd.grad(out_ref, wide, dout.double(), retain_graph=True)
    assert relative_error(out, out_ref) < tolerance
    torch.testing.assert_close(
        lse.double(), lse_ref, rtol=0, atol=2e-5 if q.dtype == torch.float32 else 2e-3
    )
    size = float(dout.double().norm())
    # The backward pass reads `out` as it was rounded: sum_v dout (out - out_ref) is taken off the
    # gradient of every score of a row, times its probability, which is the log-sum-exp's gradient.
    # A single row cannot average that out.
    slip = ((out.detach().double() - out_ref) * dout.double()).sum(-1).detach()
    rounding = torch.autograd.grad((slip.transpose(1, 2) * lse_ref).sum(), wide, allow_unused=True)
    gradients_ref = [
        want if slipped is None else want - slipped
        for want, slipped in zip(gradients_ref, rounding, strict=True)
    ]
    for name, got, want in zip("qkv", gradients, gradients_ref, strict=True):
        assert torch.isfinite(got).all(), f"d{name} is not finite, or was never written"
        wanted = float(
            want.norm()
        )  # with one visible key dq and dk are zero: then compare with dout
        error = float((got.double() - want).norm())
        error /= wanted if wanted > 1e-3 * size else size
        assert error < tolerance, f"d{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "V"), WIDTHS)
@pytest.mark.parametrize("T", [1, 63, 111])
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, D: int, V: int, T: int
) -> None:
    check(*make_inputs(device, dtype, 2, T, T, 2, D, V))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_and_odd(device: torch.device, dtype: torch.dtype) -> None:
    check(*make_inputs(device, dtype, 1, 1000, 1000, 1, 32, 16))


@pytest.mark.parametrize(("T", "S"), [(1, 77), (40, 111), (63, 64), (5, 130), (100, 427)])
@pytest.mark.parametrize("documents", [False, True])
def test_chunked_prefill(device: torch.device, T: int, S: int, documents: bool) -> None:
    for D, V in WIDTHS[-2:]:
        dtype = torch.float16 if ON_GPU else torch.float32
        q, k, v = make_inputs(device, dtype, 2, T, S, 1, D, V)
        ids = (
            (torch.arange(S, device=device) // 23).int().expand(2, S).contiguous()
            if documents
            else None
        )
        check(q, k, v, ids)


@pytest.mark.parametrize("lengths", [[111], [1, 1, 1, 108], [40, 1, 33, 37], [64, 47], [1] * 111])
def test_documents(device: torch.device, lengths: list[int]) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    other = torch.zeros_like(ids)
    other[50:] = 3
    for D, V in WIDTHS[-2:]:
        dtype = torch.float16 if ON_GPU else torch.float32
        check(
            *make_inputs(device, dtype, 2, 111, 111, 1, D, V), torch.stack([ids, other]).to(device)
        )


def test_an_id_that_comes_back_is_a_new_document(device: torch.device) -> None:
    start, end = document_bounds(torch.tensor([[4, 4, 1, 4, 4, 4]], dtype=torch.int32))
    assert start.tolist() == [[0, 0, 2, 3, 3, 3]]
    assert end.tolist() == [[2, 2, 3, 6, 6, 6]]
    q, k, v = make_inputs(device, torch.float32, 1, 6, 6, 1, 32, 16)
    check(q, k, v, torch.tensor([[4, 4, 1, 4, 4, 4]], dtype=torch.int32, device=device))


def test_documents_do_not_leak(device: torch.device) -> None:
    """NaN in one document changes nothing in the other."""
    q, k, v = make_inputs(device, torch.float32, 1, 70, 70, 1, 32, 16)
    ids = (torch.arange(70, device=device) >= 64).int()[None]
    clean = mla_attention(q, k, v, scale=0.2, document_ids=ids)
    poisoned = [x.detach().clone() for x in (q, k, v)]
    poisoned[1][:, :32] = float("nan")
    out = mla_attention(*poisoned, scale=0.2, document_ids=ids)
    assert torch.equal(out[:, 64:], clean[:, 64:])


def test_strided_inputs(device: torch.device) -> None:
    """(B, H, T, D) memory, slices of a wider tensor, and a row stride that TMA cannot take."""
    for dtype in DTYPES[1:] if ON_GPU else DTYPES[:1]:
        for D, V in WIDTHS[-2:]:
            base_q = torch.randn(2, 2, 50, D, device=device).to(dtype)
            base_kv = torch.randn(2, 50, 2, D + V, device=device).to(dtype)
            q = base_q.transpose(1, 2).detach().requires_grad_()
            k = base_kv[..., :D].detach().requires_grad_()
            v = base_kv[..., D:].detach().requires_grad_()
            assert not q.is_contiguous()
            check(q, k, v)
            odd = (
                torch.randn(2, 50, 2, D + 1, device=device)
                .to(dtype)[..., 1:]
                .detach()
                .requires_grad_()
            )
            check(odd, k, v)
            shared = torch.randn(2, 50, 1, D, device=device).to(dtype).expand(-1, -1, 2, -1)
            check(q, shared.detach().requires_grad_(), v)


def test_gradients_are_reproducible(device: torch.device) -> None:
    q, k, v = make_inputs(device, torch.float16, 1, 111, 111, 2, *WIDTHS[-1])
    out = mla_attention(q, k, v, scale=0.1)
    first = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    """The second batch row lies 2**31 elements behind the first."""
    D, V, T = 32, 16, 5
    try:  # untouched pages of the gap are never resident
        storage = torch.zeros(2**31 + 4096, dtype=torch.float16, device=device)
    except (RuntimeError, torch.cuda.OutOfMemoryError):
        pytest.skip("no address space for 4 GiB")
    q = storage.as_strided((2, T, 1, D), (2**31, D, D, 1))
    q.copy_(torch.randn(2, T, 1, D))
    _, k, v = make_inputs(device, torch.float16, 2, T, T, 1, D, V)
    out = mla_attention(q, k, v, scale=0.2)
    expected, _ = attention_reference(q, k, v, scale=0.2)
    assert relative_error(out, expected) < TOLERANCE[torch.float16]


def test_empty(device: torch.device) -> None:
    q, k, v = make_inputs(device, torch.float32, 1, 0, 8, 1, 32, 16)
    out = mla_attention(q, k, v, scale=1.0)
    assert out.shape == (1, 0, 1, 16)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(not g.any() for g in gradients)


def test_opcheck(device: torch.device) -> None:
    q, k, v = make_inputs(device, torch.float32, 1, 20, 33, 1, 32, 16)
    torch.library.opcheck(mla_attention_op, (q, k, v, 0.2, None))
    ids = (torch.arange(33, device=device) // 9).int()[None]
    torch.library.opcheck(mla_attention_op, (q, k, v, 0.2, ids))


def test_log_sum_exp_has_no_gradient(device: torch.device) -> None:
    q, k, v = make_inputs(device, torch.float32, 1, 4, 4, 1, 32, 16)
    out, lse = mla_attention_op(q, k, v, 0.2, None)
    assert out.requires_grad
    assert not lse.requires_grad


def bad_calls(device: torch.device) -> list[tuple[str, tuple, dict]]:
    def z(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    good = (z(1, 4, 2, 32), z(1, 8, 2, 32), z(1, 8, 2, 16))
    ids = z(1, 8, dtype=torch.int32)
    return [
        ("q_BTHD", (z(1, 4, 2, 32, dtype=torch.float64), *good[1:]), {}),
        ("q_BTHD", (z(4, 2, 32), *good[1:]), {}),
        ("q_BTHD", (z(1, 9, 2, 32), *good[1:]), {}),
        ("q_BTHD", (z(1, 4, 2, 40), z(1, 8, 2, 40), good[2]), {}),
        ("q_BTHD", (z(1, 4, 32, 2).transpose(2, 3), *good[1:]), {}),
        ("k_BSHD", (good[0], z(1, 8, 1, 32), good[2]), {}),
        ("k_BSHD", (good[0], z(1, 8, 2, 32, dtype=torch.float16), good[2]), {}),
        ("v_BSHV", (*good[:2], z(1, 7, 2, 16)), {}),
        ("v_BSHV", (*good[:2], z(1, 8, 2, 24)), {}),
        ("v_BSHV", (*good[:2], z(1, 8, 2, 8)), {}),
        ("scale", good, {"scale": 0.0}),
        ("scale", good, {"scale": float("nan")}),
        ("document_ids", good, {"document_ids": ids.long()}),
        ("document_ids", good, {"document_ids": ids[:, :4]}),
    ]


@pytest.mark.parametrize("index", range(14))
def test_bad_input_names_the_argument(device: torch.device, index: int) -> None:
    name, tensors, options = bad_calls(device)[index]
    with pytest.raises(ValueError, match=name):
        mla_attention(*tensors, **{"scale": 0.2, **options})


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "pieces"), [(1, (65,)), (70, (33, 1, 128)), (129, (64, 90))])
def test_pieces_of_the_keys_merge_to_the_whole(
    device: torch.device, dtype: torch.dtype, T: int, pieces: tuple[int, ...]
) -> None:
    D, V = WIDTHS[0] if not ON_GPU else (192, 128)
    q, k, v = make_inputs(device, dtype, 1, T, sum(pieces) + T, 2, D, V)
    scale = D**-0.5
    parts, first = [], 0
    for length in (*pieces, T):
        last = first + length
        causal = last == k.shape[1]
        parts.append(
            attend_piece(q, k[:, first:last], v[:, first:last], scale=scale, causal=causal)
        )
        first = last
    lse = torch.stack([lse for _, lse in parts]).double()
    weight = (lse - lse.logsumexp(0)).exp().transpose(-1, -2)[..., None]  # (pieces, B, T, H, 1)
    out = (torch.stack([out for out, _ in parts]).double() * weight).sum(0)
    want, lse_want = attention_reference(q.double(), k.double(), v.double(), scale=scale)
    assert relative_error(out, want) < TOLERANCE[dtype]
    torch.testing.assert_close(lse.logsumexp(0), lse_want, rtol=0, atol=2e-3)


def test_a_piece_without_keys_is_refused(device: torch.device) -> None:
    q, k, v = make_inputs(device, torch.float32, 1, 2, 3, 1, 32, 16)
    with pytest.raises(ValueError, match="no key"):
        attend_piece(q, k[:, :0], v[:, :0], scale=1.0, causal=False)
