"""The memory profile of a run: who holds what in each phase, and files that are whole."""

from __future__ import annotations

import csv
import errno
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from omegaconf import OmegaConf

from ic.callbacks.memory_accounting import storage_bytes
from ic.callbacks.memory_profiler import MemoryProfiler, memory_phase
from ic.callbacks.options import MemoryProfilerOptions
from ic.model.cache import LatentCache
from ic.training.language_modeling import LanguageModelingModule
from ic.training.optimizers import is_muon_parameter
from ic.training.options import ObjectiveOptions, OptimizerOptions
from tests.callbacks.meters import FakeMeter, RisingMeter

CPU = torch.device("cpu")


def parameter_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def fit_with(profiler: MemoryProfiler, make_trainer, make_module, loader, **settings: Any):
    module = make_module()
    trainer = make_trainer(profiler, **settings)
    trainer.fit(module, loader)
    return module, trainer


def read_phases(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "memory/memory.json").read_text())["phases"]


# What a run's tensors hold


def test_split_is_that_of_the_model_and_adamw(tmp_path, make_trainer, make_module, make_loader):
    profiler = MemoryProfiler(MemoryProfilerOptions(first_steps=2), meter=RisingMeter())
    module, _ = fit_with(profiler, make_trainer, make_module, make_loader(2))
    weights = parameter_bytes(module)
    buffers = storage_bytes(module.buffers(), CPU)
    num_tensors = len(list(module.parameters()))
    phases = read_phases(tmp_path)
    # The second step's forward: the first step's gradients and AdamW's state are there.
    split = phases["forward"]["split_bytes"]
    assert split["parameters"] == weights + buffers
    assert split["gradients"] == weights
    assert split["optimizer"] == 2 * weights + 4 * num_tensors
    assert phases["optimizer_step"]["split_bytes"]["gradients"] == weights
    for phase in phases.values():
        assert sum(phase["split_bytes"].values()) == phase["split_of_bytes"]


def test_first_step_has_no_old_gradients_and_optimizer_state_only_at_its_end(
    tmp_path, make_trainer, make_module, make_loader
):
    profiler = MemoryProfiler(MemoryProfilerOptions(first_steps=1, every_n_steps=0))
    module, _ = fit_with(profiler, make_trainer, make_module, make_loader(2))
    phases = read_phases(tmp_path)
    weights = parameter_bytes(module)
    assert phases["forward"]["split_bytes"]["gradients"] == 0
    assert phases["backward"]["split_bytes"]["optimizer"] == 0
    assert phases["optimizer_step"]["split_bytes"]["gradients"] == weights
    assert phases["optimizer_step"]["split_bytes"]["optimizer"] > 2 * weights


def test_muon_keeps_one_moment_and_adamw_two(tmp_path, make_trainer, make_module, make_loader):
    model = make_module().model
    module = LanguageModelingModule(
        model,
        tokenizer=None,  # type: ignore[arg-type]  # kept for evaluation only
        optimizer=OptimizerOptions(name="muon"),
        objective=ObjectiveOptions(),
    )
    profiler = MemoryProfiler(MemoryProfilerOptions(first_steps=2), meter=RisingMeter())
    make_trainer(profiler).fit(module, make_loader(2))
    named = list(model.named_parameters())
    muon = sum(p.nbytes for name, p in named if is_muon_parameter(name, p))
    adamw = [p.nbytes for name, p in named if not is_muon_parameter(name, p)]
    measured = read_phases(tmp_path)["optimizer_step"]["split_bytes"]["optimizer"]
    assert muon > sum(adamw) > 0
    assert measured == muon + 2 * sum(adamw) + 4 * len(adamw)


def test_tied_embeddings_count_once(tmp_path, make_trainer, make_module, make_loader):
    module = make_module(tie_word_embeddings=True)
    profiler = MemoryProfiler(MemoryProfilerOptions(first_steps=1), meter=FakeMeter())
    make_trainer(profiler, limit_train_batches=1).fit(module, make_loader(1))
    measured = read_phases(tmp_path)["forward"]["split_bytes"]["parameters"]
    assert measured == parameter_bytes(module) + storage_bytes(module.buffers(), CPU)


# Phases


def test_activations_alive_when_backward_begins_are_not_other(
    tmp_path, make_trainer, make_module, make_loader
):
    meter = FakeMeter()
    meter.use(10**6)
    module = make_module({"training_step": lambda: meter.use(10**6 + 5000)})
    make_trainer(MemoryProfiler(meter=meter)).fit(module, make_loader(1))
    phases = read_phases(tmp_path)
    held = parameter_bytes(module) + storage_bytes(module.buffers(), CPU)
    assert phases["forward"]["split_bytes"]["other"] == 10**6 - held
    assert phases["backward"]["split_bytes"]["other"] == 10**6 - held
    assert phases["backward"]["split_bytes"]["activations"] == 5000


def test_only_the_chosen_steps_are_measured(tmp_path, make_trainer, make_module, make_loader):
    profiler = MemoryProfiler(MemoryProfilerOptions(first_steps=1, every_n_steps=3))
    fit_with(profiler, make_trainer, make_module, make_loader(7))
    measured = {name: p["num_measured"] for name, p in read_phases(tmp_path).items()}
    assert measured == {"setup": 1, "forward": 3, "backward": 3, "optimizer_step": 3}


def test_gradient_accumulation_is_one_step(tmp_path, make_trainer, make_module, make_loader):
    profiler = MemoryProfiler(MemoryProfilerOptions(first_steps=1, every_n_steps=0))
    fit_with(profiler, make_trainer, make_module, make_loader(4), accumulate_grad_batches=2)
    measured = {name: p["num_measured"] for name, p in read_phases(tmp_path).items()}
    assert measured == {"setup": 1, "forward": 2, "backward": 2, "optimizer_step": 1}


def test_validation_and_named_phase_with_a_real_cache(
    tmp_path, make_trainer, make_module, make_loader
):
    cache = LatentCache(num_layers=2)
    caught: dict[str, Any] = {}

    def evaluate() -> None:
        with memory_phase(trainer, "passkey") as phase:
            ids = torch.ones(1, 11, dtype=torch.int64)
            module.model(ids, past_key_values=cache, use_cache=True)
            phase.record_cache(cache)
            caught["phase"] = phase

    module = make_module({"validation_step": evaluate})
    trainer = make_trainer(MemoryProfiler(), num_sanity_val_steps=0)
    trainer.fit(module, make_loader(1), make_loader([9]))
    phases = read_phases(tmp_path)
    assert phases["passkey"]["split_bytes"]["cache"] == 2 * 11 * (8 + 4) * 4 == cache.nbytes
    assert phases["validation"]["split_bytes"]["cache"] == 0
    assert phases["validation"]["context_length_tokens"] == 9
    assert phases["forward"]["context_length_tokens"] == 16


def test_memory_phase_without_a_profiler_runs_the_body(make_trainer):
    with memory_phase(make_trainer(), "passkey") as phase:
        phase.record_cache(SimpleNamespace(nbytes=lambda: 7))
    assert phase.cache_bytes == 7


def test_phase_before_setup_says_so():
    with pytest.raises(RuntimeError, match="before the trainer has called setup"):
        MemoryProfiler().phase("passkey").__enter__()


# Files


def test_report_picture_and_logged_scalars(
    tmp_path, make_trainer, make_module, make_loader, figures
):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="")
    fit_with(MemoryProfiler(), make_trainer, make_module, make_loader(2), logger=logger)
    report = json.loads((tmp_path / "memory/memory.json").read_text())
    assert (report["device"], report["meter"], report["rank"]) == ("cpu", "process_rss", 0)
    forward = report["phases"]["forward"]
    assert forward["peak_allocated_bytes"] is None
    assert forward["host_peak_rss_bytes"] >= forward["split_of_bytes"] > 0
    assert report["run_peak_bytes"] >= max(p["split_of_bytes"] for p in report["phases"].values())
    assert sorted(p.name for p in (tmp_path / "memory").iterdir()) == ["memory.json", "memory.png"]
    assert imread(tmp_path / "memory/memory.png").std() > 0.05
    (figure,) = figures
    (axes,) = figure.axes
    names = [text.get_text().replace(" ", "_") for text in axes.get_yticklabels()]
    assert names == list(report["phases"])
    unit = {"MiB": 2**20, "GiB": 2**30}[axes.get_xlabel()[:3]]  # by how large this process is
    peaks = [round(line.get_xdata()[0] * unit) for line in axes.lines]
    assert peaks == [phase["split_of_bytes"] for phase in report["phases"].values()]
    (row, *_) = csv.DictReader((tmp_path / "metrics.csv").open())
    for phase in ("forward", "backward", "optimizer_step"):
        logged_bytes = float(row[f"memory/{phase}_peak_gib"]) * 2**30
        assert 0.2 < logged_bytes / report["phases"][phase]["split_of_bytes"] <= 1
    assert 0.2 < float(row["memory/run_peak_gib"]) * 2**30 / report["run_peak_bytes"] <= 1


def test_evaluation_alone_keeps_the_training_record(
    tmp_path, make_trainer, make_module, make_loader
):
    fit_with(MemoryProfiler(), make_trainer, make_module, make_loader(1))
    before = (tmp_path / "memory/memory.json").read_bytes()
    make_trainer(MemoryProfiler()).validate(make_module(), make_loader(1), verbose=False)
    assert (tmp_path / "memory/memory.json").read_bytes() == before
    report = json.loads((tmp_path / "memory/memory_validate.json").read_text())
    assert list(report["phases"]) == ["setup", "validation"]


def test_failed_run_leaves_its_profile(tmp_path, make_trainer, make_module, make_loader):
    def fail() -> None:
        raise ValueError("broken batch")

    with pytest.raises(ValueError, match="broken batch"):
        make_trainer(MemoryProfiler()).fit(make_module({"training_step": fail}), make_loader(1))
    assert list(read_phases(tmp_path)) == ["setup", "forward"]


@pytest.mark.parametrize(
    ("error", "wanted", "has_hook", "written"),
    [
        (torch.cuda.OutOfMemoryError, True, False, True),
        (torch.cuda.OutOfMemoryError, True, True, False),  # the hook has written it
        (torch.cuda.OutOfMemoryError, False, False, False),
        (ValueError, True, False, False),
    ],
)
def test_a_snapshot_is_taken_afterwards_where_pytorch_has_no_hook(
    tmp_path, monkeypatch, make_trainer, make_module, make_loader, error, wanted, has_hook, written
):
    profiler = MemoryProfiler(MemoryProfilerOptions(oom_snapshot=wanted))
    snapshots: list[Path] = []
    monkeypatch.setattr(
        "ic.callbacks.memory_profiler.write_oom_snapshot", lambda path, why: snapshots.append(path)
    )

    def fail() -> None:
        profiler._has_oom_hook = has_hook
        raise error("no room")

    with pytest.raises(error, match="no room"):
        make_trainer(profiler).fit(make_module({"training_step": fail}), make_loader(1))
    assert snapshots == [tmp_path / "memory/oom_snapshot.pickle"] * written


def test_full_disk_at_the_end_does_not_hide_the_error(
    tmp_path, monkeypatch, make_trainer, make_module, make_loader, caplog
):
    def fail() -> None:
        monkeypatch.setattr(os, "replace", disk_full)
        raise ValueError("broken batch")

    with pytest.raises(ValueError, match="broken batch"):
        make_trainer(MemoryProfiler()).fit(make_module({"training_step": fail}), make_loader(1))
    assert "memory profile not written" in caplog.text
    assert list((tmp_path / "memory").iterdir()) == []


def disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("field", ["first_steps", "every_n_steps", "oom_history_entries"])
def test_config_rejects_negative(field):
    with pytest.raises(ValueError, match=f"callbacks.memory.{field}=-1: must be at least 0"):
        MemoryProfilerOptions(**{field: -1})


def test_config_is_a_structured_config():
    config = OmegaConf.to_object(OmegaConf.structured(MemoryProfilerOptions))
    assert config == MemoryProfilerOptions()


@pytest.mark.gpu
def test_cuda_split_and_snapshot_on_a_real_out_of_memory(
    tmp_path, make_trainer, make_module, make_loader, caplog
):
    kept: list[torch.Tensor] = []

    def exhaust() -> None:
        if kept:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        kept.append(torch.zeros(1, device="cuda"))

    module = make_module({"training_step": exhaust})
    trainer = make_trainer(MemoryProfiler(), accelerator="gpu")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.fit(module, make_loader(3))
    snapshot = tmp_path / "memory/oom_snapshot.pickle"
    with snapshot.open("rb") as file:
        events = pickle.load(file)["device_traces"][0]
    assert [event["size"] for event in events if event["action"] == "oom"] == [2**50]
    assert str(snapshot) in caplog.text
    report = json.loads((tmp_path / "memory/memory.json").read_text())
    assert report["meter"] == "cuda_allocator"
    weights = parameter_bytes(module)
    split = report["phases"]["optimizer_step"]["split_bytes"]
    assert split["gradients"] == weights
    assert split["optimizer"] == 2 * weights  # AdamW's step counters stay on the host
    backward = report["phases"]["backward"]
    assert backward["split_bytes"]["activations"] > 0
    assert backward["peak_reserved_bytes"] >= backward["peak_allocated_bytes"]
