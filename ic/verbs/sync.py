"""send what a run has kept for W&B and MLflow: offline, or while a server was down"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ic.errors import UsageError
from ic.tracking.server import check_server

if TYPE_CHECKING:
    from ic.tracking.background import Sender

POSITIONAL = ("run",)


@dataclass
class Config:
    """The verb `sync`.

    Attributes:
        run: a run's folder, in which nobody trains now.
        uri: of MLflow's server; null is the run's own, or $MLFLOW_TRACKING_URI. Another server than
            before is told the whole run.
    """

    run: str = "???"
    uri: str | None = None

    def __post_init__(self) -> None:
        if self.uri is not None:
            check_server("uri", self.uri)


def run(config: Config) -> int:
    """Send to MLflow and to W&B, whichever of the two the run has messages for."""
    from ic.config.from_run import config_of_run
    from ic.config.logger import MLflowConfig, WandbConfig
    from ic.files.run_folder import RunFolder
    from ic.files.run_lock import locked
    from ic.tracking.identity import saved_identity
    from ic.tracking.spool import SpoolFolder
    from ic.tracking.tracker import Tracker

    saved = config_of_run("run", config.run)
    folder = RunFolder(Path(config.run).absolute())
    who = saved_identity(folder)
    kept = [kind for kind in ("mlflow", "wandb") if SpoolFolder(folder, kind).size]
    if who is None or not kept:
        raise UsageError(
            f"run={config.run}: nothing was kept for W&B or MLflow; train with logger=wandb, "
            "logger=mlflow or logger=wandb_mlflow"
        )
    trackers = []
    name, run_id = saved["name"], saved["run_id"]
    for kind in kept:
        given = (saved.get("logger") or {}).get(kind) or {}  # none once another logger was chosen
        if kind == "mlflow":
            given = {**given, "uri": config.uri or given.get("uri")}
            trackers.append(MLflowConfig(**given).build(name, run_id, folder, who))
        else:
            trackers.append(WandbConfig(**given).build(name, run_id, None, folder, who))
    with locked(folder):
        for tracker in trackers:
            assert isinstance(tracker, Tracker)
            _send(tracker.sender())
    return 0


def _send(sender: Sender) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from ic.errors import one_line

    total = sender.waiting_bytes
    columns = (TextColumn(sender.tracker), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        try:
            while sender.send_some():
                progress.update(task, completed=total - sender.waiting_bytes)
            sender.close()
            progress.update(task, completed=total)
        except Exception as error:  # whatever the client raises
            raise UsageError(
                f"{sender.tracker} does not take what the run has kept for it: {one_line(error)}; "
                f"nothing is lost, {sender.waiting_bytes} bytes wait in {sender.folder.path}"
            ) from error
    if total:
        print(f"{sender.tracker}: {total:,} bytes sent, {sender.where}")
    else:
        print(f"{sender.tracker}: nothing was left to send")
