"""The verb `generate`: every option arrives, files of prompts, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.files.json_lines import read_rows
from ic.inference.engine.engine import Engine
from ic.inference.engine.request import Sampling
from ic.inference.generate.options import GenerateOptions
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def writer(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Path:
    """A random model that writes letters alone, so that texts are easy to cut."""
    model = make_model(vocab_size=320, num_hidden_layers=1, max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight[:97], model.lm_head.weight[123:] = 0, 0
    model.save_pretrained(tmp_path / "writer")
    ByteTokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


def test_every_option_arrives() -> None:
    """Under the name that the engine has for it; the n-th prompt of a file has a seed of its own."""
    asked: dict[str, Any] = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1, "ignore_end": True, "logprobs": 4,
    }  # fmt: skip
    options = GenerateOptions(
        prompt_file="x.jsonl",
        max_new_tokens=7,
        seed=5,
        stop=["a", "b"],
        stop_token_ids=[9],
        **asked,
    )
    expected = Sampling(max_tokens=7, stop=("a", "b"), stop_token_ids=(9,), seed=7, **asked)
    assert options.sampling(2) == expected
    names = {each.name for each in dataclasses.fields(Sampling)} - {"max_tokens"}
    assert names < {each.name for each in dataclasses.fields(GenerateOptions)}
    assert GenerateOptions(prompt="x").sampling(0) == Sampling(seed=0)
    assert GenerateOptions(chat=True).most_new_tokens == 1024


def test_a_stop_string_ends_the_text(ic: Run, writer: Path, capsys: Capture) -> None:
    args = ("generate", f"checkpoint={writer}", "accelerator=cpu", "prompt=ab", "max_new_tokens=40")
    assert ic(*args) == 0
    whole = capsys.readouterr().out[:-1]
    assert len(whole) == 40
    stop = whole[20:23]
    assert ic(*args, f"stop=[{stop},Q]") == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"
    Path("text.txt").write_text("ab")
    assert ic(*args[:3], "prompt_file=text.txt", "max_new_tokens=40", "page_tokens=16") == 0
    assert capsys.readouterr().out == whole + "\n"


def test_a_long_prompt(
    ic: Run, writer: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of it is said, and that it is longer than what was trained."""
    config = json.loads((writer / "config.json").read_text())
    (writer / "config.json").write_text(json.dumps({**config, "trained_length": 199}))
    monkeypatch.setattr("ic.inference.generate.reading._EVERY_S", 0.0)
    args = ("generate", f"checkpoint={writer}", "accelerator=cpu", "max_new_tokens=2")
    assert ic(*args, "prefill_chunk_tokens=80", f"prompt={'a' * 200}") == 0
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("reading the prompt: ")]
    read = [line.removeprefix("reading the prompt: ").split()[0] for line in lines]
    assert read == ["0", "80", "160", "200"]
    assert "prompt has 200 tokens, and the model was trained at up to 199" in error
    assert ic(*args, f"prompt={'a' * 199}") == 0
    error = capsys.readouterr().err
    assert "trained at" not in error
    assert "reading" not in error


PROMPTS: list[dict[str, Any]] = [
    {"prompt": "ab", "id": 7},
    {"messages": [{"role": "user", "content": "hi"}], "tag": "chat"},
    {"prompt": "the longest of all prompts, by far"},
    {"prompt": "ab"},
    {"prompt": "c"},
]


def test_a_file_of_prompts(
    ic: Run, writer: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers in order, each that of its prompt alone; what is there is not answered again."""
    lines = [json.dumps(row) for row in PROMPTS]
    Path("prompts.jsonl").write_text("\n".join(lines))
    base = ("generate", f"checkpoint={writer}", "accelerator=cpu", "max_new_tokens=12")
    drawn = ("temperature=0.2", "top_p=0.9")
    args = (*base, *drawn, "prompt_file=prompts.jsonl", "logprobs=1", "max_batch=2")
    assert ic(*args) == 0
    assert "5 answers: prompts.answers.jsonl" in capsys.readouterr().out
    file = tmp_path / "prompts.answers.jsonl"
    written = file.read_bytes()
    rows = read_rows(file)
    assert [(row.get("id"), row.get("tag")) for row in rows] == [
        (7, None), (None, "chat"), (None, None), (None, None), (None, None),
    ]  # fmt: skip
    assert all(row["finish"] == "length" and row["tokens"] == 12 for row in rows)
    assert rows[0]["text"] != rows[3]["text"], "the same prompt has another seed"
    for number, more in ((2, ()), (1, ("chat=true",)), (4, ())):
        prompt = PROMPTS[number].get("prompt", "hi")
        assert ic(*base, *drawn, f"prompt={prompt}", f"seed={number}", *more) == 0
        assert capsys.readouterr().out == rows[number]["text"] + "\n"
    first = rows[0]["logprobs"][0]
    assert first["token_id"] == ord(rows[0]["text"][0])
    assert first["top"][0][1] >= first["logprob"]

    # Killed while the third was written.
    file.write_bytes(written[: written.index(b"\n", written.index(b"chat")) + 9])
    added: list[str] = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, x: added.append(x.id) or add(self, x))
    assert ic(*args) == 0
    assert "5 answers, 2 were there" in capsys.readouterr().out
    assert added == ["2", "3", "4"]
    assert file.read_bytes() == written
    assert ic(*args, "temperature=0.5") == 2
    assert "line 1: answers another prompt, or was drawn with other options" in (
        capsys.readouterr().err
    )
    assert file.read_bytes() == written


def test_an_answer_that_fails_stops_no_other(
    ic: Run, writer: Path, capsys: Capture, make_model: Callable[..., MLAForCausalLM]
) -> None:
    """Logits that are no numbers behind one byte."""
    model = MLAForCausalLM.from_pretrained(writer)
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("%")] = torch.inf
    model.save_pretrained(writer)
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a%"}\n{"prompt": "b"}\n')
    args = ("generate", f"checkpoint={writer}", "accelerator=cpu", "max_new_tokens=3")
    assert ic(*args, "prompt_file=prompts.jsonl") == 1
    assert "1 prompts could not be answered" in capsys.readouterr().err
    rows = read_rows(Path("prompts.answers.jsonl"))
    assert [row["finish"] for row in rows] == ["length", "error", "length"]
    assert "logits are not numbers" in rows[1]["error"]
    assert ic(*args, "prompt=a%") == 1
    assert "logits are not numbers" in capsys.readouterr().err


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "two prompts": (("prompt=a", "prompt_file=b"), "give one of the two"),
    "no terminal": (("chat=true",), "standard input is none: give prompt=TEXT"),
    "no chat": (("prompt=a", "system=b"), "set chat=true"),
    "too long": (
        ("prompt=abcd", "max_new_tokens=253"),
        "prompt and max_new_tokens come to 257 tokens, but the model has 256 positions",
    ),
    "no room": (
        ("prompt=abcd", "max_new_tokens=61", "cache_tokens=64"),
        "(cache_tokens). However, you requested 65 tokens",
    ),
    "temperature": (("prompt=a", "temperature=2.5"), "temperature=2.5: must be from 0"),
    "min_p": (("prompt=a", "min_p=1.5"), "Invalid 'min_p'"),
    "penalty": (("prompt=a", "presence_penalty=3"), "Invalid 'presence_penalty'"),
    "empty stop": (("prompt=a", "stop=['']"), "Invalid 'stop': empty string"),
    "cache": (("prompt=a", "cache_dtype=fp4"), "cache_dtype='fp4': did you mean fp8?"),
    "logprobs": (("prompt=a", "logprobs=2"), "logprobs=2: is of answers to JSON lines"),
    "output": (("prompt=a", "output=x.jsonl"), "output=x.jsonl: is of answers to JSON lines"),
    "stop token": (
        ("prompt=a", "stop_token_ids=[3,320]"),
        "Invalid 'stop_token_ids': token 320 is not in the vocabulary of 320 tokens.",
    ),
    "bytes": (("prompt=a\udcff\udcfeb",), "prompt: not valid UTF-8 at character 2; convert it"),
    "bytes to stop": (("prompt=a", "stop=[b,\udcff]"), "stop: not valid UTF-8 at character 1"),
    "empty": (("prompt_file=empty.jsonl",), "prompt_file: "),
    "empty text": (("prompt_file=empty.txt",), "prompt_file='empty.txt' is empty"),
    "no UTF-8": (("prompt_file=bytes.jsonl",), "bytes.jsonl: not valid UTF-8"),
    "no file": (("prompt_file=nowhere.jsonl",), "prompt_file='nowhere.jsonl': no such file"),
    "no text": (("prompt_file=nowhere.txt",), "nowhere.txt"),
    "two keys": (("prompt_file=both.jsonl",), 'both.jsonl:1: a line must have "prompt"'),
    "taken": (("prompt_file=taken.jsonl",), '"text" is a key of the answer'),
    "a long line": (
        ("prompt_file=long.jsonl",),
        "long.jsonl:2 and max_new_tokens come to 364 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(ic: Run, writer: Path, capsys: Capture, case: str) -> None:
    args, message = BAD[case]
    Path("empty.jsonl").touch()
    Path("empty.txt").touch()
    Path("bytes.jsonl").write_bytes(b'{"prompt": "a\xff"}\n')
    Path("both.jsonl").write_text('{"prompt": "a", "messages": []}\n')
    Path("taken.jsonl").write_text('{"prompt": "a", "text": 1}\n')
    Path("long.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "a" * 300}) + "\n")
    assert ic("generate", f"checkpoint={writer}", "accelerator=cpu", *args) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("ic: ")]
    assert message in line
    assert not list(Path().glob("*.answers.jsonl"))
