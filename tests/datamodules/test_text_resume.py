"""A run that was stopped and resumed sees the batches of a run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from ic.datamodules import file_contents
from ic.datamodules.options import TextDataOptions
from ic.datamodules.text import TextDataModule
from ic.model.byte_tokenizer import ByteTokenizer

Corpus = Callable[..., list[str]]
T = 64


class Recorder(LightningModule):
    """Keeps the batches it is given; `fail_at` raises in the middle of that step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.batches: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch["step"] == self.fail_at:
            raise RuntimeError("stopped here")
        self.batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert "position" not in batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def tokens(self) -> list[list[list[int]]]:
        return [batch["input_ids"].tolist() for batch in self.batches]


class SaveEvery(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "exception.ckpt")


class Curriculum(Callback):
    def __init__(self, lengths: dict[int, int]) -> None:
        self.lengths = lengths  # by step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.lengths:
            trainer.datamodule.set_context_length(self.lengths[trainer.global_step])  # type: ignore[attr-defined]


def fit(
    module: Recorder, datamodule: TextDataModule, ckpt_path: Path | None = None, **settings: Any
) -> None:
    settings = {"max_steps": 30, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        ).fit(module, datamodule=datamodule, ckpt_path=ckpt_path)


@pytest.fixture
def files(documents: list[str], write_corpus: Corpus) -> list[str]:
    return write_corpus(documents, "jsonl", 3)


@pytest.fixture
def make(tokenizer: ByteTokenizer, files: list[str]) -> Callable[..., TextDataModule]:
    def make(**settings: Any) -> TextDataModule:
        settings = {
            "train_files": files,
            "context_length": T,
            "tokens_per_batch": 4 * T,
            "shuffle_buffer": 7,
            **settings,
        }
        return TextDataModule(TextDataOptions(**settings), tokenizer)

    return make


Make = Callable[..., TextDataModule]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 0},
        {"num_workers": 2},
        {"num_workers": 2, "num_streams": 2},
        {"num_workers": 0, "num_streams": 3, "shuffle_buffer": 0},
    ],
)
def test_resumed_at_several_steps(
    make: Make, tmp_path: Path, documents: list[str], settings: dict[str, int]
) -> None:
    unbroken = Recorder()
    fit(unbroken, make(**settings), callbacks=[SaveEvery(tmp_path)])
    assert [batch["step"] for batch in unbroken.batches] == list(range(30))
    one_pass = sum(len(text.encode()) + 1 for text in documents) / (4 * T)
    assert 20 < one_pass < 25  # so the last stops lie in the second pass
    assert "position" not in unbroken.batches[0]
    for stop in (1, 2, 7, 24, 29):
        resumed = Recorder()
        # The number of workers may change on the way.
        fit(resumed, make(**{**settings, "num_workers": 0}), tmp_path / f"{stop}.ckpt")
        assert [batch["step"] for batch in resumed.batches] == list(range(stop, 30))
        assert resumed.tokens() == unbroken.tokens()[stop:]


def test_resumed_with_workers(make: Make, tmp_path: Path) -> None:
    settings = {"num_workers": 2, "num_streams": 2}
    unbroken, resumed = Recorder(), Recorder()
    fit(unbroken, make(**settings), callbacks=[SaveEvery(tmp_path)])
    fit(resumed, make(**settings), tmp_path / "5.ckpt")
    assert resumed.tokens() == unbroken.tokens()[5:]


def test_a_batch_whose_step_failed_is_seen_again(make: Make, tmp_path: Path) -> None:
    unbroken = Recorder()
    fit(unbroken, make())
    for fail_at in (0, 9):
        failed, resumed = Recorder(fail_at), Recorder(fail_at=13)
        with pytest.raises(RuntimeError, match="stopped here"):
            fit(failed, make(), callbacks=[SaveEvery(tmp_path)])
        # Stopped a second time, amid the step after a resume from such a checkpoint.
        with pytest.raises(RuntimeError, match="stopped here"):
            fit(resumed, make(), tmp_path / "exception.ckpt", callbacks=[SaveEvery(tmp_path)])
        last = Recorder()
        fit(last, make(), tmp_path / "exception.ckpt")
        assert failed.tokens() + resumed.tokens() + last.tokens() == unbroken.tokens()


def test_lightning_s_epochs_and_validation_go_on_with_the_data(
    make: Make, write_corpus: Corpus, documents: list[str]
) -> None:
    unbroken, in_epochs = Recorder(), Recorder()
    fit(unbroken, make())
    val_files = write_corpus(documents, "parquet")
    fit(in_epochs, make(val_files=val_files, num_workers=1), limit_train_batches=6)
    assert in_epochs.tokens() == unbroken.tokens()


def test_a_change_of_length_cuts_the_same_tokens_and_survives_a_resume(
    make: Make, tmp_path: Path
) -> None:
    unbroken, curriculum, resumed = Recorder(), Recorder(), Recorder()
    fit(unbroken, make())
    grow = Curriculum({0: 16, 8: 32, 12: T})
    datamodule = make(num_workers=1)
    datamodule.set_context_length(16)
    fit(curriculum, datamodule, callbacks=[grow, SaveEvery(tmp_path)])
    lengths = [batch["input_ids"].shape[1] for batch in curriculum.batches]
    assert lengths == [16] * 8 + [32] * 4 + [T] * 18
    flat = [batch["input_ids"].flatten().tolist() for batch in curriculum.batches]
    assert flat == [batch["input_ids"].flatten().tolist() for batch in unbroken.batches]
    assert int(curriculum.batches[0]["position_ids"].max()) < 16
    fit(resumed, make(), tmp_path / "10.ckpt", callbacks=[grow])
    assert resumed.tokens() == curriculum.tokens()[10:]


def test_a_longer_context_goes_on_at_the_same_token(make: Make, tmp_path: Path) -> None:
    short, resumed = Recorder(), Recorder()
    fit(short, make(), callbacks=[SaveEvery(tmp_path)])
    longer = make(context_length=2 * T)
    fit(resumed, longer, tmp_path / "6.ckpt")
    assert longer.context_length == 2 * T
    flat = [batch["input_ids"].flatten().tolist() for batch in resumed.batches]
    assert flat == [batch["input_ids"].flatten().tolist() for batch in short.batches[6:]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 3}, r"data\.seed was 0, now 3"),
        ({"shuffle_buffer": 8}, r"data\.shuffle_buffer was 7, now 8"),
        ({"num_streams": 2}, r"data\.num_streams was 1, now 2"),
        ({"append_eos": False}, r"data\.append_eos was True, now False"),
    ],
)
def test_a_position_of_other_data_is_refused_or_ignored_by_choice(
    make: Make, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=4)
    with pytest.raises(ValueError, match=message):
        fit(Recorder(), make(**settings), tmp_path / "4.ckpt", max_steps=8)
    fresh, ignoring = Recorder(), Recorder()
    fit(fresh, make(**settings), max_steps=4)
    ignore = make(**settings, ignore_checkpoint_position=True)
    fit(ignoring, ignore, tmp_path / "4.ckpt", max_steps=8)
    assert ignoring.tokens() == fresh.tokens()


def test_changed_files_are_refused(make: Make, files: list[str], tmp_path: Path) -> None:
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=4)
    with (Path(files[0]).parent / "000.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"their bytes was .* \S*/000\.jsonl has other content"):
        fit(Recorder(), make(), tmp_path / "4.ckpt", max_steps=8)


@pytest.mark.parametrize("times", ["new", "kept"])
def test_other_text_of_the_same_size_is_refused(
    make: Make, files: list[str], tmp_path: Path, times: str
) -> None:
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=4)
    file = Path(files[0]).parent / "001.jsonl"
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"document", b"decument"))
    assert file.stat().st_size == before.st_size
    if times == "kept":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"settings: \S*/001\.jsonl has other content\. Set"):
        fit(Recorder(), make(), tmp_path / "4.ckpt", max_steps=8)
    fit(Recorder(), make(ignore_checkpoint_position=True), tmp_path / "4.ckpt", max_steps=8)


def test_files_are_summed_once_and_read_again_only_where_they_may_have_changed(
    make: Make, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[str] = []
    digest = file_contents._digest_of_bytes

    def counted(file: str) -> str:
        summed.append(Path(file).name)
        return digest(file)

    monkeypatch.setattr(file_contents, "_digest_of_bytes", counted)
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=4)
    assert sorted(summed) == ["000.jsonl", "001.jsonl", "002.jsonl"]
    fit(Recorder(), make(), tmp_path / "4.ckpt", max_steps=6)
    assert len(summed) == 3
    os.utime(Path(files[0]).parent / "002.jsonl")  # touched, not changed
    resumed = Recorder()
    fit(resumed, make(), tmp_path / "4.ckpt", max_steps=6)
    assert summed[3:] == ["002.jsonl"]
    assert len(resumed.batches) == 2


def test_a_checkpoint_without_sums_is_resumed(make: Make, tmp_path: Path) -> None:
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=4)
    checkpoint = torch.load(tmp_path / "4.ckpt", weights_only=False)
    (state,) = (checkpoint[key] for key in checkpoint if key.endswith("DataModule"))
    del state["files"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = Recorder()
    fit(resumed, make(), tmp_path / "old.ckpt", max_steps=6)
    assert len(resumed.batches) == 2


def test_a_checkpoint_validates_without_its_training_files(
    make: Make, write_corpus: Corpus, documents: list[str], tmp_path: Path
) -> None:
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=2)
    only_val = make(train_files=[], val_files=write_corpus(documents, "parquet"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(Recorder(), datamodule=only_val, ckpt_path=tmp_path / "2.ckpt", verbose=False)


TWO_RANKS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from lightning import Trainer
sys.path.insert(0, sys.argv[1])
from test_text_resume import Recorder, SaveEvery, TextDataOptions, TextDataModule, ByteTokenizer
from pathlib import Path

folder = Path(sys.argv[2])

def fit(ckpt_path, name):
    module = Recorder()
    config = TextDataOptions(
        train_files=[sys.argv[3]], context_length=64, tokens_per_batch=128, shuffle_buffer=7)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=8, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Write(folder, name)])
    trainer.fit(module, datamodule=TextDataModule(config, ByteTokenizer()), ckpt_path=ckpt_path)

class Write(SaveEvery):
    def __init__(self, folder, name):
        super().__init__(folder)
        self.name = name

    def on_train_end(self, trainer, module):
        path = self.folder / f"{self.name}-{trainer.global_rank}.json"
        path.write_text(json.dumps(module.tokens()))

fit(None, "unbroken")
fit(folder / "3.ckpt", "resumed")
"""


@pytest.mark.slow
def test_two_ranks_each_resume_at_their_own_position(tmp_path: Path, files: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(Path(__file__).parent), str(tmp_path), files[0]],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    runs = {
        (name, rank): json.loads((tmp_path / f"{name}-{rank}.json").read_text())
        for name in ("unbroken", "resumed")
        for rank in (0, 1)
    }
    assert len(runs["unbroken", 0]) == 8
    assert runs["unbroken", 0] != runs["unbroken", 1]
    for rank in (0, 1):
        assert runs["resumed", rank] == runs["unbroken", rank][3:]


def test_another_number_of_ranks_is_refused(make: Make, tmp_path: Path) -> None:
    """A position is of one of so many ranks: the others' documents would be lost or seen twice."""
    fit(Recorder(), make(), callbacks=[SaveEvery(tmp_path)], max_steps=4)
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)
    order = state["TextDataModule"]["order"]
    assert order["number of data-parallel ranks"] == 1
    order["number of data-parallel ranks"] = 2
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="number of data-parallel ranks was 2, now 1"):
        fit(Recorder(), make(), tmp_path / "two.ckpt", max_steps=8)
