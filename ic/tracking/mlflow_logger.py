"""MLflow for a run: one MLflow run across all its starts."""

from __future__ import annotations

from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import MLFlowLogger

from ic.files.run_folder import RunFolder
from ic.tracking.identity import Identity
from ic.tracking.mlflow_sender import Delivered, MLflowSender
from ic.tracking.never_fails import NeverFails
from ic.tracking.server import fail_soon
from ic.tracking.tracker import Tracker

RUN_TAG = "ic.run"  # holds the key of the run's identity


class MLflow(Tracker, MLFlowLogger):
    """Lightning's logger makes the run there, in the thread that sends.

    Args:
        folder: of the run.
        identity: of the run; its MLflow run carries the key as a tag.
        uri: of the tracking server.
        experiment: there, made if need be.
        name: of the run there.
        online: whether to send while training.
    """

    KIND = "mlflow"

    def __init__(
        self,
        folder: RunFolder,
        identity: Identity,
        uri: str,
        experiment: str,
        name: str,
        online: bool,
    ) -> None:
        fail_soon()
        tags = {RUN_TAG: identity.key}
        super().__init__(experiment_name=experiment, run_name=name, tracking_uri=uri, tags=tags)
        self._run_folder, self._identity, self._online = folder, identity, online

    @property
    def experiment(self) -> Any:
        """MLflow's client once the run is made."""
        return self._mlflow_client if self._initialized else _DummyExperiment()

    @property
    def name(self) -> str:
        return self._experiment_name

    @property
    def version(self) -> str | None:
        return self._run_id

    def sender(self) -> MLflowSender:
        delivered = Delivered.read(self.spool_folder, self._tracking_uri, self._experiment_name)
        return MLflowSender(self.spool_folder, delivered, self._find_or_make)

    def _find_or_make(self, run_id: str | None) -> tuple[Any, str]:
        """The run there: a kill may have come between making it and noting its id."""
        client = self._mlflow_client
        if run_id is None:
            experiment = client.get_experiment_by_name(self._experiment_name)
            if experiment is not None:
                tagged = f"tags.`{RUN_TAG}` = '{self._identity.key}'"
                found = client.search_runs([experiment.experiment_id], tagged)
                run_id = found[0].info.run_id if found else None
        self._run_id = run_id
        super(NeverFails, self).experiment  # noqa: B018  # Lightning makes what is not there
        assert self._run_id is not None
        return client, self._run_id
