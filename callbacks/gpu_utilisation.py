"""How busy the GPUs were, as NVML tells.

NVML's number (`nvidia-smi` shows the same) is the share of time in which at least one kernel ran.
It says nothing about how much of the GPU that kernel used, and an NCCL kernel that waits for
another rank counts as busy. It shows a GPU that starves for data or for a slow exchange through the
host; how much of its arithmetic a run uses is the MFU of `ic.callbacks.throughput`, the honest
number.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.callbacks.options import GpuUtilisationOptions
from ic.files.atomic_write import write_json
from ic.files.run_folder import RunFolder

# NVML averages over up to a second before the question, so the first answers tell of the warm-up.
_NVML_WINDOW_S = 1.0


class GpuUtilisation(Callback):
    """Samples each rank's GPU from the end of the warm-up to the end of training.

    Writes `gpu_utilisation.json` below `trainer.default_root_dir`, `{mean, by_gpu, num_samples}`
    with shares from 0 to 1 (null without a sample), and logs `gpu_utilisation`. Whatever happens in
    between counts: validation, evaluation, checkpoints. Without a CUDA GPU it does nothing.
    """

    def __init__(self, config: GpuUtilisationOptions | None = None) -> None:
        self.config = config or GpuUtilisationOptions()
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._device: torch.device | None = None
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        self._first_step, self._samples, self._thread = trainer.global_step, [], None
        self._stop.clear()
        try:
            torch.cuda.utilization(device)
        except Exception as error:  # no library, no driver, no permission: NVML has many errors
            rank_zero_info(
                f"GPU utilisation is left out: {error}; it needs nvidia-ml-py (pip install "
                "'infinite-context[gpu]') and a driver that answers"
            )
            return
        self._device = device

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._device is None or self._thread is not None:
            return
        if trainer.global_step - self._first_step >= self.config.warmup_steps:
            self._thread = threading.Thread(
                target=self._sample, args=(self._device,), name="gpu-utilisation", daemon=True
            )
            self._thread.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.root_device.type != "cuda":
            return
        self._finish()
        count = len(self._samples)
        # A sum, because gloo sums on a GPU whatever its version: each rank fills in its own line.
        table = torch.zeros(trainer.world_size, 2, device=trainer.strategy.root_device)
        table[trainer.global_rank] = torch.tensor([sum(self._samples) / max(count, 1), count])
        by_rank = cast(torch.Tensor, trainer.strategy.reduce(table, reduce_op="sum")).tolist()
        by_gpu = [mean if number else None for mean, number in by_rank]
        known = [mean for mean in by_gpu if mean is not None]
        mean = sum(known) / len(known) if known else None
        if not trainer.is_global_zero or (mean is None and trainer.global_step == self._first_step):
            return  # a run that had only its evaluation left keeps what it has written
        write_json(
            RunFolder(trainer.default_root_dir).gpu_utilisation,
            {"mean": mean, "by_gpu": by_gpu, "num_samples": [int(n) for _, n in by_rank]},
        )
        if mean is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"gpu_utilisation": mean}, step=trainer.global_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._finish()

    def _sample(self, device: torch.device) -> None:
        wait_s = max(self.config.every_s, _NVML_WINDOW_S)
        while not self._stop.wait(wait_s):
            self._samples.append(torch.cuda.utilization(device) / 100)
            wait_s = self.config.every_s

    def _finish(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
