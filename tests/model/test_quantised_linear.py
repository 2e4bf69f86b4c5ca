"""Quantised linear layers against compressed-tensors' own weights and roundings."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from ic.model.quantised_linear import (
    QuantisedLinear,
    WeightScheme,
    quantised_linear,
    replace_linear_layers,
    unpack_int4,
)
from ic.quantization.schemes import compress, compressor, library_scheme

SCHEMES = {
    "fp8": WeightScheme("fp8"),
    "int8": WeightScheme("int8"),
    "int4": WeightScheme("int4", 32),
    "int4 by 64": WeightScheme("int4", 64),
}


def weight(outputs: int = 48, inputs: int = 128) -> Tensor:
    """Rows of very different sizes, one of them of zeros."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(outputs, inputs, generator=generator)
    drawn *= 10.0 ** torch.empty(outputs, 1).uniform_(-4, 4, generator=generator)
    drawn[3] = 0
    return drawn


def layer_of(given: Tensor, scheme: WeightScheme, bias: bool = False) -> QuantisedLinear:
    layer = quantised_linear(given.shape[1], given.shape[0], bias, scheme)
    layer.load_state_dict(compress(given, scheme), strict=not bias, assign=True)
    return layer


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_that_the_library_reads(name: str) -> None:
    """Bit for bit; and no number is further off than half a step of its scale, which is also what
    clipping takes: int8 and int4 have one code less above zero.
    """
    scheme, given = SCHEMES[name], weight()
    saved = compress(given, scheme)
    expected = compressor(scheme).decompress(dict(saved), library_scheme(scheme))["weight"]
    got = layer_of(given, scheme).dequantised()
    assert got.equal(expected.float())
    scale = saved["weight_scale"].double()
    scale = scale.repeat_interleave(given.shape[1] // scale.shape[1], 1)
    step = scale
    if name == "fp8":
        # Three bits behind the leading one, and steps of 2^-9 below 2^-6.
        step = (given.double().abs() / 8).maximum(scale * 2**-9)
    # Half a step, and what a division and a product in float32 add.
    bound = step / 2 + 4 * torch.finfo(torch.float32).eps * given.double().abs()
    error = (got.double() - given.double()).abs()
    assert (error <= bound).all()
    assert error.max(1).values[[0, 1, 2, 4]].gt(step.max(1).values[[0, 1, 2, 4]] / 8).all()
    assert not got[3].any()
    # A wrong scale breaks the bound.
    broken = saved | {"weight_scale": saved["weight_scale"] * 1.3}
    wrong = layer_of(given, scheme)
    wrong.load_state_dict(broken, assign=True)
    error = (wrong.dequantised().double() - given.double()).abs()
    assert (error > bound).float().mean() > 0.3


@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_of_rounded_inputs_and_weights(name: str) -> None:
    scheme, given = SCHEMES[name], weight()
    layer = layer_of(given, scheme)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    rounded, inputs = x, library_scheme(scheme).input_activations
    if name == "fp8":
        scale, zero = compute_dynamic_scales_and_zp(x, inputs, nn.Module())
        rounded = fake_quantize(x, scale, zero, inputs)
    elif name == "int8":
        # The library divides inputs by 127.5 where servers' kernels and we divide by 127.
        step = x.double().abs().amax(-1, keepdim=True) / 127
        rounded = (x.double() / step).round() * step
    expected = rounded.double() @ layer.dequantised().double().T
    got = layer(x)
    assert got.shape == (2, 7, 48)
    assert (got - expected).norm() / expected.norm() < 1e-5
    exact = x.double() @ given.double().T
    assert 1e-3 < (got - exact).norm() / exact.norm() < 0.15


def test_four_bits_go_round() -> None:
    """Every code, in every place of a word."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(9)[:128].view(2, 64)
    codes = torch.stack([codes.roll(shift, 1) for shift in range(8)]).flatten(0, 1)
    packed = pack_to_int32(codes, 4)
    assert packed.shape == (16, 8)
    assert unpack_int4(packed).equal(codes)
    assert unpack_from_int32(packed, 4, codes.shape).equal(codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_another_dtype_changes_the_bias_alone(name: str) -> None:
    layer = layer_of(weight(), SCHEMES[name], bias=True)
    nn.init.normal_(layer.bias)
    before = copy.deepcopy(layer.state_dict())
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for key, tensor in layer.state_dict().items():
        if key != "bias":
            assert tensor.dtype == before[key].dtype
            assert tensor.view(torch.uint8).equal(before[key].view(torch.uint8))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = layer.to(torch.float32)(x)
    got = layer.to(torch.bfloat16)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() / expected.norm() < 2e-2


def test_layers_take_the_place_of_those_with_a_scheme() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8, bias=False)})
    model["c"] = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
    names = {"b": SCHEMES["fp8"], "c.0": SCHEMES["int4"]}
    replace_linear_layers(model, names.get)
    assert type(model["a"]) is nn.Linear
    assert model["b"].bias is None
    assert model["c"][0].bias.shape == (8,)
    assert model["c"][0].group_size == 32
