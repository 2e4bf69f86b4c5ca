"""Where a run's memory goes: peaks by phase, split by what holds them, and a snapshot on
out-of-memory.

What each number is, and is not, stands in `ic.callbacks.memory_phases`. Numbers are of this rank's
first device; the files hold rank 0's. With FSDP or data parallelism the other ranks are alike, with
pipeline stages they are not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from ic.callbacks.memory_accounting import (
    CudaMeter,
    MemoryMeter,
    ProcessMeter,
    optimizer_state,
    storage_bytes,
)
from ic.callbacks.memory_phases import GradientWatch, Phase, PhaseRecorder
from ic.callbacks.memory_plot import draw_phases
from ic.callbacks.oom_snapshot import stop_watching, watch_out_of_memory, write_oom_snapshot
from ic.callbacks.options import MemoryProfilerOptions
from ic.datamodules.batch import Batch
from ic.files.atomic_write import write_json
from ic.files.run_folder import RunFolder
from ic.machine.devices import device_name
from ic.training.continues_run import continues_run
from ic.training.find_callback import find_callback

log = logging.getLogger(__name__)


class MemoryProfiler(Callback):
    """Writes `memory/memory.json` and `memory/memory.png` below `trainer.default_root_dir`.

    Phases are `setup`, `forward`, `backward`, `optimizer_step` (clipping included), `validation`,
    `test`, `predict` and those that other callbacks name through `memory_phase`. A trainer that
    only evaluates writes `memory_<verb>.json` instead, so that evaluating a run keeps the record of
    its training. The record is of the whole run: that of the starts before a resume is added to.

    Args:
        meter: the counter to read; by default the CUDA allocator's or the process's resident
            memory.
    """

    def __init__(
        self, config: MemoryProfilerOptions | None = None, meter: MemoryMeter | None = None
    ) -> None:
        self.config = config or MemoryProfilerOptions()
        self.recorder: PhaseRecorder | None = None
        self._meter = meter
        self._trainer: Trainer | None = None
        self._device = torch.device("cpu")
        self._verb = "fit"
        self._has_oom_hook = False
        self._open: Phase | None = None
        self._watch: GradientWatch | None = None
        self._num_steps = 0
        self._global_step = 0
        self._earlier: dict[str, Any] = {}  # of the run's earlier starts

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Measure the body as phase `name`. In nested phases only the innermost is measured."""
        if self.recorder is None:
            raise RuntimeError(
                f"MemoryProfiler.phase({name!r}) before the trainer has called setup()"
            )
        phase = self.recorder.enter(Phase(name))
        try:
            yield phase
        finally:
            self.recorder.leave(phase)

    def _switch(self, name: str | None, other_bytes: int | None = None) -> None:
        """Close the phase that Lightning's last hook opened; open the next."""
        assert self.recorder is not None
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._open is not None:
            self.recorder.leave(self._open)
        self._open = self.recorder.enter(Phase(name, other_bytes)) if name else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        self._device = device = trainer.strategy.root_device
        on_cuda = device.type == "cuda"
        if self.recorder is None:
            host_meter = ProcessMeter(self.config.reset_host_peak) if not on_cuda else None
            meter = self._meter or host_meter or CudaMeter(device)
            self.recorder = PhaseRecorder(meter, self._held_bytes)
            self._verb = TrainerFn(stage).value
        if on_cuda and self.config.oom_snapshot:
            path = RunFolder(trainer.default_root_dir).oom_snapshot(trainer.global_rank)
            self._has_oom_hook = watch_out_of_memory(path, self.config.oom_history_entries)
        self._switch("setup")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._earlier and self.recorder is not None and continues_run(trainer):
            self.recorder.add(self._earlier)
        self._earlier = {}
        self._global_step = trainer.global_step
        self._switch(None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._is_due():
            self._describe(trainer, batch)
            self._switch("forward")

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self._open is None or self.recorder is None:
            return
        # The counter now shows activations too, so what is neither ours nor theirs comes from
        # forward's beginning.
        self._switch("backward", other_bytes=self._open.other_bytes)
        self._watch = GradientWatch(
            self.recorder.meter, self._open, pl_module.parameters(), self._device
        )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._open is not None:
            # With manual optimization another forward may follow in the same training_step.
            self._switch(None if pl_module.automatic_optimization else "forward")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._is_due():
            self._switch("optimizer_step")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        was_due = self._is_due()
        if was_due:
            self._switch(None)
        if trainer.global_step == self._global_step:
            return  # gradients are still being accumulated
        self._global_step = trainer.global_step
        self._num_steps += 1
        if was_due and trainer.is_global_zero:
            self._log(trainer)
            self._write_json(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch(None)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch(None)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch(None)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any
    ) -> None:
        self._describe(trainer, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any
    ) -> None:
        self._describe(trainer, batch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here rather than in on_train_end: other callbacks evaluate in theirs, after ours.
        self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        out_of_memory = isinstance(exception, torch.cuda.OutOfMemoryError)
        if out_of_memory and self.config.oom_snapshot and not self._has_oom_hook:
            path = RunFolder(trainer.default_root_dir).oom_snapshot(trainer.global_rank)
            write_oom_snapshot(path, "PyTorch lacks the hook: taken afterwards")
        try:
            self._finish(trainer)
        except OSError as error:  # a full disk must not hide the exception that ended the run
            log.error("memory profile not written: %s", error)

    def state_dict(self) -> dict[str, Any]:
        assert self.recorder is not None
        return {"num_steps": self._num_steps, **self.recorder.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_steps = state_dict["num_steps"]
        self._earlier = state_dict

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For the results file: the peak of the run."""
        if self.recorder is None:
            return []
        peak = self.recorder.run_peak_bytes
        return [{"what": "memory", "meter": self.recorder.meter.name, "peak_bytes": peak}]

    @torch.no_grad()
    def _held_bytes(self) -> dict[str, int]:
        assert self._trainer is not None
        module, device = self._trainer.lightning_module, self._device
        parameters = list(module.parameters())
        return {
            "parameters": storage_bytes([*parameters, *module.buffers()], device),
            "gradients": storage_bytes((p.grad for p in parameters), device),
            "optimizer": storage_bytes(optimizer_state(self._trainer.optimizers), device),
        }

    def _is_due(self) -> bool:
        every = self.config.every_n_steps
        if self._num_steps < self.config.first_steps:
            return True
        return every > 0 and self._num_steps % every == 0

    def _describe(self, trainer: Trainer, batch: Batch) -> None:
        assert self.recorder is not None
        self.recorder.step = trainer.global_step
        self.recorder.context_length_tokens = batch["input_ids"].shape[1]

    def _finish(self, trainer: Trainer) -> None:
        stop_watching()
        if self.recorder is None:
            return
        self._switch(None)
        self.recorder.leave_all()
        if not trainer.is_global_zero:
            return
        report = self._write_json(trainer)
        title = f"Peak memory by phase, {report['device']}"
        if report["meter"] == "process_rss":
            title += " (resident memory of the process)"
        run = RunFolder(trainer.default_root_dir)
        draw_phases(report["phases"], title, run.memory_plot(self._verb))

    def _write_json(self, trainer: Trainer) -> dict[str, Any]:
        assert self.recorder is not None
        report = {
            "device": device_name(self._device),
            "meter": self.recorder.meter.name,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "run_peak_bytes": self.recorder.total_peak_bytes(),
            "phases": {name: asdict(record) for name, record in self.recorder.records.items()},
        }
        write_json(RunFolder(trainer.default_root_dir).memory(self._verb), report)
        return report

    def _log(self, trainer: Trainer) -> None:
        assert self.recorder is not None
        metrics = {"memory/run_peak_gib": self.recorder.total_peak_bytes() / 2**30}
        for name in ("forward", "backward", "optimizer_step"):
            if (record := self.recorder.records.get(name)) is not None:
                metrics[f"memory/{name}_peak_gib"] = record.split_of_bytes / 2**30
        for logger in trainer.loggers:  # with the other metrics of this step
            logger.log_metrics(metrics, step=trainer.global_step - 1)


@contextmanager
def memory_phase(trainer: Trainer, name: str) -> Iterator[Phase]:
    """Measure the body as phase `name` if the trainer has a `MemoryProfiler`; else just run it.

    with memory_phase(trainer, "passkey") as phase:
        ...
        phase.record_cache(cache)
    """
    profiler = find_callback(trainer, MemoryProfiler)
    with nullcontext(Phase(name)) if profiler is None else profiler.phase(name) as phase:
        yield phase
