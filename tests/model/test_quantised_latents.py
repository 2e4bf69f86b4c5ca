"""Rows of a quantised cache: the rounding, its bound, and the kernel's."""

from __future__ import annotations

import numpy
import pytest
import torch

from ic.kernels.triton_append_latent import append_latent
from ic.model.quantised_latents import code_dtype, dequantise, error_bound, quantise

NAMES = ("fp8", "int8")


def rows(count: int = 200) -> torch.Tensor:
    """Numbers over ten powers of ten, rows of zeros, of one size and with one large number."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(count, 48, generator=generator)
    drawn *= 10.0 ** torch.empty(count, 1).uniform_(-5, 5, generator=generator)
    drawn[0] = 0
    drawn[1] = 7.5
    drawn[2, 5] = 1e4
    return drawn


@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_further_off_than_half_a_step(name: str) -> None:
    dtype = code_dtype(name)
    assert dtype is not None
    given = rows()
    codes, scale = quantise(given, dtype)
    assert codes.dtype == dtype
    assert codes.element_size() == 1
    assert scale.shape == (200,)
    assert scale.dtype == torch.float32
    error = (dequantise(codes, scale, torch.float32).double() - given.double()).abs()
    bound = error_bound(given, scale, dtype)
    assert (error <= bound).all()
    # The bound is one that numbers come near to, and a wrong scale breaks it.
    assert (error / bound.clamp_min(1e-30)).max() > 0.9
    wrong = (dequantise(codes, scale * 1.2, torch.float32) - given).abs()
    assert (wrong > bound).float().mean() > 0.5
    # A row is scaled by its largest number, which comes back.
    largest = given.abs().amax(-1)
    torch.testing.assert_close(dequantise(codes, scale, torch.float32).abs().amax(-1), largest)
    assert codes[0].float().abs().max() == 0


def test_int8_against_numpy_in_float64() -> None:
    given = rows()
    codes, scale = quantise(given, torch.int8)
    exact = given.numpy().astype(numpy.float64)
    step = numpy.maximum(numpy.abs(exact).max(-1, keepdims=True), 1e-12) / 127
    expected = numpy.rint(exact / step)
    differs = codes.numpy() != expected
    # Only where float32 cannot tell on which side of a half a quotient lies.
    assert (
        numpy.abs(numpy.abs(exact / step - numpy.trunc(exact / step)) - 0.5)[differs].max(initial=0)
        < 1e-4
    )
    assert differs.mean() < 1e-3
    numpy.testing.assert_allclose(scale.numpy(), step[:, 0], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_writes_the_same(name: str) -> None:
    """Without norm and rotation to do: a weight that undoes the norm, and angles of nought."""
    dtype = code_dtype(name)
    assert dtype is not None
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(5, 32, generator=generator)
    rope = torch.randn(5, 16, generator=generator)
    pages = torch.zeros(1, 16, 48, dtype=dtype)
    scales = torch.zeros(1, 16)
    cos, sin = torch.ones(5, 8), torch.zeros(5, 8)
    append_latent(
        latent, rope, torch.ones(32), cos, sin, pages, torch.arange(5), eps=0.0, cache_scale=scales
    )
    normed = torch.nn.functional.rms_norm(latent, (32,), eps=0.0)
    codes, scale = quantise(torch.cat((normed, rope), -1), dtype)
    torch.testing.assert_close(scales[0, :5], scale)
    step = (pages[0, :5].float() - codes.float()).abs() * scale[:, None]
    assert (step > 0).float().mean() < 0.02  # the norms differ in the last bit
    assert not scales[0, 5:].any()


def test_an_unknown_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_dtype='int4': did you mean int8.* auto, fp8, int8"):
        code_dtype("int4")
    assert code_dtype("auto") is None
