"""Throughput of several devices: what each of them does is added up, and written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ic.callbacks.options import ThroughputOptions
from ic.callbacks.step_timer import HostTimer
from ic.callbacks.throughput import Throughput
from ic.model.cost import train_flops_per_token
from tests.callbacks.clocks import COMPUTE_S, STEP_S, TOKENS, Clock


@pytest.mark.parametrize(("devices", "replicas"), [(1, 1), (4, 4), (4, 2), (4, 1)])
def test_mfu_is_over_all_devices(tmp_path, make_module, devices, replicas):
    """Two ranks that share a sequence do the work of one replica, with the peak of two devices."""
    clock = Clock()
    config = ThroughputOptions(warmup_steps=0, peak_bf16_flops=1e9)
    throughput = Throughput(config, HostTimer(clock))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(
            root_device=torch.device("cpu"), distributed_sampler_kwargs={"num_replicas": replicas}
        ),
        world_size=devices,
        global_step=0,
        is_global_zero=True,
        log_every_n_steps=0,
        precision="32-true",
        default_root_dir=tmp_path,
    )
    module = make_module()
    module.log_dict = lambda *args, **kwargs: None
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    throughput.on_train_start(trainer, module)
    for step in range(3):
        throughput.on_train_batch_start(trainer, module, batch, step)
        clock.compute()
        trainer.global_step += 1
        throughput.on_train_batch_end(trainer, module, None, batch, step)
    throughput.on_train_end(trainer, module)
    report = json.loads((tmp_path / "throughput.json").read_text())
    flops = replicas * TOKENS * train_flops_per_token(module.model.config, 16)
    assert report["tokens_per_s"] == pytest.approx(replicas * TOKENS / COMPUTE_S)
    assert report["mfu"] == pytest.approx(flops / COMPUTE_S / (devices * 1e9))


def test_data_parallel_replicas_multiply_the_tokens(
    tmp_path, make_trainer, make_module, make_loader
):
    clock = Clock()
    throughput = Throughput(ThroughputOptions(warmup_steps=1), HostTimer(clock))
    during = {"training_step": clock.compute}
    trainer = make_trainer(throughput)
    trainer.strategy.distributed_sampler_kwargs = {"num_replicas": 4, "rank": 0}
    trainer.fit(make_module(during), make_loader(4, clock.fetch))
    report = json.loads((tmp_path / "throughput.json").read_text())
    assert report["num_data_parallel_replicas"] == 4
    assert report["tokens_per_s"] == pytest.approx(4 * TOKENS / STEP_S)


TWO_PROCESSES = """
import importlib.util, sys
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from ic.callbacks.memory_profiler import MemoryProfiler
from ic.callbacks.step_timer import HostTimer
from ic.callbacks.throughput import Throughput
from ic.callbacks.options import ThroughputOptions

def load(path):
    spec = importlib.util.spec_from_file_location("loaded", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

here, folder = sys.argv[1:]
tiny = load(here + "/conftest.py")
now = [0.0]
def pass_time(seconds):
    now[0] += seconds
trainer = pl.Trainer(
    accelerator="cpu", strategy="ddp_fork", devices=2, max_epochs=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder,
    callbacks=[
        Throughput(ThroughputOptions(warmup_steps=1), HostTimer(lambda: now[0])), MemoryProfiler(),
    ],
)
data = tiny.Batches([16] * 8, on_fetch=lambda: pass_time(0.5))
module = tiny.TinyModule({"training_step": lambda: pass_time(1.5)})
trainer.fit(module, DataLoader(data, batch_size=None))
"""


@pytest.mark.slow
def test_two_processes_write_one_report(tmp_path):
    # In a fresh interpreter: a fork of one whose OpenMP threads have run can hang.
    subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(Path(__file__).parent), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    report = json.loads((tmp_path / "throughput.json").read_text())
    assert (report["num_devices"], report["num_data_parallel_replicas"]) == (2, 2)
    assert report["num_steps"] == 4  # each process takes every other batch
    assert report["tokens_per_s"] == pytest.approx(2 * TOKENS / STEP_S)
    memory = json.loads((tmp_path / "memory/memory.json").read_text())
    assert (memory["rank"], memory["world_size"]) == (0, 2)
    assert memory["phases"]["backward"]["num_measured"] == 3
    assert list(tmp_path.rglob(".*.tmp")) == []
