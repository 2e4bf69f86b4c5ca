"""The verb `quantize`: the folder that it makes, read by compressed-tensors and by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from ic.checkpoint.folder import load_config
from ic.inference.loading import load_source
from ic.inference.options import InferenceOptions
from ic.model import MLAForCausalLM
from ic.model.quantised_linear import QuantisedLinear

SCHEMES = ("fp8", "int8", "int4")
IDS = torch.arange(3, 43)[None]


def load(folder: Path, **options: str) -> MLAForCausalLM:
    return load_source(InferenceOptions(str(folder), accelerator="cpu", **options)).model


def quantize(ic: Callable[..., int], source: Path, scheme: str, *more: str) -> int:
    return ic(
        "quantize",
        f"source={source}",
        f"output=out/{scheme}",
        f"scheme={scheme}",
        "parity=null",
        *more,
    )


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_folder_read_by_the_library(
    ic: Callable[..., int], checkpoint: Callable[..., Path], scheme: str
) -> None:
    """Its configuration names the layers, its compressor widens them to what our layers compute."""
    source = checkpoint(q_lora_rank=None, query_bias=True, attention_bias=True)
    assert quantize(ic, source, scheme) == 0
    folder = Path("out") / scheme
    plain, model = load(source), load(folder)
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    (group,) = config.config_groups.values()
    reader = BaseCompressor.get_value_from_registry(config.format)
    saved = load_file(folder / "model.safetensors")
    layers = {name: x for name, x in model.named_modules() if isinstance(x, QuantisedLinear)}
    assert len(layers) == 2 * 6
    for name, layer in plain.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        named = is_match(name, layer, group.targets, config.ignore)
        assert named == (name in layers), name
        if not named:
            assert saved[f"{name}.weight"].equal(layer.weight)
            continue
        parts = {k.rpartition(".")[2]: v for k, v in saved.items() if k.startswith(f"{name}.")}
        bias = parts.pop("bias", None)
        widened = reader.decompress(parts, group)["weight"].float()
        assert layers[name].dequantised().equal(widened)
        assert (bias is None) == (layer.bias is None)
        # The model with the widened weights, put where the original's were.
        layer.weight.copy_(widened)
    difference = (model(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
    # int4 takes its inputs as they are; the others round each by a thousandth, or a hundredth.
    assert difference < {"fp8": 0.1, "int8": 0.03, "int4": 1e-6}[scheme]
    original = load(source)(IDS).logits
    assert 1e-3 < (model(IDS).logits - original).norm() / original.norm() < 0.4


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_folder_read_by_transformers(
    ic: Callable[..., int], checkpoint: Callable[..., Path], scheme: str
) -> None:
    """Without extensions it is DeepSeek-V3's, which transformers loads by itself."""
    assert quantize(ic, checkpoint(), scheme) == 0
    folder = Path("out") / scheme
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3"
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    ours = load(folder)
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantisedLinear):
            torch.testing.assert_close(
                theirs.get_submodule(name).weight, layer.dequantised(), atol=1e-6, rtol=1e-6
            )
    expected = theirs(IDS).logits
    error = (ours(IDS).logits - expected).norm() / expected.norm()
    assert error < {"fp8": 0.1, "int8": 0.03, "int4": 1e-4}[scheme]


def test_what_is_written(
    ic: Callable[..., int], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes, cache, record and card; in files of a limited size."""
    source = checkpoint()
    assert quantize(ic, source, "int8", "cache=fp8", "licence=mit", "max_shard_size=50KB") == 0
    folder = Path("out/int8")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load(folder)
    assert model.config.cache_dtype == "fp8"
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    assert cache.layers[0].latents().dtype == torch.float8_e4m3fn
    record = json.loads((folder / "quantization.json").read_text())
    tensors = [*model.parameters(), *model.buffers()]
    assert record["bytes_after"] == sum(tensor.nbytes for tensor in tensors)
    assert record["bytes_before"] == sum(p.nbytes for p in load(source).parameters())
    assert f"{record['bytes_before'] / 1e6:,.1f} MB of weights became" in capsys.readouterr().out
    assert len(record["rows"]) == 14
    assert all(0 < row["relative_error"] < 0.01 for row in record["rows"])
    page = (folder / "README.md").read_text()
    assert "Quantisation of" in page
    assert "license: mit" in page
    assert "14 linear layers in int8, with a scale for each output" in page
    assert "import ic.model" not in page
    # A second time over the first, as of any export.
    assert quantize(ic, source, "int8") == 2
    assert quantize(ic, source, "int8", "overwrite=true", "keep=[down_proj]") == 0
    kept = load(folder)
    assert type(kept.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert load_config(folder, quantised=True).cache_dtype == "auto"


@pytest.mark.slow
def test_refusals(
    ic: Callable[..., int],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line each, before a weight is read, and nothing is left behind."""
    source = checkpoint(v_head_dim=12)
    assert quantize(ic, source, "fp8") == 0
    monkeypatch.setattr("ic.quantization.weights.compress", lambda *_: pytest.fail("read a weight"))
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    Path("short.txt").write_text("too short")
    capsys.readouterr()
    cases: list[tuple[list[str], str]] = [
        (["scheme=fp4"], "scheme='fp4': did you mean fp8? choose one of fp8, int8, int4, none"),
        (["cache=int4"], "cache='int4'"),
        (["group_size=64"], "group_size=64: goes with scheme=int4"),
        (["scheme=int4", "group_size=48"], "group_size=48: choose one of 128, 64, 32"),
        (["scheme=int4", "group_size=128"], "has 64 inputs, which groups of 128 do not divide"),
        (["scheme=int4"], "o_proj has 48 inputs, which groups of 128 or 64 or 32 do not divide"),
        (["source=out/fp8"], "source=out/fp8 is quantised already"),
        ([f"source={llama}"], "has no Multi-head Latent Attention: `convert` gives it that"),
        (["keep=[w_proj]"], "keep=w_proj: no layer is called so; there are down_proj"),
        (["keep=[gate_proj]"], "gate_proj and up_proj in one product: keep both or neither"),
        (["keep=['re:.*']"], "leaves no layer to quantise"),
        (["parity.lengths=[512]", "parity.parts=[logits]"], "text=[]: name long texts"),
        (["parity.text=[/nope.txt]"], "parity.text: there is no file '/nope.txt'"),
        (["parity.text=[short.txt]", "parity.parts=[logits]"], "options begin with parity.: "),
        (["parity.parts=[passkey]", "parity.retrieval_lengths=[9999]"], "9,999 tokens do not fit"),
        (["parity.parts=[speed]", "parity.speed_tokens=[9999]"], "10,015 tokens do not fit"),
        (["output=out/fp8"], "output=out/fp8 exists"),
    ]
    for overrides, message in cases:
        given = {"source": str(source), "output": "out/new", "scheme": "fp8"}
        keys = [override.partition("=")[0] for override in overrides]
        base = [f"{key}={value}" for key, value in given.items() if key not in keys]
        report = [] if any(key.startswith("parity") for key in keys) else ["parity=null"]
        assert ic("quantize", *base, *report, *overrides) == 2, overrides
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error, (overrides, error)
        assert not Path("out/new").exists()


def test_other_verbs_and_quantised_folders(
    ic: Callable[..., int], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate` runs them; what would train or write their weights says what to give instead."""
    assert quantize(ic, checkpoint(), "int4") == 0
    capsys.readouterr()
    assert (
        ic("generate", "checkpoint=out/int4", "prompt=abc", "accelerator=cpu", "max_new_tokens=3")
        == 0
    )
    for verb in (
        ["export", "checkpoint=out/int4", "output=again"],
        ["fit", "experiment=mla_tiny", "debug=default", "model.init_from=out/int4"],
    ):
        capsys.readouterr()
        assert ic(*verb) == 2
        assert (
            "out/int4 holds int4 weights: evaluate, generate and parity take them"
            in capsys.readouterr().err
        )


def test_the_report_beside_it(
    ic: Callable[..., int], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`parity` of source and result, told in the card too."""
    measured = ["parity.parts=[weights,cache,turns]", "parity.context_tokens=[512]"]
    small = ["parity.conversations=1", "parity.turns=2", "parity.answer_tokens=4"]
    given = [f"source={checkpoint()}", "output=out", "scheme=fp8", "cache=int8", "accelerator=cpu"]
    assert ic("quantize", *given, *measured, *small) == 0
    assert "turn 2, original's tokens kept" in capsys.readouterr().out
    rows = json.loads(Path("out/parity/parity.json").read_text())["rows"]
    (weights,) = [row for row in rows if row["what"] == "weights"]
    assert 0.2 < weights["ratio"] < 0.8
    (cache,) = [row for row in rows if row["what"] == "cache" and row["by"] == "context"]
    assert cache["bytes_converted"] == 512 * 2 * (32 + 8 + 4)
    assert cache["bytes_original"] == 512 * 2 * (32 + 8) * 4
    assert "turn 2, original's tokens kept" in Path("out/README.md").read_text()
