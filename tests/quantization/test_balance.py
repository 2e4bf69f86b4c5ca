"""Numbers of a cached row brought to like size: nothing changes but what rounding loses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ic.checkpoint.folder import FolderCheckpointIO
from ic.inference.loading import load_source
from ic.inference.options import InferenceOptions
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.quantization.balance import row_factors

TEXT = "The sea was calm, and the old keeper lit his lamp. "
IDS = torch.tensor([list((TEXT * 4).encode())])
ASKED = ("calibration=[text.txt]", "calibration_rows=4", "calibration_tokens=200")


def load(folder: Path | str, cache: str = "auto") -> MLAForCausalLM:
    """With that cache, whatever the folder says."""
    model: MLAForCausalLM = load_source(InferenceOptions(str(folder), accelerator="cpu")).model
    model.config.cache_dtype = cache
    return model


@torch.no_grad()
def logits(model: MLAForCausalLM) -> torch.Tensor:
    """Of a prefill, which reads the cache back, and of a token that is decoded after it."""
    first = model(IDS[:, :-1], use_cache=True)
    last = model(IDS[:, -1:], past_key_values=first.past_key_values)
    return torch.cat([first.logits, last.logits], dim=1)


def save_uneven(model: MLAForCausalLM, folder: Path) -> Path:
    """With rotary keys of 4 to 300 times their size, as a converted model has them."""
    config, heads = model.config, model.config.num_attention_heads
    sizes = torch.logspace(2, 8, config.qk_rope_head_dim // 2, base=2)
    size_P = sizes.repeat_interleave(2) if config.rope_interleave else sizes.repeat(2)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.kv_a_proj_with_mqa.weight[config.kv_lora_rank :] *= size_P[:, None]
            query = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
            parts_HX = query.weight.view(heads, config.qk_head_dim, -1)
            parts_HX[:, config.qk_nope_head_dim :] /= size_P[:, None]
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    io = FolderCheckpointIO(config, ByteTokenizer())
    io.save_checkpoint({"state_dict": state, "context_length": 2048}, folder)
    return folder


@pytest.fixture
def uneven(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "text.txt").write_text(TEXT * 200)
    dims = {"vocab_size": 320, "num_hidden_layers": 2, "pad_token_id": 258, "bos_token_id": 256}
    dims |= {"q_lora_rank": 32, "intermediate_size": 96, "v_head_dim": 16}  # groups of 32 divide
    return lambda **changes: save_uneven(
        make_model(**{**dims, "eos_token_id": 257, **changes}),
        tmp_path / "runs/small/default/checkpoints/step=7",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "query_bias": True, "attention_bias": True},
        {"rope_interleave": False, "latent_norm": False},
        {"nope_layers": [0], "length_temperature": "ssmax"},
    ],
    ids=str,
)
def test_the_same_model_bit_for_bit_in_rows_of_like_size(
    ic: Callable[..., int], uneven: Callable[..., Path], changes: dict[str, object]
) -> None:
    source = uneven(**changes)
    base = ("quantize", f"source={source}", "scheme=none", "cache=int8", "parity=null")
    assert ic(*base, "output=out", *ASKED) == 0
    plain, balanced = load(source), load("out")
    assert logits(balanced).equal(logits(plain))

    def spread(model: MLAForCausalLM) -> list[float]:
        """Of the numbers of a row the largest root mean square by the smallest."""
        with torch.no_grad():
            cache = model(IDS, use_cache=True).past_key_values
        sizes = [r.latents()[0].float().square().mean(0).sqrt() for r in cache.layers]
        return [float(size.max() / size.min()) for size in sizes]

    assert max(spread(balanced)) < 6
    assert min(spread(plain)) > 40


def test_what_is_never_used_stays(make_model: Callable[..., MLAForCausalLM]) -> None:
    """Rotary keys that are zero, and a latent that hardly moves: factors of a size that bfloat16
    and training bear.
    """
    model = make_model()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.kv_a_proj_with_mqa.weight[32:] = 0
        attention.kv_a_layernorm.weight[0] = 1e-12
    found = row_factors(model, torch.arange(3, 43)[None])["model.layers.0.self_attn"]
    assert found.rotary_P.tolist() == [1.0] * 8
    assert found.latent_R.min() >= found.latent_R.max() / 512
    with torch.no_grad():
        attention.kv_a_layernorm.weight[1] = torch.nan
    with pytest.raises(ValueError, match="self_attn computes numbers that are NaN"):
        row_factors(model, torch.arange(3, 43)[None])


def test_int8_loses_less_than_e4m3(
    ic: Callable[..., int], uneven: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = uneven()
    base = ("quantize", f"source={source}", "cache=int8", "parity=null")
    assert ic(*base, "scheme=none", "output=out/rows", *ASKED) == 0
    said = capsys.readouterr().out
    assert "of weights, in the precision that they had" in said
    assert "the cache holds int8, of rows whose numbers were brought to like size" in said
    assert ic(*base, "scheme=none", "output=out/plain") == 0
    hint = "the cache holds int8; with calibration=[FILES] its rows would lose less"
    assert hint in capsys.readouterr().out
    exact = logits(load(source))

    def error(folder: Path | str, cache: str) -> float:
        return float((logits(load(folder, cache)) - exact).norm() / exact.norm())

    before, e4m3, int8 = error(source, "int8"), error(source, "fp8"), error("out/rows", "int8")
    assert int8 < e4m3 < before
    assert int8 < before / 10

    saved = json.loads(Path("out/rows/config.json").read_text())
    assert saved["cache_dtype"] == "int8"
    record = json.loads(Path("out/rows/quantization.json").read_text())
    assert (record["scheme"], record["cache_is_balanced"]) == (None, True)
    page = Path("out/rows/README.md").read_text()
    assert "Quantisation of the cache of" in page
    assert "compressed-tensors" not in page
    assert "weights are rounded" not in page
    assert (
        "numbers of a cached row brought to like size, by powers of two on 4 rows of 200 tokens of "
        "text.txt" in page
    )
    # With rounded weights the rows are those of the balanced model too.
    assert ic(*base, "scheme=int4", "rounding=gptq", "output=out/both", *ASKED) == 0
    assert "rounded by GPTQ and numbers" in Path("out/both/README.md").read_text()
    assert error("out/both", "int8") < 1.1 * error("out/both", "auto")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheme=none"], "scheme=none: leaves the weights as they are, and cache=auto the cache"),
        (["scheme=none", "cache=fp8", *ASKED], "rounding=nearest and cache=fp8 read none"),
        (["scheme=none", "cache=int8", "keep=[o_proj]"], "keep=['o_proj']: scheme=none quantises"),
        (["scheme=none", "cache=int8", "group_size=64"], "group_size=64: goes with scheme=int4"),
        (["scheme=none", "cache=int8", "rounding=gptq"], "rounding=gptq: goes with scheme=int4"),
    ],
)
def test_refusals_of_options(
    ic: Callable[..., int],
    uneven: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    assert ic("quantize", f"source={uneven()}", "output=out", "parity=null", *overrides) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm_dim": 8}, "norms of queries and keys (qk_norm_dim) give its rotary keys"),
        ({"dtype": "float16"}, "float16 has too little range to bring numbers to like size"),
    ],
    ids=str,
)
def test_refusals_of_models(
    ic: Callable[..., int],
    uneven: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
) -> None:
    dims = {name: value for name, value in changes.items() if name != "dtype"}
    source = uneven(**dims)
    if "dtype" in changes:
        assert ic("export", f"checkpoint={source}", "output=half", "dtype=float16") == 0
        source = Path("half")
    given = ("quantize", f"source={source}", "output=out", "parity=null", "scheme=none")
    assert ic(*given, "cache=int8", *ASKED) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()
