"""Tokens a second, step time, data wait and model FLOPs utilisation of a training run.

A step lasts from the end of the step before it to its own end, so that it includes the wait for its
data. **Data wait** is the part between `on_train_batch_end` and the next `on_train_batch_start`:
fetching and copying the batch, and what other callbacks and loggers do there. On CUDA both are
taken on the GPU's timeline (`ic.callbacks.step_timer`), so data that arrives while the GPU is busy
costs nothing.

Left out: the first `warmup_steps` at each context length (compilation, autotuning, the allocator's
growth), and each step in which something else ran: validation, a checkpoint, a `throughput_paused`
block. Their tokens count as seen, not as timed.

**MFU** is `train_flops_per_token` (what the model needs, recomputation not counted, attention over
the whole causal context even where documents are masked from each other) times tokens, over time
and the GPUs' peak dense bf16 rate, whatever precision the run uses. Of a distillation it is
the student's: the teacher's forward pass and the comparison take time and add no FLOPs. Tokens of
one step are those of this rank's batches times the number of data-parallel replicas, which all get
the same shape.
"""

from __future__ import annotations

import logging
import platform
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.callbacks.options import ThroughputOptions
from ic.callbacks.step_timer import CudaTimer, HostTimer, StepTimer
from ic.callbacks.throughput_summary import TimedStep, summarise, summarise_by_context_length
from ic.datamodules.batch import Batch
from ic.files.atomic_write import write_json
from ic.files.run_folder import RunFolder
from ic.machine.devices import device_name
from ic.machine.gpus import find_gpu
from ic.model.config import MLAConfig
from ic.model.cost import train_flops_per_token
from ic.training.continues_run import continues_run
from ic.training.find_callback import find_callback

log = logging.getLogger(__name__)


# Names under train/, and the summary's keys.
LOGGED = {
    "tokens_per_s": "tokens_per_s",
    "step_time_s": "step_time_median_s",
    "data_wait_share": "data_wait_share",
    "mfu": "mfu",
}


@dataclass
class _OpenStep:
    """An optimizer step that is running: one batch, or several with gradient accumulation."""

    begin: Any = None
    end: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    context_length: int = 0
    tokens: int = 0
    flops: float = 0.0
    interrupted: bool = False


class Throughput(Callback):
    """Logs `train/tokens_per_s`, `train/step_time_s`, `train/data_wait_share` and `train/mfu`.

    Writes `throughput.json` below `trainer.default_root_dir` when training ends or fails. It tells
    of the whole run, also after a resume. A run that begins from another run's checkpoint has a
    record of its own: `first_step` says where.

    Attributes:
        tokens_seen: by all devices, since the run began.
        is_paused: whether something else than training runs, which is not timed.

    Args:
        timer: for tests; by default CUDA events or the host's clock.
    """

    def __init__(
        self, config: ThroughputOptions | None = None, timer: StepTimer | None = None
    ) -> None:
        self.config = config or ThroughputOptions()
        self.steps: list[TimedStep] = []
        self._timer: StepTimer = timer or HostTimer()
        self._has_own_timer = timer is None
        self._window: deque[TimedStep] = deque(maxlen=self.config.window_steps)
        self._unread: list[_OpenStep] = []
        self._step = _OpenStep()
        self._last_end: Any = None
        self._seen: dict[int, int] = {}
        self._seen_here: dict[int, int] = {}  # since this process started, for its warm-up
        self._num_interrupted = 0
        self.tokens_seen = 0
        self.is_paused = False
        self._first_step = self._global_step = 0
        self._replicas = self._num_devices = 1
        self._model_config: MLAConfig | None = None
        self._peak: tuple[float, str] | None = None
        self._earlier: dict[str, Any] = {}  # of the run's earlier starts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the step that contains, or follows, the body out of the timing."""
        self._step.interrupted = self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if self._has_own_timer and device.type == "cuda":
            self._timer = CudaTimer(device)
        sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        self._replicas = sampler.get("num_replicas", 1)
        self._num_devices = trainer.world_size
        self._first_step = self._global_step = trainer.global_step
        if self._earlier and continues_run(trainer):
            self._add(self._earlier)
        self._earlier = {}
        self._step, self._last_end = _OpenStep(), None
        config = getattr(getattr(pl_module, "model", None), "config", None)
        self._model_config = config if isinstance(config, MLAConfig) else None
        self._peak = self._find_peak(device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        start = self._timer.mark()
        if self._last_end is not None:
            self._step.waits.append((self._last_end, start))
        elif self._step.begin is None:
            self._step.begin = start  # of the process's first step, whose wait is not known

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        step = self._step
        rows, step.context_length = batch["input_ids"].shape
        tokens = rows * step.context_length * self._replicas
        step.tokens += tokens
        self.tokens_seen += tokens
        if self._model_config is not None:
            step.flops += tokens * train_flops_per_token(self._model_config, step.context_length)
        self._last_end = step.end = self._timer.mark()
        if trainer.global_step == self._global_step:
            return  # gradients are still being accumulated
        self._global_step = trainer.global_step
        self._close_step()
        # The newest step may still be queued on the GPU.
        num_ready = len(self._unread) - (not self._timer.is_free)
        if self._should_read(trainer) and self._read(num_ready):
            pl_module.log_dict(self._window_metrics(), on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step.interrupted = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._step.interrupted = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            self._seen
        ):  # else only the evaluation was left, of a run that an earlier version trained
            self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._unread.clear()  # after a failure the GPU may not answer
        if not self._seen:
            return
        try:
            self._finish(trainer)
        except OSError as error:  # a full disk must not hide the exception that ended the run
            log.error("throughput.json not written: %s", error)

    def state_dict(self) -> dict[str, Any]:
        self._read(len(self._unread))
        return {
            "first_step": self._first_step,
            "seen": dict(self._seen),
            "num_interrupted": self._num_interrupted,
            "tokens_seen": self.tokens_seen,
            "steps": torch.tensor([astuple(step) for step in self.steps], dtype=torch.float64),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict

    def _add(self, earlier: dict[str, Any]) -> None:
        """Go on with the record of the run's earlier starts."""
        self._first_step = earlier["first_step"]
        self._seen = dict(earlier["seen"])
        self._num_interrupted = earlier["num_interrupted"]
        self.tokens_seen = earlier["tokens_seen"]
        self.steps = [
            TimedStep(int(length), int(tokens), *rest)
            for length, tokens, *rest in earlier["steps"].tolist()
        ]

    def _close_step(self) -> None:
        step, self._step = self._step, _OpenStep(begin=self._last_end)
        for seen in (self._seen, self._seen_here):
            seen[step.context_length] = seen.get(step.context_length, 0) + 1
        is_warmup = self._seen_here[step.context_length] <= self.config.warmup_steps
        if step.interrupted:
            self._num_interrupted += 1
        elif not is_warmup and step.begin is not None:
            self._unread.append(step)

    def _should_read(self, trainer: Trainer) -> bool:
        if self._timer.is_free or trainer.global_step % self.config.sync_every_n_steps == 0:
            return True
        log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return log_every > 0 and trainer.global_step % log_every == 0

    def _read(self, num_steps: int) -> bool:
        """Turn the marks of the oldest steps into seconds; whether there were any."""
        ready, self._unread = self._unread[: max(0, num_steps)], self._unread[max(0, num_steps) :]
        if not ready:
            return False
        self._timer.settle(ready[-1].end)
        for step in ready:
            timed = TimedStep(
                step.context_length,
                step.tokens,
                step.flops,
                self._timer.seconds(step.begin, step.end),
                sum(self._timer.seconds(begin, end) for begin, end in step.waits),
            )
            if self._window and self._window[-1].context_length != timed.context_length:
                self._window.clear()  # an average over two lengths describes neither
            self._window.append(timed)
            self.steps.append(timed)
        return True

    def _window_metrics(self) -> dict[str, float]:
        summary = summarise(self._window, self._total_peak)
        return {f"train/{name}": summary[key] for name, key in LOGGED.items() if key in summary}

    def _finish(self, trainer: Trainer) -> None:
        self._read(len(self._unread))
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        report = {
            "device": device_name(device),
            "num_devices": self._num_devices,
            "num_data_parallel_replicas": self._replicas,
            "precision": str(trainer.precision),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "cuda": torch.version.cuda if device.type == "cuda" else None,
                "lightning": lightning.__version__,
            },
            "clock": self._timer.name,
            "peak_bf16_flops_per_device": self._peak[0] if self._peak else None,
            "peak_source": self._peak[1] if self._peak else None,
            "first_step": self._first_step,
            "last_step": trainer.global_step,
            "num_steps": sum(self._seen.values()),
            "num_steps_interrupted": self._num_interrupted,
            "warmup_steps_per_context_length": self.config.warmup_steps,
            "tokens_seen": self.tokens_seen,
            **summarise(self.steps, self._total_peak),
            "by_context_length": self._by_context_length(),
        }
        write_json(RunFolder(trainer.default_root_dir).throughput, report)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For the results file: throughput by context length."""
        return [{"what": "training", **entry} for entry in self._by_context_length()]

    def _by_context_length(self) -> list[dict[str, Any]]:
        return summarise_by_context_length(self.steps, self._seen, self._total_peak)

    @property
    def _total_peak(self) -> float | None:
        return self._peak[0] * self._num_devices if self._peak else None

    def _find_peak(self, device: torch.device) -> tuple[float, str] | None:
        name = device_name(device)
        if self._model_config is None:
            rank_zero_info("MFU is left out: the module has no model.config of type MLAConfig.")
            return None
        if self.config.peak_bf16_flops is not None:
            return self.config.peak_bf16_flops, "set by the user"
        gpu = find_gpu(name)
        if gpu is None:
            rank_zero_info(
                f"MFU is left out: no peak bf16 rate is known for {name!r}; "
                "set the throughput callback's peak_bf16_flops to its FLOP/s to have it."
            )
            return None
        return gpu.peak_bf16_flops, gpu.source


@contextmanager
def throughput_paused(trainer: Trainer) -> Iterator[None]:
    """Leave the body's time out of the trainer's `Throughput`, if it has one."""
    throughput = find_callback(trainer, Throughput)
    with nullcontext() if throughput is None else throughput.paused():
        yield
