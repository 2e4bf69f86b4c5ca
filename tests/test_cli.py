"""The command line: what it prints, and what its verbs leave."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from ic.checkpoint.folder import FolderCheckpointIO
from ic.cli import find_verbs
from ic.config.flags import split_flags
from ic.files.json_lines import read_rows
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SHORT

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def test_bare_call_lists_the_verbs(ic: Run, capsys: Capture) -> None:
    assert ic() == 0
    out = capsys.readouterr().out
    assert all(f"  {verb.words} " in out for verb in find_verbs().values())


@pytest.mark.parametrize("verb", find_verbs())
def test_help_shows_an_example_and_the_configuration(ic: Run, capsys: Capture, verb: str) -> None:
    assert ic(verb, "--help") == 0
    out = capsys.readouterr().out
    assert f"python -m ic {find_verbs()[verb].words} " in out
    assert "configuration:" in out


def test_two_words_are_a_verb(ic: Run, capsys: Capture) -> None:
    """Behind a verb that others begin with; an underscore or a hyphen joins them as well."""
    shown = set()
    for words in (("benchmark", "preference"), ("benchmark_preference",), ("make", "tokenizer")):
        assert ic(*words, "--help") == 0
        shown.add(capsys.readouterr().out.partition("\n")[0])
    assert shown == {
        "usage: python -m ic benchmark preference [overrides]",
        "usage: python -m ic make_tokenizer [overrides]",
    }
    assert ic("benchmark", "prefrence") == 2
    expected = "unknown verb 'benchmark prefrence'; did you mean benchmark preference or "
    assert expected in capsys.readouterr().err
    assert ic("benchmark", "kernels=[nothing]") == 2
    assert "nothing" in capsys.readouterr().err


def test_benchmark_without_a_gpu(ic: Run, capsys: Capture) -> None:
    assert ic("benchmark", "--list_cases") == 0
    assert "mla_decode: (1, 1M) 16 h 192+64 bf16" in capsys.readouterr().out
    assert ic("benchmark", "kernels=[layer]", "--list_cases") == 0
    assert capsys.readouterr().out.startswith("layer: ")
    if not torch.cuda.is_available():
        assert ic("benchmark") == 2
        assert "PyTorch sees none here" in capsys.readouterr().err


def test_flags_and_overrides_are_the_same() -> None:
    expected = ["trainer.max_steps=10", "experiment=mla_tiny"]
    for args in (
        ["trainer.max_steps=10", "experiment=mla_tiny"],
        ["--trainer.max_steps=10", "--experiment=mla_tiny"],
        ["--trainer.max_steps", "10", "--experiment", "mla_tiny"],
    ):
        assert split_flags(args) == (set(), expected)
    assert split_flags(["--overwrite", "--print_config"]) == ({"print_config"}, ["overwrite=true"])
    hyphens = ["--print-config", "--trainer.max-steps", "10", "--run-id=a-b"]
    assert split_flags(hyphens) == ({"print_config"}, ["trainer.max_steps=10", "run_id=a-b"])


def test_print_config(ic: Run, capsys: Capture) -> None:
    args = ("--experiment", "mla_32k", "--trainer.max_steps", "7", "logger=wandb", "--print_config")
    assert ic("fit", *args) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_steps"] == 7
    assert config["model"]["kv_lora_rank"] == 192
    assert config["logger"]["wandb"]["mode"] == "offline"


def test_tables_take_new_entries(ic: Run, capsys: Capture) -> None:
    tables = (
        "evaluation.samples_by_length={4096:1}",
        "evaluation.fillers_by_length={4096:[noise]}",
    )
    assert ic("evaluate", "checkpoint=x", "evaluation=long", *tables, "--print_config") == 0
    evaluation = yaml.safe_load(capsys.readouterr().out)["evaluation"]
    assert evaluation["samples_by_length"] == {262144: 1, 524288: 1, 1048576: 1, 4096: 1}
    assert evaluation["fillers_by_length"][4096] == ["noise"]


@pytest.mark.parametrize("verb", ["fit", "evaluate", "generate"])
def test_help_shows_the_backends(ic: Run, capsys: Capture, verb: str) -> None:
    assert ic(verb, "--help") == 0
    shown = capsys.readouterr().out
    indent = "  " if verb == "fit" else ""
    for name in ("attention", "norm", "rope"):
        assert f"\n{indent}{name}: torch  " in shown


@pytest.mark.slow
def test_the_whole_way(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    """fit, then every other verb from what it left, then a stage that continues from its weights."""
    assert ic(*SHORT, "trainer.max_steps=6", "logger.tensorboard=true") == 0
    out = capsys.readouterr().out
    run = tmp_path / "runs/debug/default"
    assert "passkey retrieval" in out
    assert str(run / "passkey/heatmap.png") in out
    for name in (
        "config.yaml",
        "csv/metrics.csv",
        "passkey/samples.jsonl",
        "passkey/heatmap.csv",
        "passkey/heatmap.png",
        "results.json",
        "memory/memory.json",
        "throughput.json",
    ):
        assert (run / name).stat().st_size > 0, name
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    drawn = {event.step: event.value for event in events.Scalars("train/loss")}
    assert drawn == pytest.approx(losses(run), rel=1e-6)
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 6

    memory = json.loads((run / "memory/memory.json").read_text())
    # A prompt of 256 tokens, 7 of the answer and one more, 3 layers of 64 + 16 float32 numbers.
    assert memory["phases"]["passkey"]["split_bytes"]["cache"] == (256 + 8) * 3 * 80 * 4

    ckpt = run / "checkpoints/last"
    for verb in ("validate", "test"):
        assert ic(verb, *SHORT[1:], "ckpt_path=last") == 0
        assert {"validate": "val/loss", "test": "test/loss"}[verb] in capsys.readouterr().out
    assert ic("predict", *SHORT[1:], f"ckpt_path={ckpt}") == 0
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["correct"] == (row["expected"] == row["predicted"]) for row in rows)
    assert all(row["expected"].endswith(".") for row in rows)

    small = ("evaluation.lengths=[256]", "evaluation.depths=[0.5]", "evaluation.samples=1")
    assert ic("evaluate", f"checkpoint={ckpt}", f"output={tmp_path / 'out'}", *small) == 0
    assert (tmp_path / "out/heatmap.png").stat().st_size > 0
    capsys.readouterr()
    assert ic("generate", f"checkpoint={ckpt}", "prompt=the key", "max_new_tokens=5") == 0

    assert ic(*SHORT, "name=next", f"model.init_from={ckpt}", "trainer.max_steps=1") == 0
    assert ic(*SHORT, f"model.init_from={ckpt}", "model.hidden_size=64") == 2
    assert "hidden_size 128 (configured 64)" in capsys.readouterr().err


@pytest.fixture
def writer(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Path:
    """A checkpoint folder whose random model writes printable characters alone."""
    tokenizer = ByteTokenizer()
    special = {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    model = make_model(vocab_size=320, **special)
    with torch.no_grad():
        model.lm_head.weight[:32], model.lm_head.weight[127:] = 0, 0
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    folder = tmp_path / "writer"
    FolderCheckpointIO(model.config, tokenizer).save_checkpoint({"state_dict": state}, folder)
    return folder


def continuation(checkpoint: Path, prompt: str, num_tokens: int) -> str:
    """The likeliest bytes one after another, the whole text through the model for each."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    text = prompt.encode()
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(torch.tensor([list(text)]), use_cache=False).logits[0, -1]
            text += bytes([int(logits.argmax())])
    return text.decode().removeprefix(prompt)


def test_generate(ic: Run, writer: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "It is 5 = five, the 'key'"
    expected = continuation(writer, prompt, 24)
    assert len(set(expected)) > 4
    args = ("generate", f"checkpoint={writer}", "accelerator=cpu", "max_new_tokens=24")
    for more in ((), ("prefill_chunk_tokens=7",), ("temperature=1", "top_p=0.001")):
        assert ic(*args, f"prompt={prompt}", *more) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    assert ic(*args, "prompt=-") == 0
    assert capsys.readouterr().out == f"{expected}\n"
    drawn = []
    for seed in (1, 1, 2):
        assert ic(*args, f"prompt={prompt}", "temperature=1", f"seed={seed}") == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def losses(run: Path) -> dict[int, float]:
    """By step, as the run's CSV file has them."""
    rows = csv.DictReader((run / "csv/metrics.csv").open())
    found = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert sorted(found) == list(range(len(found)))
    assert len(found) > 1
    return found


def test_wandb_offline(ic: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    quick = (
        "logger=wandb",
        "trainer.max_steps=2",
        "callbacks.passkey=null",
        "callbacks.memory=null",
    )
    assert ic(*SHORT, *quick) == 0
    kept = read_rows(tmp_path / "runs/debug/default/tracking/wandb/spool.jsonl")
    logged = {
        row["step"]: row["values"]["train/loss"]
        for row in kept
        if row["kind"] == "metrics" and "train/loss" in row["values"]
    }
    assert logged == losses(tmp_path / "runs/debug/default")


@pytest.mark.slow
def test_a_process_says_each_line_once(tmp_path: Path) -> None:
    short = (
        "callbacks.passkey=null",
        "callbacks.memory=null",
        "trainer.max_steps=1",
        "logger=none",
    )
    done = subprocess.run(
        [sys.executable, "-m", "ic", *SHORT, *short, f"output_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), done.stderr
    assert not [line for line in lines if line.startswith(("GPU available", "💡 Tip"))]
    assert any(line.startswith("checkpoint: ") for line in lines)


def test_the_backend_of_a_notebook_stops_no_verb(tmp_path: Path) -> None:
    """Jupyter's shells hand `MPLBACKEND` on; matplotlib refuses it where the notebook is not."""
    done = subprocess.run(
        [sys.executable, "-m", "ic", "export", "checkpoint=nowhere", f"output={tmp_path}/out"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        },
    )
    assert "no checkpoint folder nowhere" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("package", "args", "message"),
    [
        ("triton", ("benchmark", "--list_cases"), "benchmark needs Triton, which is not installed"),
        ("wandb", (*SHORT, "logger=wandb"), "logger=wandb: the package wandb is not installed"),
    ],
)
def test_a_package_that_is_missing(
    ic: Run,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    args: tuple[str, ...],
    message: str,
) -> None:
    for name in [name for name in sys.modules if name.startswith("ic.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert ic(*args) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"ic: {message}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "args", "message"),
    [
        (
            ("torch.distributed.run", "--nproc-per-node=3", "-m", "ic"),
            ("optimizer.lr=-1",),
            "optimizer.lr=-1.0: must be above 0",
        ),
        # Lightning starts the second process itself, before the data is looked for.
        (
            ("ic",),
            (
                *SHORT[1:],
                "data=text",
                "data.train_files=[nope]",
                "callbacks.context_length=null",
                "trainer.accelerator=cpu",
                "strategy=ddp",
            ),
            "data.train_files: there is no file 'nope'",
        ),
    ],
    ids=["torchrun", "lightning"],
)
def test_the_first_process_refuses_for_all(
    tmp_path: Path, launcher: tuple[str, ...], args: tuple[str, ...], message: str
) -> None:
    """The others wait with the same line until their launcher ends them, or has ended."""
    given = tuple(each for each in args if not each.startswith(("data.val_", "data.tok")))
    devices = "trainer.devices=3" if "torch.distributed.run" in launcher else "trainer.devices=2"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "fit", *given, devices, f"output_dir={tmp_path}"],
        capture_output=True,  # until every process has closed it
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert done.stderr.count(message) == 1, done.stderr
    assert f"ic: {message}" in done.stderr


def test_another_process_says_what_it_alone_refuses(
    ic: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ic.cli._FIRST_SPEAKS_S", 0.0)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert ic("fit", "optimizer.lr=-1") == 2
    assert capsys.readouterr().err == "ic: rank 3: optimizer.lr=-1.0: must be above 0\n"
