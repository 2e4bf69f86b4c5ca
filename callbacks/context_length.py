"""Adaptive curriculum over context length.

Retrieval forms at short length first and then carries over within tens of steps a doubling; a fixed
schedule can sit at a length that the model has not begun to master (docs/recipe.md, point 1).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ic.callbacks.options import AdaptiveContextLengthOptions
from ic.files.atomic_write import write_json
from ic.files.run_folder import RunFolder


class AdaptiveContextLength(Callback):
    """Starts at `start_length` and doubles up to the datamodule's `context_length`.

    The average starts again from zero at each length, so that a doubling rests on that length
    alone. State and length survive a resume; the length itself is part of the datamodule's state.

    When training ends, `context_length.json` below `trainer.default_root_dir` says at which step
    and after how many seconds of training each length was reached: validation included, the time
    between two starts of a resumed run not.

    Attributes:
        history: (step, length in tokens, seconds) of the first length and of each doubling.
    """

    def __init__(self, config: AdaptiveContextLengthOptions) -> None:
        self.config = config
        self.average: Tensor | float = 0.0
        self.history: list[tuple[int, int, float]] = []
        self._restored = False
        self._elapsed_before_s = 0.0  # in the starts before this one
        self._began_s = time.perf_counter()
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "set_context_length"):
            raise ValueError(
                f"callbacks.context_length needs data whose length can change, not "
                f"{type(data).__name__}; set callbacks.context_length=null"
            )
        if not self._restored:
            data.set_context_length(min(self.config.start_length, data.config.context_length))
            self.history = [(trainer.global_step, data.context_length, 0.0)]
        self._began_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accuracy = trainer.callback_metrics.get("train/answer_accuracy")
        if accuracy is None or trainer.global_step == self._last_step:
            return  # a micro-batch within a step
        self._last_step = trainer.global_step
        weight = self.config.new_weight
        # Stays a tensor on the device: reading it would wait for the GPU on every step.
        self.average = (1 - weight) * self.average + weight * accuracy.detach()
        if trainer.global_step % self.config.check_every_n_steps:
            return
        mean = trainer.strategy.reduce(torch.as_tensor(self.average), reduce_op="mean")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if float(mean) < self.config.threshold:
            return
        if data.context_length < data.config.context_length:
            length = min(2 * data.context_length, data.config.context_length)
            data.set_context_length(length)
            self.average = 0.0
            self.history.append((trainer.global_step, length, self._elapsed_s()))
            rank_zero_info(f"step {trainer.global_step}: context length {length}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            reached = [
                {"context_length_tokens": length, "step": step, "elapsed_s": seconds}
                for step, length, seconds in self.history
            ]
            write_json(RunFolder(trainer.default_root_dir).context_length, {"reached": reached})

    def state_dict(self) -> dict[str, Any]:
        return {
            "average": float(self.average),
            "history": [list(row) for row in self.history],
            "elapsed_s": self._elapsed_s(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A tensor again: the same float32 arithmetic as in the run that saved it.
        self.average = torch.tensor(state_dict["average"])
        self.history = [tuple(row) for row in state_dict["history"]]
        self._elapsed_before_s = state_dict["elapsed_s"]
        self._restored = True

    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + time.perf_counter() - self._began_s
