"""Rounding by GPTQ: on the grid, and nearer to the layer's output than rounding to nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ic.inference.loading import load_source
from ic.inference.options import InferenceOptions
from ic.model.quantised_linear import QuantisedLinear, WeightScheme, quantised_linear
from ic.quantization.gptq import compensated, input_moments
from ic.quantization.schemes import compress

SCHEME = WeightScheme("int4", 32)


def dequantised(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    layer = quantised_linear(weight.shape[1], weight.shape[0], False, SCHEME)
    layer.load_state_dict(compress(weight, SCHEME, moment), assign=True)
    return layer.dequantised()


def test_inputs_that_are_independent_are_rounded_to_nearest() -> None:
    weight = torch.randn(20, 160, generator=torch.Generator().manual_seed(0))
    assert dequantised(weight, torch.eye(160) * 3).equal(dequantised(weight, None))


def test_inputs_that_go_together_make_up_for_errors() -> None:
    """Over a block's edge too; two inputs that are one give the best sum that the grid has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 160, generator=generator)
    x = torch.randn(500, 40, generator=generator) @ torch.randn(40, 160, generator=generator)
    moment = x.T @ x / len(x)
    nearest, found = dequantised(weight, None), dequantised(weight, moment)
    errors = [float(((q - weight) @ x.T).norm() / (weight @ x.T).norm()) for q in (nearest, found)]
    assert errors[1] < 0.6 * errors[0]
    # Still codes times the scales of the nearest rounding.
    scale = compress(weight, SCHEME)["weight_scale"].repeat_interleave(32, 1)
    codes = found / scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.round().min() >= -8
    assert codes.round().max() <= 7
    # Two inputs that always are equal: the second takes back all that the first was rounded by.
    pair = torch.tensor([[0.31, 0.31], [0.49, -0.2]])
    steps = torch.full((2, 1), 0.25)
    got = compensated(pair, torch.ones(2, 2), steps, 32)
    best = torch.tensor([0.5, 0.25])  # the sums 0.62 and 0.29 on a grid of 0.25
    torch.testing.assert_close(got.sum(1), best)


def test_the_verb_rounds_for_a_text(
    ic: Callable[..., int], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint()
    Path("text.txt").write_text("The sea was calm, and the old keeper lit his lamp. " * 200)
    asked = ["calibration=[text.txt]", "calibration_rows=4", "calibration_tokens=200"]
    base = ["quantize", f"source={source}", "scheme=int4", "parity=null", "accelerator=cpu"]
    assert ic(*base, "output=nearest") == 0
    assert ic(*base, "output=gptq", "rounding=gptq", *asked) == 0
    assert "calibration: 4 rows" in capsys.readouterr().out
    record = json.loads(Path("gptq/quantization.json").read_text())
    assert record["calibration"] == {"rows": 4, "tokens": 200}
    assert (
        "rounded by GPTQ on 4 rows of 200 tokens of text.txt" in Path("gptq/README.md").read_text()
    )

    models = {
        name: load_source(InferenceOptions(str(folder), accelerator="cpu")).model
        for name, folder in (("plain", source), ("nearest", "nearest"), ("gptq", "gptq"))
    }
    layers = [n for n, x in models["gptq"].named_modules() if isinstance(x, QuantisedLinear)]
    text = "The sea was calm, and the old keeper lit his lamp. " * 4
    ids = torch.tensor([list(text.encode())])
    moments = input_moments(models["plain"], ids, layers)

    def error(name: str, layer: str) -> float:
        change = models[name].get_submodule(layer).dequantised()
        change = change - models["plain"].get_submodule(layer).weight.detach()
        return float((change @ moments[layer] * change).sum())

    for layer in layers:
        assert error("gptq", layer) < 0.9 * error("nearest", layer), layer


def test_refusals(
    ic: Callable[..., int], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint()
    Path("short.txt").write_text("short")
    given = ["calibration=[short.txt]", "rounding=gptq"]
    for overrides, message in (
        (["scheme=int4", "rounding=gptq"], "calibration=[]: rounding=gptq measures"),
        (["scheme=int4", "calibration=[a.txt]"], "rounding=nearest and cache=auto read none; set"),
        (["scheme=int8", *given], "rounding=gptq: goes with scheme=int4"),
        (["scheme=int4", "calibration=[no.txt]", "rounding=gptq"], "calibration"),
        (["scheme=int4", *given], "calibration: the files hold 5 tokens"),
        (["scheme=int4", *given, "calibration_tokens=5000"], "the model has 4,096 positions"),
    ):
        capsys.readouterr()
        assert ic("quantize", f"source={source}", "output=out", "parity=null", *overrides) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1], overrides
        assert not Path("out").exists()
