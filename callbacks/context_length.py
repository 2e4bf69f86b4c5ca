"""Context lengths that change while a run trains: doubled once answers are mastered, or at given
steps.

Retrieval forms at short length first and then carries over within tens of steps a doubling; a fixed
schedule can sit at a length that the model has not begun to master (docs/recipe.md, point 1). A
model that can read already needs no proof of it, and text has no answers: its lengths are given.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ic.callbacks.options import ContextLengthOptions
from ic.files.atomic_write import write_json
from ic.files.run_folder import RunFolder


class ContextLength(Callback, ABC):
    """Changes the length of the datamodule's training rows, and keeps when.

    Length and history survive a resume; the length itself is part of the datamodule's state too.

    When training ends, `context_length.json` below `trainer.default_root_dir` says at which step
    and after how many seconds of training each length was reached: validation included, the time
    between two starts of a resumed run not.

    Attributes:
        history: (step, length in tokens, seconds) of the first length and of each later one.
    """

    def __init__(self, config: ContextLengthOptions) -> None:
        self.config = config
        self.history: list[tuple[int, int, float]] = []
        self._elapsed_before_s = 0.0  # in the starts before this one
        self._began_s = time.perf_counter()

    @abstractmethod
    def first_length(self, trainer: Trainer) -> int | None:
        """The length with which training goes on; None for the datamodule's own."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "set_context_length"):
            raise ValueError(
                f"callbacks.context_length needs data whose length can change, not "
                f"{type(data).__name__}; set callbacks.context_length=null"
            )
        self._began_s = time.perf_counter()
        length = self.first_length(trainer)
        if length is not None:
            self._change(trainer, length)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            reached = [
                {"context_length_tokens": length, "step": step, "elapsed_s": seconds}
                for step, length, seconds in self.history
            ]
            write_json(RunFolder(trainer.default_root_dir).context_length, {"reached": reached})

    def state_dict(self) -> dict[str, Any]:
        return {"history": [list(row) for row in self.history], "elapsed_s": self._elapsed_s()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [tuple(row) for row in state_dict["history"]]
        self._elapsed_before_s = state_dict["elapsed_s"]

    def _change(self, trainer: Trainer, length: int) -> None:
        """Train on at another length, from the next batch that is used."""
        trainer.datamodule.set_context_length(length)  # type: ignore[attr-defined]
        if not self.history or self.history[-1][1] != length:
            seconds = self._elapsed_s() if self.history else 0.0
            self.history.append((trainer.global_step, length, seconds))

    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + time.perf_counter() - self._began_s


class StagedContextLength(ContextLength):
    """The length of the latest of `stages` that has begun; it depends on the step alone."""

    def first_length(self, trainer: Trainer) -> int | None:
        for _, length in self.config.stages:  # what would be refused amid the run is refused now
            trainer.datamodule.set_context_length(length)  # type: ignore[attr-defined]
        return self._length_at(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        length = self._length_at(trainer.global_step)
        if length != trainer.datamodule.context_length:  # type: ignore[attr-defined]
            self._change(trainer, length)
            rank_zero_info(f"step {trainer.global_step}: context length {length}")

    def _length_at(self, step: int) -> int:
        return next(length for begin, length in reversed(self.config.stages) if begin <= step)


class AdaptiveContextLength(ContextLength):
    """Starts at `start_length` and doubles up to the datamodule's `context_length`.

    The average starts again from zero at each length, so that a doubling rests on that length
    alone.
    """

    def __init__(self, config: ContextLengthOptions) -> None:
        super().__init__(config)
        self.average: Tensor | float = 0.0
        self._restored = False
        self._last_step = 0

    def first_length(self, trainer: Trainer) -> int | None:
        longest: int = trainer.datamodule.config.context_length  # type: ignore[attr-defined]
        return None if self._restored else min(self.config.start_length, longest)

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
            self.average = 0.0
            self._change(trainer, length)
            rank_zero_info(f"step {trainer.global_step}: context length {length}")

    def state_dict(self) -> dict[str, Any]:
        return {"average": float(self.average), **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # A tensor again: the same float32 arithmetic as in the run that saved it.
        self.average = torch.tensor(state_dict["average"])
        self._restored = True
