"""A run's metrics for Prometheus: over HTTP, and in a file for node_exporter's textfile collector.

Nothing is measured here. The values are those of the callbacks that measure: throughput, memory,
guardrails, checkpoint and requeue; what one of them would tell is absent where it is turned off.
Each rank is a process of its own and answers at a port of its own. Rank 0 alone tells of what is
the whole run's.

Values that live on a GPU are read at the steps at which the trainer logs, since reading waits for
the GPU. The rest are plain numbers, which the server's thread reads when it is asked. Whatever
fails here is a warning, and training goes on.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import wraps
from http.server import HTTPServer
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.callbacks.guardrails import Guardrails
from ic.callbacks.memory_accounting import memory_limit_bytes
from ic.callbacks.memory_profiler import MemoryProfiler
from ic.callbacks.prometheus_metrics import OF_THE_RUN, TrainingMetrics
from ic.callbacks.prometheus_options import PrometheusOptions
from ic.callbacks.requeue import SlurmRequeue
from ic.callbacks.throughput import Throughput
from ic.files.atomic_write import replacing
from ic.machine.devices import device_name
from ic.training.find_callback import find_callback

log = logging.getLogger(__name__)
Given = ParamSpec("Given")

# What the module and the throughput callback log, and how it is called here.
_LOGGED = {
    "train/loss": "ic_train_loss",
    "train/tokens_per_s": "ic_train_tokens_per_second",
    "train/mfu": "ic_train_mfu_ratio",
    "train/context_length": "ic_train_context_length_tokens",
    "lr": "ic_train_learning_rate",
    "train/step_time_s": "ic_train_step_seconds",
    "train/data_wait_share": "ic_train_data_wait_ratio",
}
# A file server that does not answer must not keep a run from its end.
_WRITE_TIMEOUT_S = 5.0
_EVERYWHERE = {"0.0.0.0", "::", ""}


def _never_stops_training(
    hook: Callable[Concatenate[Prometheus, Given], None],
) -> Callable[Concatenate[Prometheus, Given], None]:
    """A failure is a warning, the first of each hook; metrics are not worth a run."""

    @wraps(hook)
    def guarded(self: Prometheus, *args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            if hook not in self.failed:
                self.failed.add(hook)
                log.warning("no metrics for Prometheus: %s; training goes on", error)

    return guarded


class Prometheus(Callback):
    """Offers the metrics of `ic.callbacks.prometheus_metrics` from the first step to the last.

    Attributes:
        url: where this process answers; None before training, after it, and where it cannot listen.
        failed: the hooks that have failed.

    Args:
        experiment: the label of this name; so for `run_id`.
    """

    def __init__(self, config: PrometheusOptions, experiment: str, run_id: str) -> None:
        self.config = config
        self.url: str | None = None
        self.failed: set[Callable[..., Any]] = set()
        self._experiment = experiment
        self._run_id = run_id
        self._rank = 0
        self._registry = CollectorRegistry()
        self._read: dict[str, float] = {}  # in the training's thread
        self._sources: dict[str, Callable[[], float | None]] = {}
        self._evaluating = False
        self._throughput: Throughput | None = None
        self._server: tuple[HTTPServer, threading.Thread] | None = None
        self._writer: threading.Thread | None = None
        self._ended = threading.Event()

    @_never_stops_training
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank = trainer.global_rank
        self._throughput = find_callback(trainer, Throughput)
        self._sources = _sources(trainer)
        self._evaluating = False
        self._read = {
            "ic_train_start_timestamp_seconds": time.time(),
            "ic_train_last_step_timestamp_seconds": time.time(),
            "ic_train_gpu_memory_limit_bytes": memory_limit_bytes(trainer.strategy.root_device),
        }
        labels = (self._experiment, self._run_id, str(self._rank))
        self._registry = CollectorRegistry()
        self._registry.register(TrainingMetrics(labels, _about(trainer), self._values))
        self._ended.clear()
        if self.config.port is not None:
            self._listen(trainer)
        if self.config.textfile is not None:
            self._writer = threading.Thread(
                target=self._keep_writing, name="prometheus-textfile", daemon=True
            )
            self._writer.start()

    @_never_stops_training
    def on_step_end(self, trainer: Trainer) -> None:
        self._read["ic_train_last_step_timestamp_seconds"] = time.time()
        if not trainer._logger_connector.should_update_logs:
            return
        logged = trainer.callback_metrics
        found = {ours: float(logged[name]) for name, ours in _LOGGED.items() if name in logged}
        memory = find_callback(trainer, MemoryProfiler)
        if memory is not None and memory.recorder is not None:
            found["ic_train_gpu_memory_bytes"] = memory.recorder.total_peak_bytes()
        self._read = {**self._read, **found}  # anew: the other threads walk over it

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluating = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluating = True  # until the end: the suites' callbacks come after this one

    @_never_stops_training
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
        self._forget()

    @_never_stops_training
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A run that failed leaves its files, so that an alert tells of it."""
        self._stop()
        if isinstance(exception, KeyboardInterrupt):
            self._forget()
        elif self.config.textfile is not None:
            self._write(self._textfile)

    @property
    def _name(self) -> str:
        """Of this process's files; an experiment's name may hold a slash."""
        return f"{self._experiment}_{self._run_id}_rank{self._rank}".replace("/", "-")

    @property
    def _textfile(self) -> Path:
        assert self.config.textfile is not None
        return Path(self.config.textfile) / f"ic_train_{self._name}.prom"

    @property
    def _target(self) -> Path:
        assert self.config.targets is not None
        return Path(self.config.targets) / f"{self._name}.json"

    def _values(self) -> dict[str, float]:
        """In whichever thread asks."""
        now = {name: value for name, read in self._sources.items() if (value := read()) is not None}
        paused = self._throughput is not None and self._throughput.is_paused
        now["ic_train_evaluating"] = float(self._evaluating or paused)
        values = {**self._read, **now}
        if self._rank:
            return {name: value for name, value in values.items() if name not in OF_THE_RUN}
        return values

    @_never_stops_training
    def _listen(self, trainer: Trainer) -> None:
        assert self.config.port is not None
        port = self.config.port + trainer.local_rank if self.config.port else 0
        try:
            self._server = start_http_server(port, self.config.host, self._registry)
        except OSError as error:
            raise OSError(
                f"rank {self._rank} cannot listen at {self.config.host}:{port} "
                f"({error.strerror or error}); callbacks.prometheus.port=0 takes a free port"
            ) from error
        everywhere = self.config.host in _EVERYWHERE
        host = socket.gethostname() if everywhere else self.config.host
        address = f"[{host}]" if ":" in host else host
        address = f"{address}:{self._server[0].server_port}"
        self.url = f"http://{address}/metrics"
        if self.config.targets is None:
            print(f"metrics of rank {self._rank}: {self.url}", flush=True)
            return
        labels = {"experiment": self._experiment, "run_id": self._run_id, "rank": str(self._rank)}
        with replacing(self._target) as temporary:
            temporary.write_text(json.dumps([{"targets": [address], "labels": labels}]) + "\n")
            temporary.chmod(0o644)
        rank_zero_info(
            f"metrics: {self.url}; those of all ranks are named in {self.config.targets}"
        )

    def _keep_writing(self) -> None:
        while True:
            self._write(self._textfile)
            if self._ended.wait(self.config.textfile_every_s):
                return

    @_never_stops_training
    def _write(self, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(generate_latest(self._registry))
            temporary.chmod(0o644)  # node_exporter runs as another user

    def _stop(self) -> None:
        self._ended.set()
        if self._writer is not None:
            self._writer.join(_WRITE_TIMEOUT_S)
            self._writer = None
        if self._server is not None:
            server, thread = self._server
            self._server = self.url = None
            server.shutdown()
            server.server_close()
            thread.join()

    def _forget(self) -> None:
        if self.config.textfile is not None:
            self._textfile.unlink(missing_ok=True)
        if self.config.targets is not None:
            self._target.unlink(missing_ok=True)


def _sources(trainer: Trainer) -> dict[str, Callable[[], float | None]]:
    """Plain numbers, from whoever counts them; None while there is nothing to tell."""
    sources: dict[str, Callable[[], float | None]] = {"ic_train_step": lambda: trainer.global_step}
    if (throughput := find_callback(trainer, Throughput)) is not None:
        sources["ic_train_tokens_total"] = lambda: throughput.tokens_seen
    if (guardrails := find_callback(trainer, Guardrails)) is not None:
        sources["ic_train_gradient_norm"] = lambda: guardrails.gradient_norm
        sources["ic_train_bad_steps_total"] = lambda: guardrails.num_bad_steps
        sources["ic_train_rollbacks_total"] = lambda: guardrails.num_rollbacks
    if (checkpoint := find_callback(trainer, FolderCheckpoint)) is not None:
        sources["ic_train_checkpoint_timestamp_seconds"] = lambda: checkpoint.saved_at
    if (requeue := find_callback(trainer, SlurmRequeue)) is not None:
        job = requeue.job
        sources["ic_train_requeues_total"] = lambda: job.restart_count if job else 0
    return sources


def _about(trainer: Trainer) -> dict[str, str]:
    requeue = find_callback(trainer, SlurmRequeue)
    job = requeue.job if requeue else None
    return {
        "node": socket.gethostname(),
        "local_rank": str(trainer.local_rank),
        "world_size": str(trainer.world_size),
        "device": device_name(trainer.strategy.root_device),
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        # Not `job`: that is Prometheus's own label, which honor_labels would let this one replace.
        "slurm_job": job.job_id if job else "",
        "torch": str(torch.__version__),
    }
