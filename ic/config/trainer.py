"""Arguments of `lightning.Trainer`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ic.files.saved_config import MAY_CHANGE

_MAX_TIME = re.compile(r"\d{1,4}:([01]\d|2[0-3]):[0-5]\d:[0-5]\d", re.ASCII)


@dataclass
class TrainerConfig:
    """Arguments of `lightning.Trainer` under their own names.

    Attributes:
        max_steps: optimizer steps after which training ends; -1 for no limit but `max_time`.
        max_time: `DD:HH:MM:SS`; the schedule follows whichever of steps and time is further.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: processes of a host: `auto`, a number or, on GPUs, a list of their indices.
        num_nodes: hosts; in a SLURM job this and `devices` are the job's.
        precision: `32-true`, `bf16-mixed` or another of Lightning's.
        accumulate_grad_batches: micro-batches of one optimizer step.
        gradient_clip_val: largest norm of the gradient; null does not clip.
        val_check_interval: optimizer steps between validations.
        limit_val_batches: most batches of a validation; null for all.
        num_sanity_val_steps: validation batches before the first step; -1 for all.
        log_every_n_steps: optimizer steps between two rows of the loggers.
        deterministic: only algorithms that give the same sums every time; slower on a GPU.
        detect_anomaly: name the operation that made a NaN; slow.
    """

    max_steps: int = 1000
    max_time: str | None = field(default=None, metadata=MAY_CHANGE)
    accelerator: str = "auto"
    devices: Any = field(default="auto", metadata=MAY_CHANGE)
    num_nodes: int = field(default=1, metadata=MAY_CHANGE)
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    val_check_interval: int = 250
    limit_val_batches: int | None = None
    num_sanity_val_steps: int = 0
    log_every_n_steps: int = field(default=10, metadata=MAY_CHANGE)
    deterministic: bool = False
    detect_anomaly: bool = False

    def __post_init__(self) -> None:
        if self.max_steps < 1 and not (self.max_steps == -1 and self.max_time):
            raise ValueError(
                f"trainer.max_steps={self.max_steps}: at least 1, or -1 with trainer.max_time"
            )
        if self.max_time is not None and not (
            _MAX_TIME.fullmatch(self.max_time) and self.max_time.strip("0:")
        ):
            raise ValueError(
                f"trainer.max_time={self.max_time!r}: write days:hours:minutes:seconds, more than "
                "none of them, for example 00:00:07:00"
            )
        for name in (
            "num_nodes",
            "accumulate_grad_batches",
            "val_check_interval",
            "log_every_n_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: must be at least 1")
        for name in ("gradient_clip_val", "limit_val_batches"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: must be at least 0")
