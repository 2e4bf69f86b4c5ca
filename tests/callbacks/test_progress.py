"""Progress: what a person reads on a terminal and what a log file keeps."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf

from ic.callbacks.options import ThroughputOptions
from ic.callbacks.progress import TrainingProgress, TrainingProgressConfig
from ic.callbacks.step_timer import HostTimer
from ic.callbacks.throughput import Throughput

STEP_S = 2.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += STEP_S


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def own_console() -> Iterator[None]:
    yield
    rich.reconfigure()  # Lightning's bar sets rich's global console


@pytest.fixture
def run(clock, make_trainer, make_module, make_loader):
    """Train some steps; return what was written and the trainer."""

    def run(
        num_batches: int,
        *others: pl.Callback,
        live: bool = False,
        val: Any = None,
        ckpt: Any = None,
        config: TrainingProgressConfig | None = None,
        **settings: Any,
    ) -> tuple[str, pl.Trainer]:
        file = io.StringIO()
        console = {"file": file, "force_terminal": live, "width": 140}
        progress = TrainingProgress(config, clock=clock, console_kwargs=console)
        trainer = make_trainer(*others, progress, enable_progress_bar=True, **settings)
        # Draw now: a test is faster than the thread that draws.
        draw = (
            (lambda: trainer.progress_bar_callback.refresh(hard=True)) if live else (lambda: None)
        )
        module = make_module({"training_step": clock.step, "validation_step": draw})
        trainer.fit(module, make_loader(num_batches), val, ckpt_path=ckpt)
        return file.getvalue(), trainer

    return run


def without_control(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)


def last_frame(output: str) -> str:
    """The last line drawn on a terminal."""
    lines = without_control(output).replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()][-1]


# Without a terminal


def test_plain_lines_every_n_steps(run, clock):
    throughput = Throughput(ThroughputOptions(warmup_steps=1), HostTimer(clock))
    config = TrainingProgressConfig(plain_every_n_steps=4, plain_every_s=1000)
    output, trainer = run(10, throughput, config=config)
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    assert lines[0] == "training: step 0/10"
    assert [line.split(",")[0] for line in lines[1:]] == [f"step {n}/10" for n in (1, 5, 9, 10)]
    loss = r"loss \d\.\d{3}"
    end = r"answer accuracy 0\.875, context 16, tokens/s 16, lr 2\.0e-03, ETA 0:00:10"
    assert re.fullmatch(rf"step 5/10, {loss}, {end}", lines[2])
    assert lines[1].endswith("ETA -:--:--")
    assert f"loss {float(trainer.callback_metrics['train/loss']):.3f}" in lines[-1]
    assert lines[-1].endswith("ETA 0:00:00")


def test_plain_lines_every_30_seconds(run):
    config = TrainingProgressConfig(plain_every_n_steps=1000, plain_every_s=30)
    output, _ = run(20, config=config)
    steps = re.findall(r"^step (\d+)/20", output, re.MULTILINE)
    assert steps == ["1", "16", "20"]


def test_validation_has_its_line(run, make_loader):
    output, trainer = run(2, val=make_loader(1), num_sanity_val_steps=1)
    loss = float(trainer.callback_metrics["val/loss"])
    assert output.count("validation") == 1
    assert f"validation at step 2: val/loss {loss:.3f}" in output


def test_resumed_run_goes_on_counting(run, tmp_path):
    _, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    output, _ = run(3, ckpt=tmp_path / "x.ckpt", max_epochs=2)
    assert output.splitlines()[0] == "training: step 3/6"
    assert output.splitlines()[-1].startswith("step 6/6, ")


def test_gradient_accumulation_counts_steps(run):
    output, _ = run(8, accumulate_grad_batches=4)
    assert re.findall(r"^step (\S+?),", output, re.MULTILINE) == ["1/2", "2/2"]


def test_time_limit(run, monkeypatch):
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 130.0)
    monkeypatch.setattr(Timer, "time_remaining", lambda *_: 290.0)
    output, _ = run(2, max_time={"minutes": 7})
    assert "step 1/2, 0:02:10/0:07:00, loss" in output


@pytest.mark.parametrize(("remaining", "eta"), [(3.0, "0:00:03"), (500.0, "0:00:06")])
def test_eta_is_the_nearer_limit(run, monkeypatch, remaining, eta):
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 100.0)
    monkeypatch.setattr(Timer, "time_remaining", lambda *_: remaining)
    config = TrainingProgressConfig(plain_every_n_steps=1)
    output, _ = run(5, max_time={"minutes": 7}, config=config)
    line = next(line for line in output.splitlines() if line.startswith("step 2/5"))
    assert line.endswith(f"ETA {eta}")


# On a terminal


def test_live_line(run, clock):
    throughput = Throughput(ThroughputOptions(warmup_steps=1), HostTimer(clock))
    output, trainer = run(5, throughput, live=True)
    assert "\x1b[" in output
    frame = last_frame(output)
    loss = float(trainer.callback_metrics["train/loss"])
    assert "step 5/5" in frame
    assert f"loss: {loss:.3f}  acc: 0.875  ctx: 16  tok/s: 16  lr: 2.0e-03  eta: 0:00:00" in frame
    assert "training: step 0" not in output  # plain lines are for files


def test_live_line_reads_metrics_at_most_twice_a_second(run, monkeypatch, clock):
    reads: list[float] = []
    original = TrainingProgress._read_metrics

    def counted(self: TrainingProgress, trainer: pl.Trainer) -> Any:
        reads.append(clock.now)
        return original(self, trainer)

    monkeypatch.setattr(TrainingProgress, "_read_metrics", counted)
    monkeypatch.setattr(Clock, "step", lambda self: setattr(self, "now", self.now + 0.125))
    run(12, live=True)
    # The first step, then every 0.5 s, the last step, and once more where the epoch ends.
    assert reads == [0.125, 0.625, 1.125, 1.5, 1.5]


def test_live_line_is_gone_when_other_callbacks_report(run):
    class Reporter(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            started.append(trainer.progress_bar_callback.progress.live.is_started)

    started: list[bool] = []
    run(2, Reporter(), live=True)
    assert started == [False]


def test_live_line_again_in_the_next_epoch(run):
    output, _ = run(2, live=True, max_epochs=2)
    assert "step 2/4" in without_control(output)
    assert "step 4/4" in last_frame(output)


def test_live_validation_has_lightnings_bar(run, make_loader):
    output, _ = run(2, live=True, val=make_loader(3))
    assert re.search(r"Validation.* 2/3", without_control(output))
    assert "step 2/2" in last_frame(output)


@pytest.mark.parametrize("live", [False, True])
def test_other_ranks_are_quiet(run, monkeypatch, live):
    monkeypatch.setattr(SingleDeviceStrategy, "is_global_zero", False)
    output, _ = run(3, live=live)
    assert output == ""


@pytest.mark.parametrize("field", ["refresh_per_second", "plain_every_n_steps", "plain_every_s"])
def test_config_rejects_zero(field):
    with pytest.raises(ValueError, match=f"callbacks.progress.{field}=0: must be"):
        TrainingProgressConfig(**{field: 0})


def test_config_is_a_structured_config():
    config = OmegaConf.to_object(OmegaConf.structured(TrainingProgressConfig))
    assert config == TrainingProgressConfig()
