"""The runner with a suite of its own: no passkey is needed to evaluate, to continue, to share."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from torch.utils.data import DataLoader

from ic.callbacks.evaluation import SuiteEvaluation
from ic.callbacks.options import PasskeyEvaluationOptions
from ic.evaluation.answered import IDENTITY, cells_of, merge_rank_files, read_samples, sample_key
from ic.evaluation.registry import build_suite, suite_names
from ic.evaluation.report import write_report
from ic.evaluation.runner import run_suite
from ic.evaluation.shares import batch_of_tokens, share_of_samples
from ic.evaluation.statistics import wilson_interval
from ic.files.json_lines import rank_file, read_rows, write_rows
from ic.files.run_folder import SuiteFolder
from ic.inference.greedy import GreedyDecoder, StoppedError
from ic.inference.model_facts import end_tokens
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SHORT
from tests.evaluation.copy_word.grid import Cell, Config
from tests.evaluation.copy_word.suite import CopyWord
from tests.evaluation.oracle import Copier
from tests.evaluation.test_share_haystack import ThreadRanks

TOKENIZER = ByteTokenizer()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copier(make_model) -> Copier:
    return Copier(make_model(vocab_size=320).config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Prompts and tokens of each batch that the decoder answers."""
    seen: list[tuple[int, int]] = []
    answers = GreedyDecoder.answers

    def counted(self: GreedyDecoder, ids_BT: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(ids_BT.shape))
        return answers(self, ids_BT, *others)

    monkeypatch.setattr(GreedyDecoder, "answers", counted)
    return seen


def test_rows_say_what_was_answered(copier: Copier, calls: list, tmp_path: Path) -> None:
    rows = run_suite(copier, TOKENIZER, CopyWord(Config()), tmp_path / "samples.jsonl")
    # Three of four letters are right, and both of two.
    assert [(row["letters"], row["length_tokens"], row["n"], row["correct"]) for row in rows] == [
        (2, 32, 3, 3),
        (4, 32, 3, 2.25),
        (2, 64, 3, 3),
        (4, 64, 3, 2.25),
    ]
    for answer in rows[1]["answers"]:
        word = answer["expected"]
        assert answer == {"expected": word, "text": f"{word[:2]}?{word[3]}", "correct": 0.75}
    # 128 tokens at once: three prompts of 32, two of 64 and then one.
    assert calls == [(3, 32)] * 2 + [(2, 64), (1, 64)] * 2
    lines = read_rows(tmp_path / "samples.jsonl")
    assert [(line["letters"], line["length_tokens"], line["index"]) for line in lines] == [
        (letters, length, index) for length in (32, 64) for letters in (2, 4) for index in range(3)
    ]
    assert lines[4] == {
        **{name: rows[1][name] for name in (*IDENTITY, "letters", "length_tokens")},
        "samples": 3,
        "index": 1,
        **rows[1]["answers"][1],
        "seconds": lines[4]["seconds"],
    }
    assert cells_of(lines) == rows
    assert rows[1]["seconds"] == pytest.approx(
        sum(line["seconds"] for line in lines[3:6]), abs=1e-3
    )


def test_another_tokenizer_asks_other_samples(copier: Copier, calls: list, tmp_path: Path) -> None:
    """The same weights and settings: so many tokens are another text."""
    file, suite = tmp_path / "samples.jsonl", CopyWord(Config())
    for times in (1, 1):  # the second time nothing is left to answer
        run_suite(copier, TOKENIZER, suite, file)
        assert len(read_rows(file)) == 12 * times
    first = list(calls)
    other = ByteTokenizer()
    other._bytes = {**other._bytes, "A": 66, "B": 65}
    run_suite(copier, other, suite, file)
    assert calls == first * 2
    assert len(read_samples(tmp_path)) == 24
    # A mark of a chat template changes no text. Lines of an earlier version say no tokenizer.
    marked = ByteTokenizer(extra_special_tokens=["<|x|>"])
    rows = [{n: v for n, v in row.items() if n != "tokenizer"} for row in read_rows(file)[:12]]
    write_rows(file, rows)
    run_suite(copier, marked, suite, file)
    assert calls == first * 2


def test_other_end_tokens_ask_again(copier: Copier, calls: list, tmp_path: Path) -> None:
    """The same weights, which stop elsewhere by another generation configuration."""
    file, suite = tmp_path / "samples.jsonl", CopyWord(Config())
    run_suite(copier, TOKENIZER, suite, file)
    first = list(calls)
    assert end_tokens(copier, TOKENIZER) == [257, 2]
    copier.generation_config.eos_token_id = [TOKENIZER.eos_token_id, ord("B")]
    run_suite(copier, TOKENIZER, suite, file)
    assert calls == first * 2
    assert {row["ends"] for row in read_rows(file)} == {"2,257", "66,257"}
    # Lines of an earlier version do not say what ended them: they count for either.
    write_rows(file, [{n: v for n, v in r.items() if n != "ends"} for r in read_rows(file)[:12]])
    run_suite(copier, TOKENIZER, suite, file)
    assert calls == first * 2


def test_report_has_intervals(copier: Copier, tmp_path: Path) -> None:
    suite, folder = CopyWord(Config()), SuiteFolder(tmp_path)
    cells = run_suite(copier, TOKENIZER, suite, folder.samples)
    low, high = wilson_interval(5.25, 6)
    assert suite.rows(cells)[0] == {
        "what": "copy_word",
        "length_tokens": 32,
        "n": 6,
        "correct": 5.25,
        "accuracy": 0.875,
        "low_95": low,
        "high_95": high,
    }
    assert write_report(suite, cells, folder, title="t") == tmp_path / "words.png"
    assert imread(tmp_path / "words.png").std() > 0.05  # bars on white
    (short, long) = csv.DictReader((tmp_path / "words.csv").open())
    assert short == {
        "length_tokens": "32",
        "n": "6",
        "correct": "5.25",
        "accuracy": "0.8750",
        "low_95": f"{low:.4f}",
        "high_95": f"{high:.4f}",
    }
    assert long["length_tokens"] == "64"


def test_continues_within_a_cell(copier: Copier, calls: list, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    whole = run_suite(copier, TOKENIZER, CopyWord(Config()), tmp_path / "whole.jsonl")
    calls.clear()

    def stop_at_64(cell: Cell, row: dict, before: bool) -> None:
        if cell.length_tokens == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(copier, TOKENIZER, CopyWord(Config()), file, stop_at_64)
    assert calls == [(3, 32), (3, 32), (2, 64)]
    before = file.read_text()
    assert len(before.splitlines()) == 8
    # A kill while the last line was written: its sample alone is answered again.
    file.write_text(before[:-20])
    calls.clear()
    seen: list[bool] = []
    rows = run_suite(
        copier, TOKENIZER, CopyWord(Config()), file, lambda cell, row, before: seen.append(before)
    )
    assert seen == [True] * 7 + [False] * 5
    assert calls == [(1, 64), (1, 64), (2, 64), (1, 64)]
    assert file.read_text().splitlines()[:7] == before.splitlines()[:7]
    assert len(read_rows(file)) == 12
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in whole]
    calls.clear()
    run_suite(copier, TOKENIZER, CopyWord(Config(letters=[4])), file)
    assert calls == []  # cells of a larger suite serve a smaller one
    run_suite(copier, TOKENIZER, CopyWord(Config(seed=7)), file)
    assert len(calls) == 6  # other words
    assert len(read_rows(file)) == 24


def test_goes_on_from_the_cells_of_an_earlier_version(
    copier: Copier, calls: list, tmp_path: Path
) -> None:
    suite = CopyWord(Config())
    rows = run_suite(copier, TOKENIZER, suite, tmp_path / "samples.jsonl")
    write_rows(tmp_path / "earlier/cells.jsonl", rows[:3])
    calls.clear()
    continued = run_suite(copier, TOKENIZER, suite, tmp_path / "earlier/samples.jsonl")
    assert calls == [(2, 64), (1, 64)]
    assert continued[:3] == rows[:3]
    assert len(read_rows(tmp_path / "earlier/samples.jsonl")) == 3
    both = read_samples(tmp_path / "earlier")
    assert [row["index"] for row in both] == [0, 1, 2] * 4
    assert [sample_key(row) for row in both] == [sample_key(row) for row in read_samples(tmp_path)]
    assert cells_of(read_samples(tmp_path / "earlier/cells.jsonl")) == rows[:3]
    published = ROOT / "docs/results/infinitecontext_1b-sft-distractors-cells.jsonl"
    assert cells_of(read_samples(published)) == read_rows(published)


def test_refuses_lines_that_are_no_samples(tmp_path: Path) -> None:
    write_rows(tmp_path / "guardrails.jsonl", [{"step": 3, "what": "skipped"}])
    with pytest.raises(ValueError, match=r"guardrails.jsonl, line 1: neither a sample nor a cell"):
        read_samples(tmp_path / "guardrails.jsonl")


def test_ranks_share_the_cells(copier: Copier, calls: list, tmp_path: Path) -> None:
    suite = CopyWord(Config())
    alone = run_suite(copier, TOKENIZER, suite, tmp_path / "alone.jsonl")
    missing = {cell: list(range(cell.samples)) for cell in suite.cells()}
    size = batch_of_tokens(suite.tokens_per_batch)
    shares = [share_of_samples(suite, missing, rank, 2, size) for rank in range(2)]
    # Prompts of 64 tokens go in batches of two, which are shared; a batch of 32 stays whole.
    assert [
        [(cell.length_tokens, indices) for part in share for cell, indices in part.items()]
        for share in shares
    ] == [[(32, [0, 1, 2]), (64, [0, 1]), (64, [2])], [(32, [0, 1, 2]), (64, [2]), (64, [0, 1])]]
    calls.clear()
    file = tmp_path / "samples.jsonl"
    copiers = [Copier(copier.config) for _ in range(2)]
    for other in copiers:
        other.load_state_dict(copier.state_dict())
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(
            lambda rank: run_suite(copiers[rank], TOKENIZER, suite, file, ranks=ThreadRanks(rank)),
            range(2),
        )
    assert len(calls) == 6
    assert first == second
    assert [{**row, "seconds": 0} for row in first] == [{**row, "seconds": 0} for row in alone]


def test_one_rank_that_is_stopped_stops_all_and_what_is_done_is_kept(
    copier: Copier, calls: list, tmp_path: Path
) -> None:
    suite, file = CopyWord(Config()), tmp_path / "samples.jsonl"
    copiers = [Copier(copier.config) for _ in range(2)]
    for other in copiers:
        other.load_state_dict(copier.state_dict())
    # Rank 1 is asked to stop once it has answered its first cell.
    stops = [lambda: False, lambda: rank_file(file, 1).is_file()]

    def run(rank: int) -> None:
        with pytest.raises(StoppedError):
            run_suite(
                copiers[rank], TOKENIZER, suite, file, ranks=ThreadRanks(rank), stop=stops[rank]
            )

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, range(2)))
    done = [(row["letters"], row["length_tokens"], row["index"]) for row in read_rows(file)]
    of_rank_0 = [(2, 32, 0), (2, 32, 1), (2, 32, 2), (2, 64, 0), (2, 64, 1), (4, 64, 2)]
    assert done == [*of_rank_0, (4, 32, 0), (4, 32, 1), (4, 32, 2)]
    assert not rank_file(file, 1).exists()
    calls.clear()
    rows = run_suite(copier, TOKENIZER, suite, file)
    assert calls == [(1, 64), (2, 64)]
    assert [row["n"] for row in rows] == [3] * 4


def test_refuses_before_it_computes(copier: Copier, calls: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4104 tokens, but the model has 4096"):
        run_suite(copier, TOKENIZER, CopyWord(Config(lengths=[4100])), tmp_path / "samples.jsonl")
    assert calls == []
    assert not list(tmp_path.iterdir())


class CopierModule(pl.LightningModule):
    """Trains one weight that its answers do not depend on."""

    def __init__(self, copier: Copier) -> None:
        super().__init__()
        self.model, self.tokenizer = copier, TOKENIZER

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model.lm_head.weight.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Metrics(pl.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


def test_fit_evaluates_any_suite(
    copier: Copier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    when = PasskeyEvaluationOptions(every_n_steps=2, cheap_lengths=[32, 64], cheap_samples=1)
    callback = SuiteEvaluation(when, [CopyWord(Config())])
    metrics = Metrics()
    trainer = pl.Trainer(
        max_steps=3,
        callbacks=[callback],
        logger=metrics,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    batch = {"input_ids": torch.zeros(1, 48, dtype=torch.long)}
    trainer.fit(CopierModule(copier), DataLoader([batch] * 3, batch_size=None))
    folder = tmp_path / "copy_word"
    assert {path.name for path in folder.iterdir()} == {
        "samples-step=2.jsonl",  # of the lengths that a batch of 48 tokens reaches
        "samples.jsonl",
        "words.csv",
        "words.png",
    }
    cheap, full = read_rows(folder / "samples-step=2.jsonl"), read_rows(folder / "samples.jsonl")
    assert [(row["letters"], row["length_tokens"], row["index"]) for row in cheap] == [
        (2, 32, 0),
        (4, 32, 0),
    ]
    assert len(full) == 12
    assert cheap[0]["settings"] != full[0]["settings"]
    assert metrics.logged == [
        (1, {"copy_word/32": 0.875}),  # with the other metrics of the second step
        (3, {"copy_word/32": 0.875, "copy_word/64": 0.875}),
    ]
    assert [row["length_tokens"] for row in callback.rows] == [32, 64]
    assert callback.rows[0]["low_95"] == wilson_interval(5.25, 6)[0]
    assert f"words: {folder / 'words.png'}" in capsys.readouterr().out


def test_suites_are_found_by_their_folders() -> None:
    assert {"judge", "passkey", "perplexity"} <= set(suite_names())
    assert build_suite("passkey").name == "passkey"
    with pytest.raises(ValueError, match="unknown suite 'passkeys'; did you mean passkey"):
        build_suite("passkeys")


@pytest.mark.slow
def test_a_suite_is_a_folder_and_a_yaml(ic: Callable[..., int], tmp_path: Path) -> None:
    """On a copy of the checkout: nothing else is touched to add one."""
    assert ic(*SHORT, "trainer.max_steps=1", "callbacks.passkey=null") == 0
    for name in ("ic", "conf", "callbacks", "datamodules", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    (tmp_path / "ic/evaluation/copy_word").mkdir()
    for name in ("grid.py", "suite.py"):
        text = (ROOT / "tests/evaluation/copy_word" / name).read_text()
        text = text.replace("tests.evaluation.copy_word", "ic.evaluation.copy_word")
        (tmp_path / "ic/evaluation/copy_word" / name).write_text(text)
    (tmp_path / "conf/suite/copy_word.yaml").write_text(
        "# @package suite.copy_word\ndefaults:\n  - copy_word_schema\n  - _self_\n\nsamples: 2\n"
    )
    command = [
        *("evaluate", "run=runs/debug/default", "accelerator=cpu", "suite=[copy_word,passkey]"),
        *("suite.copy_word.lengths=[32]", "evaluation.lengths=[256]", "evaluation.depths=[0.5]"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ic", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = tmp_path / "runs/debug/default/evaluate/step=1"
    cells = cells_of(read_samples(written / "copy_word"))
    assert [(row["letters"], row["length_tokens"], row["n"]) for row in cells] == [
        (2, 32, 2),
        (4, 32, 2),
    ]
    results = json.loads((written / "copy_word/results.json").read_text())
    assert results["config"]["suite"] == "copy_word"
    assert results["config"]["evaluation"]["lengths"] == [32]
    assert {row["length_tokens"] for row in read_samples(written / "passkey")} == {256}


def test_samples_are_merged_once_whenever_a_kill_comes(tmp_path: Path) -> None:
    """Between the merge and the removal of the ranks' files it leaves both."""
    file = tmp_path / "samples.jsonl"
    identity = {"model": "a", "settings": "b", "task": "c"}
    rows = [{**identity, "index": index, "correct": 1, "seconds": 0.5} for index in (0, 1)]
    write_rows(file, rows)
    rank_file(file, 1).write_text(json.dumps(rows[1]) + "\n")
    merge_rank_files(file)
    assert read_rows(file) == rows
    assert not rank_file(file, 1).exists()
