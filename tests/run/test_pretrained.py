"""`model=pretrained`: a run whose sizes, weights and tokenizer a folder gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ic.datamodules.chat_templates import set_chat_template
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SMALL, randomize

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
SIZES = {
    **SMALL,
    "vocab_size": 384,
    "q_lora_rank": None,
    "nope_layers": [1],
    "max_position_embeddings": 512,
}
TEXT = (
    "data=text",
    "data.train_files=[book.txt]",
    "data.document_unit=paragraph",
    "data.val_fraction=0.1",
    "data.context_length=64",
    "data.tokens_per_batch=128",
    "data.num_workers=0",
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "callbacks.memory=null",
    "callbacks.samples=null",
    "logger=none",
    "name=on",
)
FIT = ("fit", "model=pretrained", "model.init_from=source", *TEXT)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of a model whose every size differs from the presets', with a tokenizer of its own
    template and special tokens.
    """
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**SIZES))
    randomize(model)
    tokenizer = ByteTokenizer()
    set_chat_template(tokenizer, "chatml")
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i} of many." for i in range(90)))
    return tmp_path / "source"


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_folder_gives_sizes_weights_and_tokenizer(ic: Run, source: Path) -> None:
    frozen = ("optimizer.lr=1e-30", "optimizer.weight_decay=0")
    theta = "model.rope_parameters.rope_theta=2e6"
    assert ic(*FIT, *frozen, theta, "model.max_position_embeddings=1024") == 0
    last = source.parent / "runs/on/default/checkpoints/last"
    before, after = described(source), described(last)
    before = {key: before[key] for key in before if key not in ("architectures", "dtype")}
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"max_position_embeddings", "rope_parameters", "trained_length"}
    assert after["rope_parameters"] == {"rope_type": "default", "rope_theta": 2e6}
    assert after["max_position_embeddings"] == 1024
    assert after["trained_length"] == 64
    weights, trained = (
        load_file(source / "model.safetensors"),
        load_file(last / "model.safetensors"),
    )
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    tokenizer, kept = (AutoTokenizer.from_pretrained(folder) for folder in (source, last))
    assert kept.chat_template == tokenizer.chat_template
    assert kept.get_vocab() == tokenizer.get_vocab()
    assert kept.convert_tokens_to_ids("<|im_end|>") >= 259


def test_a_run_goes_on_without_the_folder(ic: Run, source: Path, capsys: Capture) -> None:
    assert ic(*FIT, "run_id=unbroken", "trainer.max_steps=4") == 0
    runs = source.parent / "runs/on"
    assert ic(*FIT, "trainer.max_steps=2") == 0
    source.rename(source.with_name("moved"))
    more = ("trainer.max_steps=4", "allow_config_change=true")
    assert ic("fit", "run=runs/on/default", *more) == 0
    whole, resumed = (
        load_file(runs / run / "checkpoints/last/model.safetensors")
        for run in ("unbroken", "default")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert ic("validate", "run=runs/on/default") == 0
    capsys.readouterr()
    # A new run begins with weights that are no longer there.
    assert ic("fit", "from=runs/on/default", "run_id=new") == 2
    assert "no checkpoint folder source" in capsys.readouterr().err.splitlines()[-1]
    source.with_name("moved").rename(source)
    assert ic("fit", "from=runs/on/default", "run_id=new", "trainer.max_steps=1") == 0


def test_a_requeued_job_continues(ic: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theta = "model.rope_parameters.rope_theta=2e6"
    assert ic(*FIT, theta) == 0
    run = source.parent / "runs/on/default"
    before = yaml.safe_load((run / "config.yaml").read_text())
    assert before["model"]["shape"]["hidden_size"] == 64
    # The same command, which finds all its steps done.
    assert ic(*FIT, theta, "ckpt_path=auto") == 0
    after = yaml.safe_load((run / "config.yaml").read_text())
    assert after["model"] == before["model"]
    # Started by a run of its own, whose sizes its checkpoint tells.
    assert ic(*FIT, "model.init_from=runs/on/default", "name=next", "trainer.max_steps=1") == 0
    last = source.parent / "runs/next/default/checkpoints/last"
    assert described(last)["rope_parameters"]["rope_theta"] == 2e6


def test_lora_and_plan(ic: Run, source: Path, capsys: Capture) -> None:
    assert (
        ic(*FIT, "model/adapter=lora", "model.adapter.r=2", "model.gradient_checkpointing=true")
        == 0
    )
    assert (source.parent / "runs/on/default/checkpoints/last/adapter").is_dir()
    capsys.readouterr()
    assert ic("plan", "model=pretrained", "model.init_from=source", *TEXT, "json=true") == 0
    said = capsys.readouterr().out
    report = json.loads(said[said.index("{") :])
    weights = load_file(source / "model.safetensors").values()
    # The allocator's blocks hold a little more than the tensors.
    planned = report["training_parts_bytes"]["parameters"] / 4
    assert planned == pytest.approx(sum(tensor.numel() for tensor in weights), rel=0.01)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hidden_size=64", "unknown key 'model.hidden_size'"),
        ("model.init_from=null", "model=pretrained takes the sizes and weights of a folder"),
        ("model.init_from=sourcx", "did you mean source?"),
        ("model.init_from=llama", "holds a model of type 'llama'"),
        ("model.init_from=book.gguf", "is a GGUF file"),
        ("model.rope_parameters.rope_theta=0.5", "rope_theta=0.5: must be a number above 1"),
        ("model.max_position_embeddings=0", "max_position_embeddings=0: must be at least 1"),
        ("data.context_length=1024", "data.context_length=1024: the model has 512 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_pytorch_loads(
    source: Path, override: str, said: str
) -> None:
    shutil.copytree(source, source.with_name("llama"))
    config = {**described(source), "model_type": "llama"}
    source.with_name("llama").joinpath("config.json").write_text(json.dumps(config))
    source.with_name("book.gguf").write_bytes(b"GGUF")
    code = (
        "import sys, ic.cli\n"
        f"sys.argv = {['ic', *FIT, 'data.tokens_per_batch=1024', override]!r}\n"
        "try: ic.cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source.parent, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert not (source.parent / "runs").exists()


def test_another_tokenizer_is_refused(ic: Run, source: Path, capsys: Capture) -> None:
    config = {**described(source), "vocab_size": 256}
    (source / "config.json").write_text(json.dumps(config))
    assert ic(*FIT) == 2
    assert "an embedding of 256" in capsys.readouterr().err.splitlines()[-1]
