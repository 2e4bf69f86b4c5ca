"""What a parity report leaves, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ic.conversion.parity import answers, pair, texts
from ic.conversion.parity.pair import open_pair
from ic.conversion.parity.report import _per_cent_more
from ic.conversion.parity.run import measure_parity
from ic.files.run_folder import ParityFolder
from tests.checkpoint.gguf_files import byte_level_bpe
from tests.conversion.parity import models
from tests.conversion.parity.models import options

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def given(folders: dict[str, Path], *, text: bool = True, **changes: Any) -> list[str]:
    """The command line of a small report of the two models."""
    said = {"original": folders["llama"], "converted": folders["mla"], "output": "out"}
    said |= {"accelerator": "cpu", "lengths": "[256]", "documents": 2, "speed_tokens": "[64]"}
    said |= {"retrieval_lengths": "[1024]", "document_unit": "paragraph", **changes}
    if text:
        said["text"] = f"[{folders['text']}]"
    return [f"{name}={value}" for name, value in said.items()]


def test_the_verb_leaves_a_page_rows_and_a_picture(
    ic: Run, capsys: Capture, folders: dict[str, Path], figures: list[Figure], tmp_path: Path
) -> None:
    assert (
        ic("parity", *given(folders, parts="[logits,cache,instructions,speed]", instructions=2))
        == 0
    )
    printed = capsys.readouterr().out
    assert "logits: 510 tokens" in printed
    assert "about 0:00:0" in printed  # the time left
    assert "report: out/report.md" in printed
    results = json.loads((tmp_path / "out/parity.json").read_text())
    assert {"command", "commit", "date", "device", "versions", "config"} <= results.keys()
    assert results["parts"] == ["logits", "cache", "instructions", "speed"]
    shape = results["models"]["converted"]["shape"]
    assert (shape["kv_lora_rank"], shape["qk_rope_head_dim"]) == (models.RANK, models.ROPE)
    page = (tmp_path / "out/report.md").read_text()
    assert results["shown"]["heads"] == ["", "original", "converted", "difference", "n"]
    for line in results["shown"]["lines"]:
        assert f"| {' | '.join(line)} |" in page
    whole = next(row for row in results["rows"] if row["what"] == "logits")
    assert f"| perplexity at 256 | {whole['perplexity_original']:.4g} |" in page
    assert "| cache of 128k tokens | 32 MiB | 16 MiB | x 0.5 |" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    for head in ("## Logits and perplexity", "## Cache", "## Instructions", "## Speed"):
        assert head in page
    assert "![perplexity, KL and cache](parity.png)" in page
    assert (tmp_path / "out/parity.png").stat().st_size > 10_000
    (figure,) = figures
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:2] == [
        "perplexity by length, and its paired change",
        "KL(original || converted) by position",
    ]
    assert titles[2] == "cache by allocation, ratio 0.5"


def test_lengths_beyond_the_originals_positions_are_the_converted_models(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The Llama has 2,048 positions, ours 4,096."""
    config = options(
        folders,
        "llama",
        "mla",
        output=str(tmp_path),
        parts=["logits", "passkey", "speed"],
        lengths=[512, 3000],
        documents=2,
        retrieval_lengths=[512, 3000],
        speed_tokens=[64, 3000],
        speed_repeats=1,
    )
    rows = measure_parity(config)["rows"]
    long = [row for row in rows if row["what"] == "logits" and row["length_tokens"] == 3000]
    assert {row["kl"] for row in long} == {row["perplexity_original"] for row in long} == {None}
    assert all(row["perplexity_converted"] > 1 for row in long)
    found = {(row["model"], row["length_tokens"]) for row in rows if row["what"] == "passkey"}
    assert found == {("original", 512), ("converted", 512), ("converted", 3000)}
    assert [row["n"] for row in rows if row["what"] == "comparison"] == [5]
    speed = next(row for row in rows if row["what"] == "speed" and row["cache_tokens"] == 3000)
    assert speed["decode_tokens_per_s_original"] is speed["decode_ratio"] is None
    assert speed["decode_tokens_per_s_converted"] > 0
    assert "| perplexity at 3,000 | - |" in (tmp_path / "report.md").read_text()


def test_an_interrupted_report_goes_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ["logits", "instructions"]
    config = options(folders, "llama", "mla", output=str(tmp_path / "out"), parts=parts)
    whole = measure_parity(
        options(folders, "llama", "mla", output=str(tmp_path / "w"), parts=parts)
    )
    calls = {"texts": 0, "answers": 0}

    def killed_at(module: Any, name: str, call: int) -> None:
        measure = module.token_distances

        def stop(*args: Any, **named: Any) -> Any:
            calls[name] += 1
            if calls[name] == call:
                raise KeyboardInterrupt
            return measure(*args, **named)

        monkeypatch.setattr(module, "token_distances", stop)

    killed_at(texts, "texts", 2)
    killed_at(answers, "answers", 2)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure_parity(config)
    assert not (tmp_path / "out/report.md").exists()
    again = measure_parity(config)
    # Three documents and three instructions, of which one each was interrupted.
    assert calls == {"texts": 4, "answers": 4}
    assert again["rows"] == whole["rows"]
    measure_parity(config)
    assert calls == {"texts": 4, "answers": 4}
    assert len((tmp_path / "out/answers.jsonl").read_text().splitlines()) == 3


def test_a_folder_of_other_models_or_files_is_refused(
    ic: Run, capsys: Capture, folders: dict[str, Path], tmp_path: Path
) -> None:
    parts = {"parts": "[cache]", "context_tokens": "[512]"}
    assert ic("parity", *given(folders, text=False, **parts)) == 0
    before = (tmp_path / "out/parity.json").read_bytes()
    capsys.readouterr()
    other = {**folders, "llama": folders["damaged"]}
    assert ic("parity", *given(other, text=False, **parts)) == 2
    assert (
        "output=out: holds the report of another original model (llama" in capsys.readouterr().err
    )
    assert (tmp_path / "out/parity.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/novel.txt").write_text("Once")
    assert ic("parity", *given(folders, text=False, **{**parts, "output": "mine"})) == 2
    assert "output=mine: holds other files than a parity report's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": False}, "text=[]: name long texts"),
        ({"parts": "[logit]"}, "parts='logit': did you mean logits?"),
        ({"parts": "[cache,cache]"}, "parts=['cache', 'cache']: give each one once"),
        ({"lengths": "[64]"}, "lengths=[64]: one or more, each from 128 on"),
        ({"lengths": "[256,5000]"}, "lengths=[256, 5000]: the converted model has 4,096 positions"),
        ({"lengths": "[3000]"}, "lengths=[3000]: the original has 2,048 positions"),
        ({"speed_tokens": "[4090]"}, "and 16 decode_tokens; choose shorter lengths"),
        ({"retrieval_lengths": "[8192]"}, "retrieval_lengths=[8192]: the converted model has"),
        ({"retrieval_samples": 7}, "retrieval_samples=7: must be a multiple of 5"),
        ({"niah_tasks": "[own]"}, "niah_tasks=['own']: one or more of own_words"),
        ({"instructions": 51}, "instructions=51: must be from 1 to 50"),
        ({"answer_tokens": 2000}, "answer_tokens=2000: an instruction has up to"),
        ({"documents": 9}, "lengths=[256]: 3 of 3 documents have 256 tokens, but 9"),
        ({"documents": 9}, "set documents_by_length={256:3}"),
        ({"dtype": "int8"}, "dtype='int8': choose one of"),
        ({"original": "nowhere"}, "no checkpoint folder nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_weights_are_loaded(
    ic: Run,
    capsys: Capture,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(pair.OpenedPair, "load", lambda *_: pytest.fail("weights were loaded"))
    assert ic("parity", *given(folders, **changes)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1 + error.count("loading ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{"lengths": "[256,5000]"}, {"speed_tokens": "[4090]"}, {"retrieval_lengths": "[8192]"}],
)
def test_lengths_are_refused_before_models_are_opened(
    ic: Run,
    capsys: Capture,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    """To open a GGUF file takes seconds, in which its tokenizer is rebuilt."""
    monkeypatch.setattr(pair, "open_source", lambda *_: pytest.fail("a model was opened"))
    assert ic("parity", *given(folders, **changes)) == 2
    assert "the converted model has 4,096 positions" in capsys.readouterr().err


def test_other_tokenizers_are_refused(
    ic: Run, capsys: Capture, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders["mla"], other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    assert ic("parity", *given({**folders, "mla": other}, parts="[logits]")) == 2
    error = capsys.readouterr().err
    assert "have other tokenizers" in error
    assert "the first that differs is 'zebra'" in error


def test_tokenizers_that_read_in_other_ways_are_refused(
    ic: Run, capsys: Capture, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same vocabulary, but one of them reads capitals as small letters."""
    asked = {**folders}
    for name in ("llama", "mla"):
        asked[name] = shutil.copytree(folders[name], tmp_path / name)
        for file in asked[name].glob("*token*"):
            file.unlink()
        (asked[name] / "byte_vocab.json").unlink()
        bpe = byte_level_bpe()
        bpe.normalizer = Lowercase() if name == "mla" else None
        PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(asked[name])
    assert ic("parity", *given(asked, parts="[logits]")) == 2
    error = capsys.readouterr().err
    assert "have the same vocabulary, but their tokenizers read a text in other ways" in error
    assert "token 0 of it is" in error


def test_instructions_need_a_chat_template(
    ic: Run, capsys: Capture, folders: dict[str, Path], tmp_path: Path
) -> None:
    silent = {}
    for name in ("llama", "mla"):
        silent[name] = shutil.copytree(folders[name], tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(silent[name])
        tokenizer.chat_template = ""
        tokenizer.save_pretrained(silent[name])
    asked = {**folders, **silent}
    assert ic("parity", *given(asked, parts="[instructions]")) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    folder = tmp_path / "out"
    opened = open_pair(options(asked, "llama", "mla", output=str(folder)), ParityFolder(folder))
    assert opened.parts == ("logits", "weights", "cache", "passkey", "niah", "speed")
    (note,) = opened.notes
    assert note == "Instructions: the tokenizer has no chat template to ask instructions with."


@pytest.mark.parametrize(
    ("ratios", "shown"),
    [
        ((2.403, 2.11, 2.73), "+140 % [+111 to +173]"),
        ((1.0234, 1.0194, 1.0271), "+2.34 % [+1.9 to +2.7]"),
        ((0.912, None, None), "-8.8 %"),
        ((15.0, 9.0, 31.0), "+1,400 % [+800 to +3,000]"),
    ],
)
def test_a_change_of_the_perplexity_has_no_power_of_ten(
    ratios: tuple[float | None, ...], shown: str
) -> None:
    names = ("ratio", "ratio_low_95", "ratio_high_95")
    assert _per_cent_more(dict(zip(names, ratios, strict=True))) == shown
