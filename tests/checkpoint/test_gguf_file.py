"""GGUF files in llama.cpp's layout give the logits of transformers' DeepSeek-V3."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.folder import load_config
from ic.checkpoint.gguf_file import GGUFFile
from ic.checkpoint.gguf_header import gguf_values
from ic.checkpoint.source import find_source
from ic.inference.loading import source_positions
from tests.checkpoint.gguf_files import byte_level_bpe, deepseek, write

IDS = torch.randint(0, 256, (2, 47), generator=torch.Generator().manual_seed(5))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 30,
    "beta_slow": 2,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("split", [True, False], ids=["k_b_v_b", "kv_b"])
@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_logits(tmp_path: Path, kind: str, split: bool, q_lora_rank: int | None) -> None:
    reference = deepseek(q_lora_rank=q_lora_rank)
    before = reference(IDS).logits
    write(tmp_path / "x.gguf", reference, kind, split=split)
    expected = reference(IDS).logits  # of the weights that the file holds
    assert (kind == "F32") == bool((expected == before).all())
    assert expected.std() > 0.3
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.model().dtype == {"F16": torch.float16}.get(kind, torch.float32)
    model = file.model(dtype=torch.float32)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)
    assert not any(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_yarn(tmp_path: Path) -> None:
    reference = deepseek(rope_parameters=dict(YARN))
    write(tmp_path / "x.gguf", reference)
    file = GGUFFile(tmp_path / "x.gguf")
    rope = file.config.rope_parameters or {}
    assert {key: rope[key] for key in YARN} == YARN
    expected = reference(IDS).logits
    torch.testing.assert_close(file.model()(IDS).logits, expected, atol=1e-5, rtol=0)
    plain = deepseek()
    plain.load_state_dict(reference.state_dict())
    assert (plain(IDS).logits - expected).abs().max() > 0.1


@torch.no_grad()
def test_tied(tmp_path: Path) -> None:
    reference = deepseek(tie_word_embeddings=True)
    write(tmp_path / "x.gguf", reference)
    model = GGUFFile(tmp_path / "x.gguf").model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=0)


def test_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", deepseek())
    tokenizer = GGUFFile(tmp_path / "x.gguf").tokenizer()
    text = "the key is 1234, not the 12<|end|>\n  ünïcode"
    assert tokenizer(text)["input_ids"] == byte_level_bpe().encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (260, 261)


def test_generate(ic: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    """The verb continues a prompt as transformers does with its own model and tokenizer."""
    reference = deepseek()
    write(tmp_path / "x.gguf", reference, "Q8_0")
    assert ic("generate", "checkpoint=x.gguf", "prompt=the key", "max_new_tokens=9") == 0
    shown = capsys.readouterr()
    tokenizer = byte_level_bpe()
    ids = torch.tensor([tokenizer.encode("the key").ids])
    out = reference.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=261)
    assert shown.out == tokenizer.decode(out[0, ids.shape[1] :].tolist()) + "\n"
    assert re.search(r"^loading x from x\.gguf \(0\.\d MB\)$", shown.err, re.MULTILINE)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("Q8_0", torch.float32)])
def test_export(ic: Callable[..., int], tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    reference = deepseek()
    write(tmp_path / "x.gguf", reference, kind)
    assert ic("export", "checkpoint=x.gguf", "output=out", "max_shard_size=100KB") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert stored.dtype == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=0)
    assert load_config(tmp_path / "out").rms_norm_eps == 1e-6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the 12")["input_ids"] == byte_level_bpe().encode("the 12").ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama"}, "of the architecture 'llama'; supported is llama.cpp's deeps"),
        ({"leading_dense_block_count": 1}, "a mixture of 256 experts in 1 of its 2 layers; supp"),
        ({"leave_out": "blk.1.ffn_up.weight"}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"leave_out": "blk.0.attn_v_b.weight"}, "lacks the tensor blk.0.attn_v_b.weight"),
        ({"leave_out": "token_embd.weight"}, "lacks the tensor token_embd.weight"),
        (
            {"split": False, "leave_out": "blk.0.attn_kv_b.weight"},
            "lacks the tensor blk.0.attn_k_b",
        ),
        (
            {"embedding_length": 65},
            r"lm_head.weight is \(264, 65\) by the configuration, and \(264, 64\)",
        ),
        ({"block_count": 1}, "tensors that the model has no place for, the first is blk.1.attn_k"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.type=linear, .* may be plain or YaRN's"),
        ({"attention.temperature_scale": 0.1}, "not supported: attention.temperature_scale=0.1"),
        (
            {"rope.scaling.yarn_ext_factor": 0.5},
            "not supported: .*rope.scaling.yarn_ext_factor=0.5",
        ),
        ({"parts": 2}, "is one of 2 parts of a model; put them together with llama-gguf-split"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "x.gguf", deepseek(), **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)


def test_a_model_that_is_said_to_be_in_one_part_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", deepseek(), parts=1)
    assert GGUFFile(tmp_path / "x.gguf").config.num_hidden_layers == 2


@pytest.mark.parametrize("size", [0, 3, 50, 5_000, 30_000, -1])
def test_truncated(tmp_path: Path, size: int) -> None:
    write(tmp_path / "x.gguf", deepseek())
    data = (tmp_path / "x.gguf").read_bytes()
    assert len(data) > 100_000
    (tmp_path / "x.gguf").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="x.gguf is no GGUF file, or is damaged"):
        GGUFFile(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("splitting", "message"),
    [
        (None, "holds no tokenizer; say which to use with tokenizer=FOLDER"),
        ("deepseek-v3", "splits text by the rule 'deepseek-v3' .* tokenizer=FOLDER"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt(
    ic: Callable[..., int], tmp_path: Path, splitting: str | None, message: str, capsys: Any
) -> None:
    write(tmp_path / "x.gguf", deepseek(), splitting=splitting)
    for verb in (("generate", "prompt=the"), ("export", "output=out")):
        assert ic(verb[0], "checkpoint=x.gguf", *verb[1:]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    assert ic("export", "checkpoint=x.gguf", "output=out", f"tokenizer={tmp_path}") == 0
    assert ic("generate", "checkpoint=out", "prompt=the", "max_new_tokens=1") == 0


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.gguf", deepseek())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"x\.gguf needs the package gguf: pip install"):
        GGUFFile(tmp_path / "x.gguf")


def test_values_are_those_of_llama_cpps_reader(tmp_path: Path) -> None:
    """Read without the arrays, of files of either byte order."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    for order in (gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG):
        writer = gguf.GGUFWriter(path, "llama", False, order)
        writer.add_context_length(8192)
        writer.add_array("nested", [["a", "bc"], ["d"]])
        writer.add_array("tokens", ["<s>", "naïve", ""])
        writer.add_array("scores", [0.5, -1.0])
        writer.add_rope_freq_base(1e5)
        writer.add_bool("flag", True)
        writer.add_int8("small", -3)
        writer.add_float64("exact", 0.1)
        writer.add_string("said", "naïve")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fields = gguf.GGUFReader(path).fields
        wanted = {
            key: field.contents()
            for key, field in fields.items()
            if not key.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
        }
        assert gguf_values(path) == wanted
        assert wanted["said"] == "naïve"
        assert source_positions(find_source(str(path))) == 8192
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="x.gguf is no GGUF file, or is damaged"):
        gguf_values(path)
