"""Throughput on a clock that only the test moves: every number is known beforehand."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from ic.callbacks.options import ThroughputOptions
from ic.callbacks.step_timer import HostTimer
from ic.callbacks.throughput import Throughput, throughput_paused
from ic.callbacks.throughput_summary import TimedStep, summarise
from ic.model.cost import train_flops_per_token
from tests.callbacks.clocks import COMPUTE_S, FETCH_S, STEP_S, TOKENS, Clock


class At(pl.Callback):
    """Calls a function at the end of one step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step, self.function = step, function

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.function(trainer)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(clock, tmp_path, make_trainer, make_module, make_loader):
    """Train on batches of the given lengths; return `throughput.json`."""

    def run(
        lengths: Any, before: Any = (), after: Any = (), val: Any = None, **settings: Any
    ) -> dict[str, Any]:
        config = settings.pop("config", ThroughputOptions(warmup_steps=3))
        throughput = Throughput(config, settings.pop("timer", HostTimer(clock)))
        during = {"training_step": clock.compute, "validation_step": clock.lose}
        trainer = make_trainer(*before, throughput, *after, **settings)
        trainer.fit(make_module(during), make_loader(lengths, clock.fetch), val)
        return json.loads((tmp_path / "throughput.json").read_text())

    return run


def test_rates_of_a_plain_run(run):
    report = run(10)
    assert report["num_steps"] == 10
    assert report["num_steps_timed"] == 7
    assert report["tokens_seen"] == 10 * TOKENS
    assert report["tokens_timed"] == 7 * TOKENS
    assert report["tokens_per_s"] == pytest.approx(TOKENS / STEP_S)
    assert report["data_wait_share"] == pytest.approx(FETCH_S / STEP_S)
    for name in ("p10", "median", "p90"):
        assert report[f"step_time_{name}_s"] == pytest.approx(STEP_S)
    assert (report["first_step"], report["last_step"]) == (0, 10)
    assert (report["device"], report["num_devices"], report["clock"]) == ("cpu", 1, "host clock")
    assert report["versions"]["torch"] == torch.__version__


def test_quantiles_of_uneven_steps():
    steps = [TimedStep(8, 10, 0.0, seconds, 0.25) for seconds in range(1, 12)]
    summary = summarise(steps, peak_flops=None)
    assert summary["step_time_p10_s"] == pytest.approx(2)
    assert summary["step_time_median_s"] == pytest.approx(6)
    assert summary["step_time_p90_s"] == pytest.approx(10)
    assert summary["tokens_per_s"] == pytest.approx(110 / 66)
    assert summary["data_wait_share"] == pytest.approx(11 * 0.25 / 66)
    assert "mfu" not in summary


def test_validation_is_left_out(run, make_loader):
    report = run(12, val=make_loader(1), val_check_interval=4, num_sanity_val_steps=0)
    # Three validations; the one after the last step delays no step.
    assert report["num_steps_interrupted"] == 2
    assert report["num_steps_timed"] == 12 - 3 - 2
    assert report["tokens_per_s"] == pytest.approx(TOKENS / STEP_S)
    assert report["data_wait_share"] == pytest.approx(FETCH_S / STEP_S)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("what", ["checkpoint", "evaluation"])
def test_checkpoint_and_evaluation_are_left_out(run, clock, tmp_path, order, what):
    def save(trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        clock.lose()

    def evaluate(trainer: pl.Trainer) -> None:
        with throughput_paused(trainer):
            clock.lose()

    other = At(5, save if what == "checkpoint" else evaluate)
    report = run(10, **{order: [other]})
    assert report["num_steps_interrupted"] == 1
    assert report["num_steps_timed"] == 6
    assert report["tokens_per_s"] == pytest.approx(TOKENS / STEP_S)


def test_what_nobody_announced_counts(run, clock):
    """The counterpart of the tests above: without the pause, the time is the steps' own."""
    report = run(10, after=[At(5, lambda trainer: clock.lose())])
    assert report["num_steps_timed"] == 7
    assert report["tokens_per_s"] == pytest.approx(7 * TOKENS / (7 * STEP_S + 1000))


def test_paused_without_the_callback_runs_the_body(make_trainer):
    done = []
    with throughput_paused(make_trainer()):
        done.append(1)
    assert done == [1]


def test_grouped_by_context_length_with_mfu(run, make_module):
    peak = 1e6
    config = ThroughputOptions(warmup_steps=2, peak_bf16_flops=peak)
    report = run([8] * 5 + [16] * 4, config=config)
    model_config = make_module().model.config
    short, long = report["by_context_length"]
    assert (short["context_length_tokens"], long["context_length_tokens"]) == (8, 16)
    # The new length warms up again.
    assert (short["num_steps"], short["num_steps_timed"]) == (5, 3)
    assert (long["num_steps"], long["num_steps_timed"]) == (4, 2)
    for row, length in ((short, 8), (long, 16)):
        rate = 2 * length / STEP_S
        assert row["tokens_per_s"] == pytest.approx(rate)
        expected = rate * train_flops_per_token(model_config, length) / peak
        assert row["mfu"] == pytest.approx(expected)
    assert short["mfu"] < report["mfu"] < long["mfu"]
    assert report["peak_bf16_flops_per_device"] == peak


def test_without_warmup_the_first_step_counts_without_its_wait(run):
    report = run([8], config=ThroughputOptions(warmup_steps=0))
    assert (report["num_steps"], report["num_steps_timed"]) == (1, 1)
    assert report["step_time_median_s"] == pytest.approx(COMPUTE_S)
    assert report["data_wait_share"] == 0


def test_accumulated_batches_are_one_step(run):
    report = run(8, accumulate_grad_batches=2, config=ThroughputOptions(warmup_steps=1))
    assert (report["num_steps"], report["num_steps_timed"]) == (4, 3)
    assert report["step_time_median_s"] == pytest.approx(2 * STEP_S)
    assert report["tokens_per_s"] == pytest.approx(TOKENS / STEP_S)
    assert report["data_wait_share"] == pytest.approx(FETCH_S / STEP_S)


def test_logged_values_are_of_the_window_and_restart_at_a_new_length(run, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    config = ThroughputOptions(warmup_steps=1, window_steps=2)
    run([8] * 4 + [16] * 4, config=config, logger=logger)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    by_step = {int(row["step"]): row for row in rows}
    assert by_step[0]["train/tokens_per_s"] == ""
    assert float(by_step[3]["train/tokens_per_s"]) == pytest.approx(16 / STEP_S)
    assert float(by_step[5]["train/tokens_per_s"]) == pytest.approx(32 / STEP_S)
    assert float(by_step[7]["train/data_wait_share"]) == pytest.approx(FETCH_S / STEP_S)
    assert float(by_step[7]["train/step_time_s"]) == pytest.approx(STEP_S)


class QueuedTimer(HostTimer):
    """Like a GPU: a mark can be read only once the program has waited for it or a later one."""

    name = "queued"
    is_free = False

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.num_marks = 0
        self.settled = 0
        self.waits: list[int] = []

    def mark(self) -> Any:
        self.num_marks += 1
        return self.num_marks, super().mark()

    def settle(self, mark: Any) -> None:
        self.settled = max(self.settled, mark[0])
        self.waits.append(self.num_marks - mark[0])

    def seconds(self, begin: Any, end: Any) -> float:
        assert begin[0] <= end[0] <= self.settled, "read before the GPU got there"
        return super().seconds(begin[1], end[1])


def test_a_gpu_is_waited_for_every_n_steps_and_keeps_a_step_of_work(run, clock):
    timer = QueuedTimer(clock)
    config = ThroughputOptions(warmup_steps=2, sync_every_n_steps=4)
    report = run(12, timer=timer, config=config, log_every_n_steps=100)
    # At steps 4, 8, 12 up to the step before (two marks are younger), and at the end.
    assert timer.waits == [2, 2, 2, 0]
    assert report["num_steps_timed"] == 10
    assert report["tokens_per_s"] == pytest.approx(TOKENS / STEP_S)


def test_a_gpu_is_read_at_the_trainers_log_steps(run, clock, tmp_path):
    timer = QueuedTimer(clock)
    config = ThroughputOptions(warmup_steps=1, sync_every_n_steps=100)
    logger = CSVLogger(tmp_path, name="", version="")
    run(6, timer=timer, config=config, log_every_n_steps=3, logger=logger)
    header, *rows = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().split())
    column = header.index("train/tokens_per_s")
    assert [float(row[column]) for row in rows] == [pytest.approx(TOKENS / STEP_S)] * 2


def test_missing_peak_is_said_once(run, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    report = run(6)
    assert "mfu" not in report
    assert report["peak_bf16_flops_per_device"] is None
    assert caplog.text.count("MFU is left out") == 1
    assert "'cpu'" in caplog.text


def test_run_too_short_to_time_says_so(run):
    report = run(2)
    assert (report["num_steps"], report["num_steps_timed"]) == (2, 0)
    assert "tokens_per_s" not in report


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_failed_run_keeps_its_numbers_and_its_error(
    run, clock, tmp_path, monkeypatch, caplog, disk_is_full
):
    def replace(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(trainer: pl.Trainer) -> None:
        if disk_is_full:
            monkeypatch.setattr(os, "replace", replace)
        raise ValueError("broken batch")

    with pytest.raises(ValueError, match="broken batch"):
        run(8, after=[At(6, fail)])
    if disk_is_full:
        assert "throughput.json not written" in caplog.text
        assert list(tmp_path.glob("*throughput*")) == []
    else:
        report = json.loads((tmp_path / "throughput.json").read_text())
        assert report["num_steps_timed"] == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("warmup_steps", -1), ("window_steps", 0), ("sync_every_n_steps", 0), ("peak_bf16_flops", 0)],
)
def test_config_rejects(field, value):
    with pytest.raises(ValueError, match=f"callbacks.throughput.{field}={value}: must be"):
        ThroughputOptions(**{field: value})


def test_config_is_a_structured_config():
    config = OmegaConf.to_object(OmegaConf.structured(ThroughputOptions))
    assert config == ThroughputOptions()


@pytest.mark.gpu
def test_cuda_events(tmp_path: Path, make_trainer, make_module, make_loader):
    throughput = Throughput(ThroughputOptions(warmup_steps=2, sync_every_n_steps=3))
    make_trainer(throughput, accelerator="gpu").fit(make_module(), make_loader(12))
    report = json.loads((tmp_path / "throughput.json").read_text())
    assert report["clock"] == "CUDA events"
    assert report["num_steps_timed"] == 10
    assert 0 <= report["data_wait_share"] <= 1
    assert report["tokens_per_s"] > 0
    if report["peak_bf16_flops_per_device"]:
        assert 0 < report["mfu"] < 1
