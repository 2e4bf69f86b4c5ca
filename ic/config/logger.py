"""Where metrics go, and the loggers that take them there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ic.files.run_folder import RunFolder
from ic.tracking.server import check_server, server_uri

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from ic.tracking.identity import Identity


@dataclass
class WandbConfig:
    """Weights & Biases. Credentials come from the environment.

    Attributes:
        project: of W&B, in which the run appears.
        mode: `offline` keeps everything in the run's folder until `python -m ic sync` sends it;
            `online` sends while training.
        tags: of the run.
    """

    project: str = "infinite-context"
    mode: str = "offline"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline"):
            raise ValueError(f"logger.wandb.mode={self.mode!r}: choose online or offline")

    def check_here(self) -> None:
        """Raises:
        ValueError: W&B is not installed.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "logger=wandb: the package wandb is not installed here; pip install wandb, or "
                "choose logger=default"
            )

    def build(
        self, name: str, run_id: str, stage: str | None, folder: RunFolder, who: Identity
    ) -> Logger:
        """One W&B run for a run of ours, over all its resumes.

        Raises:
            ValueError: as `check_here`.
        """
        self.check_here()
        from ic.tracking.wandb_logger import WeightsAndBiases

        return WeightsAndBiases(
            folder,
            who,
            online=self.mode == "online",
            name=f"{name}/{run_id}",
            project=self.project,
            group=name,
            job_type=stage,
            tags=self.tags,
        )


@dataclass
class MLflowConfig:
    """MLflow's tracking server. Credentials come from the environment.

    Attributes:
        uri: of the server, such as http://127.0.0.1:5000, where `make mlflow` starts one; null is
            $MLFLOW_TRACKING_URI.
        experiment: of MLflow, in which the run appears.
        mode: `online` sends while training; `offline` keeps everything in the run's folder until
            `python -m ic sync` sends it.
    """

    uri: str | None = None
    experiment: str = "infinite-context"
    mode: str = "online"

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline"):
            raise ValueError(f"logger.mlflow.mode={self.mode!r}: choose online or offline")
        if not self.experiment.strip():
            raise ValueError("logger.mlflow.experiment is empty: give a name")
        if self.uri is not None:
            check_server("logger.mlflow.uri", self.uri)

    def server(self) -> str:
        """The server's address.

        Raises:
            UsageError: MLflow's client is not installed, or no server is named.
        """
        return server_uri("logger.mlflow.uri", self.uri)

    def build(self, name: str, run_id: str, folder: RunFolder, who: Identity) -> Logger:
        """One MLflow run for a run of ours, over all its resumes.

        Raises:
            UsageError: as `server`.
        """
        uri = self.server()
        from ic.tracking.mlflow_logger import MLflow

        online = self.mode == "online"
        return MLflow(folder, who, uri, self.experiment, f"{name}/{run_id}", online)


@dataclass
class LoggerConfig:
    """Where metrics go.

    Attributes:
        csv: a table, `csv/metrics.csv`.
        tensorboard: TensorBoard's files, `tensorboard/`.
        diff: whether W&B and MLflow are told what the checkout has changed since its commit.
    """

    csv: bool = True
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    mlflow: MLflowConfig | None = None
    diff: bool = True

    def check_here(self) -> None:
        """Ask at once what `build` would find missing once PyTorch has loaded.

        Raises:
            ValueError: a tracker's package is not installed, or its server is not named.
        """
        if self.wandb is not None:
            self.wandb.check_here()
        if self.mlflow is not None:
            self.mlflow.server()

    def build(
        self,
        name: str,
        run_id: str,
        folder: RunFolder,
        first_step: int | None,
        *,
        stage: str = "pretrain",
        goes_on: bool = False,
    ) -> list[Logger]:
        """Loggers of a run; CSV and TensorBoard write into its folder.

        Args:
            name, run_id: of the run.
            first_step: the first step of a run that continues; None for one that begins.
            stage: what the run does, in a word, for W&B.
            goes_on: whether trackers know this run already, from an earlier start of it.

        Raises:
            ValueError: a tracker's package is not installed, or its server is not named.
        """
        from ic.tracking.csv_logger import MetricsLogger
        from ic.tracking.identity import identify
        from ic.tracking.tensorboard import TensorBoard

        loggers: list[Logger] = []
        if self.csv:
            loggers.append(MetricsLogger(folder, first_step))
        if self.tensorboard:
            loggers.append(TensorBoard(folder.path, name="", version=folder.tensorboard.name))
        who = identify(folder, name, run_id, goes_on)
        if self.wandb is not None:
            loggers.append(self.wandb.build(name, run_id, stage, folder, who))
        if self.mlflow is not None:
            loggers.append(self.mlflow.build(name, run_id, folder, who))
        return loggers
