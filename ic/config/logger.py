"""Where metrics go, and the loggers that take them there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ic.files.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@dataclass
class WandbConfig:
    """Weights & Biases. Credentials come from the environment.

    Attributes:
        project: of W&B, in which the run appears.
        mode: `offline` writes to disk only; `online` sends.
        tags: of the run.
    """

    project: str = "infinite-context"
    mode: str = "offline"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline"):
            raise ValueError(f"logger.wandb.mode={self.mode!r}: choose online or offline")

    def build(self, name: str, run_id: str, folder: RunFolder) -> Logger:
        """One W&B run for a run of ours, over all its resumes.

        Raises:
            ValueError: W&B is not installed.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "logger=wandb: the package wandb is not installed here; pip install wandb, or "
                "choose logger=default"
            )
        from ic.tracking.loggers import WeightsAndBiases

        return WeightsAndBiases(
            name=f"{name}/{run_id}",
            save_dir=folder.path,
            project=self.project,
            # W&B refuses commas, which a sweep's jobs have in theirs.
            id=f"{name}-{run_id}".replace(",", "-"),
            resume="allow",
            offline=self.mode == "offline",
            tags=self.tags,
        )


@dataclass
class LoggerConfig:
    """Where metrics go.

    Attributes:
        csv: a table, `csv/metrics.csv`.
        tensorboard: TensorBoard's files, `tensorboard/`.
    """

    csv: bool = True
    tensorboard: bool = True
    wandb: WandbConfig | None = None

    def build(
        self, name: str, run_id: str, folder: RunFolder, first_step: int | None
    ) -> list[Logger]:
        """Loggers of a run; CSV and TensorBoard write into its folder.

        Args:
            name, run_id: of the run.
            first_step: the first step of a run that continues; None for one that begins.
        """
        from ic.tracking.csv_logger import MetricsLogger
        from ic.tracking.loggers import TensorBoard

        loggers: list[Logger] = []
        if self.csv:
            loggers.append(MetricsLogger(folder, first_step))
        if self.tensorboard:
            loggers.append(TensorBoard(folder.path, name="", version=folder.tensorboard.name))
        if self.wandb is not None:
            loggers.append(self.wandb.build(name, run_id, folder))
        return loggers
