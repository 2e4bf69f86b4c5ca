"""Needle pairs for preference training: what they hold, how long they are, and that they repeat."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from ic.datamodules.needle_pairs import needle_pairs, question_of
from ic.datamodules.needle_pairs_options import MakePreferencesOptions
from ic.datamodules.needles import KEYS, answer_keys
from ic.datamodules.options import PreferenceDataOptions
from ic.datamodules.preference import tokenize_pair
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.prompts import build_prompt
from ic.evaluation.passkey.suite import PasskeySuite
from ic.evaluation.runner import settings_hash
from ic.model.byte_tokenizer import ByteTokenizer

SMALL = MakePreferencesOptions(lengths=[700, 1500], depths=[0.0, 0.5, 1.0], samples=6)


def test_pairs() -> None:
    rows = list(needle_pairs(SMALL, ByteTokenizer()))
    assert len(rows) == SMALL.num_pairs == 36
    assert {row["rejected_kind"] for row in rows} == {"distractor", "near_miss", "refusal"}
    for row in rows:
        text = row["prompt"][0]["content"]
        keys = answer_keys(text)
        assert len(set(keys)) == 9
        (right,) = answer_keys(row["chosen"][0]["content"])
        name = text.removesuffix(" is").split()[-1]
        needle = f" The pass key for {name} is {right}. "
        assert needle in text
        assert int(right) in KEYS["train"]
        wrong = answer_keys(row["rejected"][0]["content"])
        if row["rejected_kind"] == "distractor":
            assert wrong[0] in keys
            assert wrong[0] != right
        elif row["rejected_kind"] == "near_miss":
            assert sum(a != b for a, b in zip(wrong[0], right, strict=True)) == 1
            assert wrong[0] not in keys
        else:
            assert not wrong
        pair = tokenize_pair(ByteTokenizer(), row, "row", PreferenceDataOptions())
        assert pair.num_tokens == row["length_tokens"]
        at = text.index(needle) / (len(text) - len(question_of(name)))
        # The other needles shift it by at most their own length.
        assert abs(at - row["depth"]) < 9 * len(needle) / len(text)


def test_rows_do_not_depend_on_each_other() -> None:
    few = MakePreferencesOptions(lengths=[1500], depths=[0.5], samples=2)
    whole = [
        r
        for r in needle_pairs(SMALL, ByteTokenizer())
        if (r["length_tokens"], r["depth"]) == (1500, 0.5)
    ]
    assert list(needle_pairs(few, ByteTokenizer())) == whole[:2]


def test_plain_pairs_are_the_evaluations_prompts() -> None:
    tokenizer, lengths = ByteTokenizer(), [500, 900]
    for distractors, task in ((4, "multi_key"), (0, "single")):
        config = MakePreferencesOptions(
            prompt="plain",
            num_distractors=distractors,
            lengths=lengths,
            depths=[0.5],
            tokens_per_length=4500,
        )
        rows = list(needle_pairs(config, tokenizer))
        assert [row["length_tokens"] for row in rows] == [500] * 9 + [900] * 5
        kinds = {"near_miss", "refusal", *(["distractor"] if distractors else [])}
        assert {row["rejected_kind"] for row in rows} == kinds
        grid = PasskeyGridConfig(tasks=[task], num_needles=4)
        asked = build_prompt(tokenizer, grid, Cell(task, 500, 0.5, "noise", 1), 0)
        question = re.compile(r" What is the pass key( for \w{3})?\? The pass key( for \w{3})? is$")
        for text in (tokenizer.decode(asked.ids), *(row["prompt"] for row in rows)):
            name = question.search(text).group(1) or ""
            keys = set(answer_keys(text))
            assert len(keys) == distractors + 1
            assert sum(f"The pass key{name} is {key}. " in text for key in keys) == 1
        for row in rows:
            (key,) = answer_keys(row["chosen"])
            assert row["chosen"] == f" {key}."
            name = question.search(row["prompt"]).group(1) or ""
            assert f" The pass key{name} is {key}. " in row["prompt"]
            assert row["rejected"] != row["chosen"]
            pair = tokenize_pair(tokenizer, row, "row", PreferenceDataOptions())
            assert pair.num_tokens == row["length_tokens"]


def test_verb(ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("Ein Turm steht am Meer. " * 40)
    args = ("make-preferences", "lengths=[600]", "samples=2", "text_files=[own.txt]")
    for name in ("a.jsonl", "b.jsonl", "c.parquet"):
        assert ic(*args, f"output=out/{name}") == 0
    assert "10 pairs: out/a.jsonl" in capsys.readouterr().out
    assert (tmp_path / "out/a.jsonl").read_bytes() == (tmp_path / "out/b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "out/a.jsonl").read_text().splitlines()]
    assert pyarrow.parquet.read_table(tmp_path / "out/c.parquet").to_pylist() == rows
    assert "Turm" in rows[0]["prompt"][0]["content"]
    assert "grass" not in rows[0]["prompt"][0]["content"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.jsonl",
        "b.jsonl",
        "c.parquet",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=pairs.csv", "name a .jsonl or .parquet"),
        ("lengths=[700,700]", "lengths=[700, 700]: give each one once"),
        ("depths=[0.5,0.5]", "depths=[0.5, 0.5]: give each one once"),
        ("lengths=[130]", "130 tokens cannot hold 9 keys"),
        ("rejected={refusal:0,near_miss:0,distractor:0}", "one above 0"),
        ("num_distractors=0 rejected={distractor:1}", "needs num_distractors above 0"),
        ("prompt=text", "prompt='text': choose chat, plain"),
        ("tokens_per_length=0", "tokens_per_length=0: must be at least 1"),
        ("depths=[2]", "each in [0, 1]"),
    ],
)
def test_bad_settings(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert ic("make-preferences", "output=x.jsonl", *override.split()) == 2
    assert message in capsys.readouterr().err


def test_evaluation_asks_as_the_pairs_do() -> None:
    grid = PasskeyGridConfig(tasks=["multi_key"], num_needles=8, prompt="chat", lengths=[800])
    prompt = build_prompt(ByteTokenizer(), grid, Cell("multi_key", 800, 0.5, "noise", 1), 0)
    text = ByteTokenizer().decode(prompt.ids)
    assert len(prompt.ids) == 800
    assert text.startswith("<|user|>")
    name = text.rpartition(" is<|end|><|assistant|>")[0].split()[-1]
    assert question_of(name) in text
    assert f" The pass key for {name} is {prompt.expected[0]}. " in text
    assert prompt.new_tokens == len("12345.") + 1
    assert len(set(answer_keys(text))) == 9
    assert int(prompt.expected[0]) in KEYS["test"]
    assert np.array_equal(
        prompt.ids,
        build_prompt(ByteTokenizer(), grid, Cell("multi_key", 800, 0.5, "noise", 1), 0).ids,
    )
    assert settings_hash(PasskeySuite(grid)) != settings_hash(
        PasskeySuite(PasskeyGridConfig(num_needles=8))
    )
    with pytest.raises(ValueError, match="asks multi_key"):
        PasskeyGridConfig(prompt="chat")
