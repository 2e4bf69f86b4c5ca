"""Turns on the terminal: the model's template, what is kept between turns, commands, Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.inference.engine.engine import Engine
from ic.inference.engine.request import Output
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def writer(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Path:
    model = make_model(vocab_size=320, num_hidden_layers=1, max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight[:97], model.lm_head.weight[123:] = 0, 0
    model.save_pretrained(tmp_path / "writer")
    ByteTokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A terminal on which these lines are typed; an exception in their place is raised."""

    def type_lines(*lines: str | BaseException) -> None:
        left: Iterator[str | BaseException] = iter(lines)

        def read(prompt: str) -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())

    return type_lines


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """Everything that the engine says."""
    said: list[Output] = []
    step = Engine.step

    def listen(self: Engine) -> list[Output]:
        found = step(self)
        said.extend(found)
        return found

    monkeypatch.setattr(Engine, "step", listen)
    return said


def args(writer: Path, *more: str) -> tuple[str, ...]:
    small = ("accelerator=cpu", "max_new_tokens=20", "page_tokens=16")
    return ("generate", f"checkpoint={writer}", "chat=true", *small, *more)


def replies(out: str) -> list[str]:
    """The lines behind the first, which explains the commands."""
    return out.splitlines()[1:]


def test_turns_share_the_cache(
    ic: Run, writer: Path, capsys: Capture, typed: Callable[..., None], outputs: list[Output]
) -> None:
    typed("hello", "", "and again", "/reset", "hello", "/quit", "never asked")
    assert ic(*args(writer, "system=Be brief.")) == 0
    first, second, fresh, third = replies(capsys.readouterr().out)
    assert fresh == "(a new conversation)"
    assert first == third
    assert len(first) == 20
    ends = [output for output in outputs if output.finish is not None]
    rendered = "<|system|>Be brief.<|end|><|user|>hello<|end|><|assistant|>"
    tokens = len(ByteTokenizer()(rendered)["input_ids"])
    assert ends[0].prompt_tokens == tokens
    # The first turn and its answer, in whole pages; the last token is not in the cache yet.
    assert ends[1].cached_tokens == (tokens + 19) // 16 * 16
    assert ends[2].cached_tokens == (tokens - 1) // 16 * 16
    again = f"{rendered}{first}<|eos|><|user|>and again<|end|><|assistant|>"
    assert ends[1].prompt_tokens == len(ByteTokenizer()(again)["input_ids"])
    one_shot = ("generate", f"checkpoint={writer}", "accelerator=cpu", "max_new_tokens=20")
    assert ic(*one_shot, f"prompt={again}") == 0
    assert capsys.readouterr().out == second + "\n"


def test_ctrl_c_stops_the_answer_alone(
    ic: Run,
    writer: Path,
    capsys: Capture,
    typed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the prompt it leaves the line; in an answer it keeps what is written, and frees the rest."""
    engines: list[Any] = []
    steps = 0
    step = Engine.step

    def press(self: Engine) -> list[Output]:
        nonlocal steps
        steps += 1
        engines.append(self)
        if steps == 8:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", press)
    typed("hello", KeyboardInterrupt(), "go on")
    assert ic(*args(writer)) == 0
    stopped, _, _, other = capsys.readouterr().out.splitlines()[1:5]
    written = stopped.removesuffix(" (stopped)")
    assert written != stopped
    assert 0 < len(written) < 10
    assert len(other) == 20
    assert engines[0].stats().pages_used == 0
    assert engines[0].stats().running == 0


def test_commands_and_a_conversation_that_is_too_long(
    ic: Run, writer: Path, capsys: Capture, typed: Callable[..., None]
) -> None:
    """What does not fit is said, and not kept."""
    typed("/rest", "x" * 250, "hello", "/a path or a text is no command")
    assert ic(*args(writer)) == 0
    help_, unknown, too_long, *answers = capsys.readouterr().out.splitlines()
    assert "Ctrl-C stops an answer" in help_
    assert unknown.startswith("unknown command /rest: /reset begins anew")
    assert "maximum context length is 256 tokens" in too_long
    assert too_long.endswith("/reset begins anew.")
    assert [len(line) for line in answers if line] == [20, 20]
