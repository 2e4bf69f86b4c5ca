"""What `python -m ic convert` refuses, before it has read a weight."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.checkpoint import export
from ic.checkpoint.folder import load_model
from ic.files.json_lines import write_rows
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conversion.small import SMALL, TEXT, Run, convert, distance, refused, write_chats
from tests.gqa import FAMILIES

Capture = pytest.CaptureFixture[str]


REFUSED = {
    "rank beyond the full one": (
        "rank=57",
        r"rank=57: the full rank beside a rotary key of 8 is 56",
    ),
    "rank of whole keys": ("rope_dim=32 rank=33", r"beside a rotary key of 32 is 32"),
    "odd rotary dimension": ("rank=8 rope_dim=5", r"rope_dim=5: must be even, pairs"),
    "rotary dimension": (
        "rank=8 rope_dim=12",
        r"rope_dim=12: must be even and below .* dimension 8",
    ),
    "no rotary dimension": ("rank=8 rope_dim=0", r"rope_dim=0: must be at least 2"),
    "rotary beyond the keys": ("rank=8 rope_dim=40", r"rope_dim=40: .* at most 32, .*: 8, 16, 24"),
    "both beyond the full": ("rank=61 rope_dim=4", r"rank=61: .* a rotary key of 4 is 60, and"),
    "no room for a latent": ("cache=0.05", r"cache=0.05: .* holds 64 .* takes 2 .* least 0.07"),
    "no room beside what is asked": (
        "cache=0.1 rope_dim=6",
        r"cache=0.1: .* takes 6 of them; give at least 0.13, or a smaller rope_dim",
    ),
    "budget of all": ("cache=1", r"cache=1.0: must be above 0 and below 1; leave out"),
    "two ways to say it": ("cache=0.5 rank=8", r"rank=8 and cache=0.5: give one of them"),
    "no text": ("rank=8 calibration=[]", r"calibration is empty: name files of text"),
    "too little text": (
        "rank=8 calibration_rows=9999",
        r"files hold [\d,]+ tokens, and 9999 rows of calibration_tokens=128",
    ),
    "more than the model's positions": (
        "rank=8 calibration_tokens=513",
        r"calibration_tokens=513: the model has 512 positions",
    ),
    "too few texts for the report": (
        "rank=8 parity.parts=[logits] parity.lengths=[128]",
        r"options begin with parity.: lengths=\[128\]: 1 of 1 documents have 128 tokens, but 4 "
        r"samples .* documents_by_length=\{128:1\} .*; parity=null leaves it out",
    ),
    "too long instructions": (
        "rank=8 parity.parts=[instructions] parity.answer_tokens=480",
        r"options begin with parity.: answer_tokens=480: an instruction has up to \d+ tokens, and "
        r"the models have 512 positions .*; parity=null leaves it out",
    ),
    "no such text": ("rank=8 calibration=[none.txt]", r"calibration: there is no file 'none.txt'"),
    "too few chats": (
        "rank=8 calibration_chats=[chats.jsonl]",
        r"calibration_chats: the conversations hold [\d,]+ tokens and fill 0 of 16 rows of "
        r"calibration_tokens=128, ",
    ),
    "no chats": (
        "rank=8 calibration_chats=[text.jsonl]",
        r'text.jsonl:1: no "messages"; the columns are text',
    ),
    "no such chats": ("rank=8 calibration_chats=[x.jsonl]", r"calibration_chats: .* 'x.jsonl'"),
    "tokenizer": ("rank=8 tokenizer=none", r"tokenizer='none': write bytes, or a folder"),
    "no GPU": ("rank=8 accelerator=gpu", r"accelerator=gpu: PyTorch sees no CUDA GPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit(
    ic: Run, trained: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    if "GPU" in case and torch.cuda.is_available():
        pytest.skip("there is one")
    write_chats(Path("chats.jsonl"), 1)
    write_rows(Path("text.jsonl"), [{"text": "no conversation"}])
    given, message = REFUSED[case]
    options = {
        "source": str(trained),
        "output": "out",
        "calibration": f"[{TEXT}]",
        "calibration_tokens": "128",
        **({} if "parity" in given else {"parity": "null"}),
        "format": "text",
        **dict(option.split("=", 1) for option in given.split()),
    }
    err = refused(ic, capsys, monkeypatch, *(f"{key}={value}" for key, value in options.items()))
    assert re.search(message, err), err


FAMILY_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"mlp_bias": True}, "mlp_bias=true"),
    "mha": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "llama_wide_heads": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotation of type 'dynamic'",
    ),
    "mistral": (
        {"sliding_window": 128},
        r"all layers attend to the last 128 of 512 tokens .*max_position_embeddings=128",
    ),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        r"layers 1-2 attend to the last 64 of 512 tokens",
    ),
}


@pytest.mark.parametrize("family", FAMILY_REFUSALS)
def test_options_of_a_family_that_are_not_carried(
    ic: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    changes, message = FAMILY_REFUSALS[family]
    FAMILIES[family].model(**changes).save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    err = refused(ic, capsys, monkeypatch, "source=model", "output=out", "parity=null")
    assert re.search(message, err), err


def test_heads_that_are_rotated_in_part(
    ic: Run, trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    file.write_text(json.dumps(config))
    err = refused(ic, capsys, monkeypatch, "source=model", "output=out")
    assert "partial_rotary_factor=0.5" in err


def test_qk_norms_keep_the_keys_whole(
    ic: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = FAMILIES["qwen3"].model(vocab_size=320)
    theirs.save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    distances = []
    for rank in (8, 24, 32):
        folder = convert(ic, Path("model"), tmp_path / f"rank{rank}", f"rank={rank}")
        distances.append(distance(load_model(folder), theirs))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6
    options = ("source=model", "output=out", f"calibration=[{TEXT}]", *SMALL, "parity=null")
    err = refused(ic, capsys, monkeypatch, *options, "rank=8", "rope_dim=16")
    assert "Qwen3 normalises each head's query and key before it rotates them" in err
    err = refused(ic, capsys, monkeypatch, *options, "cache=0.5")
    assert "with QK norms the keys stay whole" in err
    assert "at least 0.54" in err


def test_other_models(
    ic: Run, trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(ic, trained, tmp_path / "mla", "rank=16")
    err = refused(ic, capsys, monkeypatch, f"source={folder}", "output=out")
    assert "has Multi-head Latent Attention already" in err
    config = json.loads((folder / "config.json").read_text()) | {"first_k_dense_replace": 1}
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "config.json").write_text(json.dumps(config))
    err = refused(ic, capsys, monkeypatch, "source=experts", "output=out")
    assert "mixture-of-experts layers are not supported" in err
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    err = refused(ic, capsys, monkeypatch, "source=gpt2", "output=out")
    assert "a model of type 'gpt2'; Llama, Qwen2, Qwen3, Mistral can be converted" in err
    shutil.copytree(trained, tmp_path / "mute")
    for file in (*(tmp_path / "mute").glob("*token*"), tmp_path / "mute" / "byte_vocab.json"):
        file.unlink(missing_ok=True)
    err = refused(ic, capsys, monkeypatch, "source=mute", "output=out", "parity=null")
    assert "mute holds no tokenizer" in err
    err = refused(ic, capsys, monkeypatch, f"source={trained}", f"output={folder}")
    assert f"output={folder} exists" in err


def test_a_full_disk(
    ic: Run, trained: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    err = refused(ic, capsys, monkeypatch, f"source={trained}", "output=out")
    assert "output=out: the export takes 0.0 GB, but" in err
