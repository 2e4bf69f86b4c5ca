"""A PyTorch profiler trace of a few steps, a table of the slowest kernels, and the memory timeline.

    profile/trace.json.gz          for Perfetto or chrome://tracing
    profile/kernels.{txt,json}     operators by time on the device, slowest first
    profile/memory.json.gz         allocated bytes over time
    profile/memory_snapshot.pickle on CUDA: allocations and stacks, for pytorch.org/memory_viz

`python -m ic fit experiment=... callbacks=profiler` profiles steps 11 to 13 of the run, on rank 0.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.profiler import ProfilerActivity, profile, schedule

from ic.callbacks.options import ProfilerOptions
from ic.files.atomic_write import replacing, write_json
from ic.files.run_folder import RunFolder
from ic.machine.devices import device_name


class Profiler(Callback):
    """Writes `profile/` below `trainer.default_root_dir` once the active steps are over."""

    def __init__(self, config: ProfilerOptions | None = None) -> None:
        self.config = config or ProfilerOptions()
        self._profile: profile | None = None
        self._on_cuda = False
        self._num_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        self._on_cuda = device.type == "cuda"
        config = self.config
        self._folder = RunFolder(trainer.default_root_dir).profile
        self._device_name = device_name(device)

        def write(finished: profile) -> None:
            self._write(finished)

        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])],
            schedule=schedule(
                wait=config.wait_steps,
                warmup=config.warmup_steps,
                active=config.active_steps,
                repeat=1,
            ),
            on_trace_ready=write,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
        )
        self._num_batches = 0
        self._profile.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first = self.config.wait_steps + self.config.warmup_steps
        if self._profile is not None and self._on_cuda and self._num_batches == first:
            torch.cuda.memory._record_memory_history(max_entries=self.config.memory_history_entries)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is None:
            return
        self._num_batches += 1
        self._profile.step()
        last = self.config.wait_steps + self.config.warmup_steps + self.config.active_steps
        if self._num_batches == last:
            self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profile is not None:
            rank_zero_info(
                f"no profile: the run ended after {self._num_batches} micro-batches; lower "
                "callbacks.profiler.wait_steps or raise trainer.max_steps"
            )
            self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, finished: profile) -> None:
        last = self.config.wait_steps + self.config.warmup_steps + self.config.active_steps
        if self._num_batches < last:
            return  # the run ended in the middle of the active steps
        trace = self._folder / "trace.json.gz"
        trace.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(trace))
        averages = finished.key_averages()
        column = "self_device_time_total" if self._on_cuda else "self_cpu_time_total"
        with replacing(self._folder / "kernels.txt") as partial:
            partial.write_text(averages.table(sort_by=column, row_limit=self.config.num_kernels))
        slowest = sorted(averages, key=lambda e: getattr(e, column), reverse=True)
        write_json(
            self._folder / "kernels.json",
            {
                "device": self._device_name,
                "num_micro_batches": self.config.active_steps,
                "kernels": [
                    {"name": e.key, "calls": e.count, "self_time_us": getattr(e, column)}
                    for e in slowest[: self.config.num_kernels]
                ],
            },
        )
        self._write_memory(trace)
        rank_zero_info(f"profile: {self._folder}")

    def _write_memory(self, trace: Path) -> None:
        """Allocated bytes over time, from the trace's own memory events."""
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        timeline = [
            {
                "time_us": event["ts"],
                "device_type": event["args"]["Device Type"],
                "change_bytes": event["args"]["Bytes"],
                "allocated_bytes": event["args"]["Total Allocated"],
            }
            for event in events
            if event.get("name") == "[memory]"
        ]
        with replacing(self._folder / "memory.json.gz") as partial:
            partial.write_bytes(gzip.compress(json.dumps(timeline).encode()))
        if self._on_cuda:
            with replacing(self._folder / "memory_snapshot.pickle") as partial:
                torch.cuda.memory._dump_snapshot(str(partial))
