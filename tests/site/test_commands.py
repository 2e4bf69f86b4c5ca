"""Every command of the documents is executed, composed, or skipped for a reason that is printed.

The executed ones run one after another in a folder that is empty at first: the tutorial's from the
first to the last, then those of the README, of your own text and of your own model, then the others.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ic.cli import find_verbs
from ic.model.byte_tokenizer import ByteTokenizer
from ic.training.language_modeling import LanguageModelingModule
from tests.site.commands import ROOT, Command, commands
from tests.test_documents import commands as composed

pytestmark = pytest.mark.site

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
EXECUTED = [command for command in commands() if command.is_executed]
INTERRUPTED = 130


def test_something_is_said_of_each(capsys: Capture) -> None:
    """What is called composed is composed by `tests/test_documents.py`."""
    also = {str(parameter.values[0]) for parameter in composed()}
    not_composed = [c.text for c in commands() if c.fate == "composed" and c.text not in also]
    assert not not_composed
    counts = Counter(command.fate for command in commands())
    tutorial = [c for c in commands() if c.page in ("tutorial.md", "own_text.md", "own_model.md")]
    left = {c.text for c in tutorial if not c.is_executed}
    assert left == {"git clone <this repository> && cd InfiniteContext"}
    with capsys.disabled():
        print(f"\n{len(commands())} commands of the documents:")
        for fate, number in counts.most_common():
            kind = {"as written": "executed as written", "smaller": "executed, made smaller"}
            print(
                f"{number:5} {kind.get(fate, fate if fate == 'composed' else f'skipped: {fate}')}"
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader brings: a book, four texts, prompts, and a model in place of smollm2.gguf."""
    path = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "docs/results", path / "docs/results")  # `cost` reads what was measured
    pages = sorted((ROOT / "docs").glob("*.md"), key=lambda page: -page.stat().st_size)
    (path / "book.txt").write_text("\n\n".join(page.read_text() for page in pages[4:12]))
    (path / "unseen").mkdir()
    for page in pages[:4]:
        shutil.copyfile(page, path / "unseen" / f"{page.stem}.txt")
    serving = (ROOT / "docs/serving.md").read_text()
    shown = re.search(r"^\$ cat prompts\.jsonl\n((?:\{.*\}\n)+)", serving, flags=re.M)
    assert shown is not None
    (path / "prompts.jsonl").write_text(shown[1])
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(path / "smollm2")
    ByteTokenizer().save_pretrained(path / "smollm2")
    return path


@pytest.mark.parametrize("command", EXECUTED, ids=lambda c: f"{c.page}: {c.text}")
def test_it_runs(
    command: Command, folder: Path, ic: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(folder)
    args = [*_arguments(command.text), *command.more]
    args = [arg.replace("smollm2.gguf", "smollm2") for arg in args]
    if command.text.startswith("ls "):
        assert sorted(p.name for p in Path(args[1]).iterdir()) == command.after.split()
    elif "name=stopped" in command.text:
        _press_ctrl_c(monkeypatch, 2)
        assert ic(*args) == INTERRUPTED
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"interrupted; continue with fit run={folder}/runs/stopped/default"
    elif args[:1] == ["serve"]:
        _serves(args, folder)
    elif command.after.startswith("ic: "):
        assert ic(*args) == 2
        assert capsys.readouterr().err.splitlines()[-1] == command.after
    elif args == []:
        assert ic() == 0
        said = capsys.readouterr().out
        assert all(verb.words in said for verb in find_verbs().values())
    elif args[0] == "doctor":
        assert ic(*args) in (0, 1)  # there may be something to fix on this machine
    else:
        assert ic(*args) == 0


def _arguments(text: str) -> list[str]:
    """What is behind `python -m ic`; of `make demo`, in its recipe."""
    if text.startswith("make "):
        recipe = re.search(rf"^{text[5:]}:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert recipe is not None, text
        text = recipe[1].replace("$(BIN)/", "")
    words = shlex.split(text)
    return words[3:] if words[:3] == ["python", "-m", "ic"] else words


def _press_ctrl_c(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    taken = LanguageModelingModule.training_step

    def interrupted(module: Any, *args: Any) -> Any:
        if module.trainer.global_step == step:
            signal.raise_signal(signal.SIGINT)
        return taken(module, *args)

    monkeypatch.setattr(LanguageModelingModule, "training_step", interrupted)


def _serves(args: list[str], folder: Path) -> None:
    """Until it is asked to end."""
    server = subprocess.Popen(
        [sys.executable, "-m", "ic", *args],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert server.stdout is not None
        address = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
        assert address is not None, "it has not begun to serve"
        with urllib.request.urlopen(f"{address[0]}/v1/models") as answer:
            assert b"mine" in answer.read()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.kill()
        server.communicate()
