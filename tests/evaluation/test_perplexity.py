"""Perplexity by position: whose losses they are, which documents, which intervals, what is shown."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ic.evaluation.comparison.answers import find_answers
from ic.evaluation.comparison.compare import compare
from ic.evaluation.perplexity.grid import Config, windows
from ic.evaluation.perplexity.suite import PerplexitySuite
from ic.evaluation.runner import run_suite
from ic.evaluation.statistics import mean_interval
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.deepseek import deepseek_twin
from tests.evaluation.small_bpe import small_bpe

TOKENIZER = ByteTokenizer()
Run = Callable[..., int]


def text(length: int, seed: int) -> str:
    letters = np.random.default_rng(seed).choice(list("etaoin shrdlu"), length)
    return "".join(letters)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Seven documents of 100, 200 ... 700 letters, in a folder of two compressed files."""
    folder = tmp_path / "books"
    folder.mkdir()
    for name, lengths in (("a.jsonl.xz", (100, 200, 300)), ("b.jsonl.xz", (400, 500, 600, 700))):
        lines = [json.dumps({"text": text(length, length)}) for length in lengths]
        (folder / name).write_bytes(lzma.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture
def options(books: Path) -> Config:
    return Config(
        files=[str(books)],
        lengths=[256],
        samples=3,
        window_tokens=64,
        stride_tokens=24,
        bucket_tokens=32,
        prefill_chunk_tokens=100,
        tokens_per_batch=512,
    )


class Theirs:
    """transformers' own loss as a decoder: whole sequences, no cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def losses(self, ids_BT: Tensor) -> Tensor:
        logits = self.model(ids_BT).logits[:, :-1].transpose(1, 2).float()
        return torch.nn.functional.cross_entropy(logits, ids_BT[:, 1:], reduction="none")

    def targets(self, ids_BT: Tensor, start: int) -> tuple[Tensor, None]:
        return self.losses(ids_BT)[:, start - 1 :], None


def whole(suite: PerplexitySuite, rows: list, task: str) -> dict:
    (row,) = (row for row in suite.rows(rows) if row["position"] == "all" and row["task"] == task)
    return row


def test_full_is_the_loss_of_transformers(
    make_model: Callable[..., MLAForCausalLM], options: Config, tmp_path: Path
) -> None:
    """Ours, in pieces over a cache, against DeepSeek-V3 with the same weights, whole."""
    model = make_model(vocab_size=320)
    suite = PerplexitySuite(replace(options, tasks=["full"]))
    rows = run_suite(model, TOKENIZER, suite, tmp_path / "cells.jsonl")
    twin = deepseek_twin(model)
    documents = suite.documents.of_length(TOKENIZER, 256)
    ids = [torch.from_numpy(each.ids_T.astype(np.int64))[None] for each in documents]
    with torch.no_grad():
        theirs = [twin(each, labels=each).loss.item() for each in ids]
    row = whole(suite, rows, "full")
    assert row["nll"] == pytest.approx(sum(theirs) / 3, rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(sum(theirs) / 3), rel=1e-5)
    # A byte a token: bits per byte are the nats of 255 tokens over the bytes behind the first.
    assert row["bits_per_byte"] == pytest.approx(sum(theirs) / 3 / math.log(2), rel=1e-5)
    assert (row["n"], row["n_tokens"]) == (3, 3 * 255)
    low, high = stats.t.interval(0.95, 2, np.mean(theirs), stats.sem(theirs))
    assert (row["nll_low_95"], row["nll_high_95"]) == pytest.approx((low, high), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(64, 24), (64, 63), (256, 100), (100, 1)])
def test_sliding_is_the_recipe_of_transformers(options: Config, window: int, stride: int) -> None:
    """The loop of huggingface.co/docs/transformers/perplexity, with their loss of each window."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_attention_heads=2, **sizes)).eval()
    llama.model.embed_tokens.weight.data *= 40  # losses far from those of a uniform guess
    llama.lm_head.weight.data *= 40
    suite = PerplexitySuite(replace(options, window_tokens=window, stride_tokens=stride))
    (cell,) = (cell for cell in suite.cells() if cell.task == "sliding")
    sample = suite.sample(TOKENIZER, cell, 1)
    (score,) = suite.answer(Theirs(llama), TOKENIZER, [sample])

    nats, counted, before = 0.0, 0, 0
    for first in range(0, 256, stride):
        end = min(first + window, 256)
        ids = torch.from_numpy(sample.ids[first:end])[None]
        labels = ids.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = llama(ids, labels=labels).loss.item()
        tokens = int((labels[:, 1:] != -100).sum())
        nats, counted, before = nats + loss * tokens, counted + tokens, end
        if end == 256:
            break
    assert counted == 255
    assert sum(score.measured["nats"]) == pytest.approx(nats, rel=1e-5)
    assert nats / 255 > 2 * math.log(320)
    assert (score.correct, score.measured["window_tokens"]) == (None, window)


def test_windows_by_hand() -> None:
    assert windows(10, 4, 3) == [(0, 4, 4), (3, 7, 3), (6, 10, 3)]
    assert windows(9, 4, 2) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 9, 1)]
    assert windows(4, 4, 1) == [(0, 4, 4)]


class Counting:
    """The loss of a token is its position in what the decoder was given, in thousandths."""

    def losses(self, ids_BT: Tensor) -> Tensor:
        return torch.arange(1, ids_BT.shape[1]).expand(len(ids_BT), -1) / 1000

    def targets(self, ids_BT: Tensor, start: int) -> tuple[Tensor, None]:
        return self.losses(ids_BT)[:, start - 1 :], None


def test_buckets_by_hand(options: Config) -> None:
    suite = PerplexitySuite(replace(options, lengths=[200], window_tokens=128, stride_tokens=64))
    full, sliding = (suite.sample(TOKENIZER, cell, 0) for cell in suite.cells())
    (score,) = suite.answer(Counting(), TOKENIZER, [full])
    assert score.measured["edges"] == [1, 32, 64, 128, 200]
    assert score.measured["bytes"] == [31, 32, 64, 72]
    sums = [sum(range(a, b)) / 1000 for a, b in ((1, 32), (32, 64), (64, 128), (128, 200))]
    assert score.measured["nats"] == pytest.approx(sums, rel=1e-6)
    (score,) = suite.answer(Counting(), TOKENIZER, [sliding])
    # Windows 0-127, 64-191 and 128-199: in the second count its places 64 to 127, in the last
    # one 64 to 71.
    last = (sum(range(64, 128)) + sum(range(64, 72))) / 1000
    assert score.measured["nats"] == pytest.approx([*sums[:3], last], rel=1e-6)

    fixed = replace(options, buckets="fixed", bucket_tokens=100)
    assert fixed.edges(256) == [1, 100, 200, 256]
    assert replace(options, bucket_tokens=1).edges(9) == [1, 2, 4, 8, 9]


def test_documents_that_are_long_enough(options: Config) -> None:
    """Five documents have 256 letters; which three are read depends on the seed, not on the files."""

    def drawn(options: Config) -> list[str]:
        found = PerplexitySuite(options).documents.of_length(TOKENIZER, 256)
        assert {len(document) for document in found} == {256}
        return [bytes(document.ids_T.tolist()).decode() for document in found]

    beginnings = {text(length, length)[:256] for length in (300, 400, 500, 600, 700)}
    assert set(drawn(replace(options, samples=5))) == beginnings
    assert drawn(options) == drawn(replace(options, samples=5))[:3]
    seeds = {tuple(drawn(replace(options, seed=seed))) for seed in range(6)}
    assert len(seeds) > 2
    (folder,) = options.files
    reversed_files = [f"{folder}/b.jsonl.xz", f"{folder}/a.jsonl.xz"]
    assert drawn(replace(options, files=reversed_files)) == drawn(options)


def test_a_document_begins_with_the_tokenizers_own_token(books: Path) -> None:
    suite = PerplexitySuite(
        Config(files=[str(books)], lengths=[128], samples=2, window_tokens=64, stride_tokens=32)
    )
    tokenizer = small_bpe()
    for document in suite.documents.of_length(tokenizer, 128):
        assert len(document) == 128
        assert document.ids_T[0] == tokenizer.bos_token_id
        assert document.bytes_T[0] == 0
        read = tokenizer.decode(document.ids_T[1:])
        assert document.bytes_T.sum() == len(read.encode())


def test_settings_tell_texts_and_windows_apart(options: Config, books: Path) -> None:
    before = PerplexitySuite(options).settings()
    assert PerplexitySuite(replace(options, files=[f"{books}/*.xz"])).settings() == before
    assert PerplexitySuite(replace(options, window_tokens=65)).settings() != before
    (books / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "other"}'))
    assert PerplexitySuite(options).settings() != before


def test_one_document_has_no_interval(options: Config, tmp_path: Path) -> None:
    assert mean_interval([3.0]) is None
    suite = PerplexitySuite(replace(options, samples=1))
    cells = [
        {"task": cell.task, "length_tokens": 256, "n": 1, "answers": [{"measured": score.measured}]}
        for cell in suite.cells()
        for score in suite.answer(Counting(), TOKENIZER, [suite.sample(TOKENIZER, cell, 0)])
    ]
    assert {row["nll_low_95"] for row in suite.rows(cells)} == {None}
    suite.draw(cells, tmp_path / "x.png", title="x")
    assert suite.progress_text(cells[0]) == "perplexity 1.137 of 1 document"


def test_command(
    ic: Run,
    make_model: Callable[..., MLAForCausalLM],
    options: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figures: list[Figure],
) -> None:
    make_model(vocab_size=320).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    files = f"suite.perplexity.files={options.files}"
    sizes = [
        f"suite.perplexity.{name}"
        for name in (
            "lengths=[256]",
            "samples=3",
            "bucket_tokens=64",
            "window_tokens=64",
            "stride_tokens=32",
        )
    ]
    asked = (
        "evaluate",
        "checkpoint=model",
        "suite=perplexity",
        files,
        "accelerator=cpu",
        "output=out",
        "trained_length=200",
    )
    assert ic(*asked, *sizes) == 0
    said = capsys.readouterr().out
    assert "perplexity sliding 256 tokens: perplexity " in said
    assert " of 3 documents in " in said
    assert "0/3" not in said
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [(row["task"], row["position"], row["from_token"], row["to_token"]) for row in rows] == [
        (task, position, first, end)
        for task in ("full", "sliding")
        for position, first, end in (
            ("bucket", 1, 64),
            ("bucket", 64, 128),
            ("bucket", 128, 256),
            ("all", 1, 256),
        )
    ]
    # Within the first window both are the same.
    assert rows[0]["nll"] == pytest.approx(rows[4]["nll"], rel=1e-5)
    assert rows[2]["nll"] != pytest.approx(rows[6]["nll"], rel=1e-5)
    axis = figures[-1].axes[0]
    curves = {line.get_label(): line for line in axis.get_lines()}
    assert curves["full"].get_ydata().tolist() == [row["perplexity"] for row in rows[:3]]
    assert curves["sliding 64"].get_ydata().tolist() == [row["perplexity"] for row in rows[4:7]]
    (legend,) = figures[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == ["full", "sliding 64"]
    assert legend.get_window_extent().x0 > axis.get_window_extent().x1  # covers no curve
    assert (axis.get_xscale(), axis.get_title(loc="right")) == ("log", "trained to 200 tokens")
    assert [line.get_xdata() for line in axis.get_lines() if line.get_linestyle() == ":"] == [
        [200, 200]
    ]


def test_answers_are_read_without_the_texts(
    options: Config, make_model: Callable[..., MLAForCausalLM], tmp_path: Path
) -> None:
    """`compare` builds a suite with no options; it finds losses here, and no scores."""
    for seed, name in ((0, "a"), (1, "b")):
        model = make_model(vocab_size=320, rms_norm_eps=1e-6 * (1 + seed))
        folder = tmp_path / name / "perplexity"
        run_suite(model, TOKENIZER, PerplexitySuite(options), folder / "samples.jsonl")
    comparison = compare(find_answers(tmp_path / "a"), find_answers(tmp_path / "b"))
    assert comparison.groups == []
    compared = [(curve.task, curve.length_tokens, curve.whole.n) for curve in comparison.curves]
    assert compared == [("full", 256, 3), ("sliding 64", 256, 3)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"files": []}, r"suite\.perplexity\.files is empty: name long texts"),
        ({"files": ["nowhere.txt"]}, r"suite\.perplexity\.files: there is no file 'nowhere\.txt'"),
        ({"lengths": [1024]}, r"none of 7 documents has 1,024 tokens; the longest has 700"),
        ({"lengths": [512]}, r"2 of 7 documents have 512 tokens, but 3 samples .*\{512:2\}"),
        ({"window_tokens": 300}, r"window_tokens=300: larger than the length 256"),
        ({"stride_tokens": 64}, r"stride_tokens=64: must be below window_tokens=64"),
        ({"prompt": "chat"}, r"suite\.perplexity\.prompt=chat: documents are read as they are"),
        ({"tasks": ["half"]}, r"suite\.perplexity\.tasks=\['half'\]: one or both of full, sliding"),
        ({"lengths": [8192], "buckets": "fixed", "bucket_tokens": 1}, r"set it to at least 8"),
        (
            {"text_column": "body"},
            r'no "body"; the keys are text; .*suite\.perplexity\.text_column',
        ),
    ],
)
def test_what_cannot_be_measured(options: Config, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PerplexitySuite(replace(options, **given)).check(TOKENIZER, 10**6)


def test_a_model_that_is_too_short(options: Config) -> None:
    with pytest.raises(ValueError, match=r"lengths=\[256\]: the model has 255 positions"):
        PerplexitySuite(options).check(TOKENIZER, 255)
    sliding = replace(options, tasks=["sliding"])
    PerplexitySuite(sliding).check(TOKENIZER, 64)
    with pytest.raises(ValueError, match=r"window_tokens=64: the model has 63 positions"):
        PerplexitySuite(sliding).check(TOKENIZER, 63)


def test_files_without_text(tmp_path: Path, options: Config) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty; remove it"):
        PerplexitySuite(replace(options, files=[str(tmp_path / "empty.txt")]))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no document with any text"):
        PerplexitySuite(replace(options, files=[str(tmp_path / "blank.jsonl")])).check(
            TOKENIZER, 999
        )
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="no text in the folder .*pictures"):
        PerplexitySuite(replace(options, files=[str(tmp_path / "pictures")]))


def test_decoder_gives_what_the_suite_needs(
    make_model: Callable[..., MLAForCausalLM], options: Config
) -> None:
    """Pieces and batches change nothing."""
    model = make_model(vocab_size=320)
    suite = PerplexitySuite(options)
    for cell in suite.cells():
        samples = [suite.sample(TOKENIZER, cell, index) for index in range(3)]
        together = suite.answer(GreedyDecoder(model, 37), TOKENIZER, samples)
        for sample, score in zip(samples, together, strict=True):
            (alone,) = suite.answer(GreedyDecoder(model, 1000), TOKENIZER, [sample])
            np.testing.assert_allclose(score.measured["nats"], alone.measured["nats"], rtol=1e-4)
