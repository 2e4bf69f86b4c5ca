"""What a run tells Prometheus is what its callbacks measured, and it never stops the run."""

from __future__ import annotations

import csv
import json
import math
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Callback, Trainer
from prometheus_client.parser import text_string_to_metric_families

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.callbacks.guardrails import Guardrails
from ic.callbacks.memory_accounting import memory_limit_bytes
from ic.callbacks.memory_profiler import MemoryProfiler
from ic.callbacks.options import SlurmRequeueOptions
from ic.callbacks.prometheus import Prometheus, _sources
from ic.callbacks.prometheus_metrics import OF_THE_RANK, OF_THE_RUN
from ic.callbacks.prometheus_options import PrometheusOptions
from ic.callbacks.requeue import SlurmRequeue
from ic.callbacks.throughput import Throughput
from ic.config.callbacks import PrometheusConfig
from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.errors import UsageError
from ic.machine.slurm_job import SlurmJob
from ic.run.build import build_run
from ic.run.resume import Start
from ic.training.find_callback import find_callback

TINY = (
    "experiment=mla_tiny",
    "debug=default",
    "callbacks=prometheus",
    "callbacks.context_length=null",
    "callbacks.passkey=null",
    "callbacks.progress=false",
    "callbacks.loss_curve=false",
    "callbacks.throughput.warmup_steps=0",
    "callbacks.throughput.peak_bf16_flops=1e11",
    "callbacks.checkpoint.every_n_steps=2",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "data.context_length=128",
    "data.tokens_per_batch=256",
    "data.val_batches=1",
    "data.num_workers=0",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
)
FILES = ("callbacks.prometheus.textfile=text", "callbacks.prometheus.targets=targets")
WRITTEN = (["ic_train_debug_default_rank0.prom"], ["debug_default_rank0.json"])
Samples = dict[str, tuple[float, dict[str, str]]]


def scrape(text: str) -> Samples:
    """Value and labels of each sample."""
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    return {s.name: (s.value, s.labels) for family in families for s in family.samples}


def read(url: str) -> Samples:
    # Without a proxy: loopback is nobody's but this machine's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        return scrape(answer.read().decode())


class Look(Callback):
    """Scrapes at the end of each step, in each validation and after the last step."""

    def __init__(self, also: Any = lambda trainer: None) -> None:
        self.seen: dict[str, Samples] = {}
        self.also = also

    def look(self, trainer: Trainer, when: str) -> None:
        exporter = find_callback(trainer, Prometheus)
        assert exporter is not None
        if exporter.url is not None:
            self.seen[when] = read(exporter.url)

    def on_step_end(self, trainer: Trainer) -> None:
        self.look(trainer, f"step {trainer.global_step}")
        self.also(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.look(trainer, f"validation {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.look(trainer, "end")


def fit(*overrides: str, look: Callback | None = None) -> tuple[Trainer, Path]:
    config, _ = compose_config("fit", RunConfig, [*TINY, *overrides])
    run = build_run(config, Start(None, continues=False))
    if look is not None:
        run.trainer.callbacks.insert(-1, look)  # the checkpoint stays last
    run.trainer.fit(run.module, datamodule=run.datamodule)
    return run.trainer, run.folder.path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_value_is_what_its_callback_measured(capsys: pytest.CaptureFixture[str]) -> None:
    look = Look()
    trainer, folder = fit(look=look)
    last, labels = look.seen["end"], {"experiment": "debug", "run_id": "default", "rank": "0"}
    assert set(last) == {*OF_THE_RUN, *OF_THE_RANK, "ic_train_info"}
    assert all(own == labels for name, (_, own) in last.items() if name != "ic_train_info")
    about = last["ic_train_info"][1]
    # Labels that Prometheus gives to a target itself, and honor_labels would let go.
    assert not {"job", "instance"} & set(about)
    assert (about["node"], about["device"], about["world_size"]) == (
        socket.gethostname(),
        "cpu",
        "1",
    )

    value = {name: found for name, (found, _) in last.items()}
    rows = list(csv.DictReader((folder / "csv/metrics.csv").open()))
    logged = [row for row in rows if row["train/loss"]]
    assert len(logged) == 4
    for column, name in (
        ("train/loss", "ic_train_loss"),
        ("train/tokens_per_s", "ic_train_tokens_per_second"),
        ("train/mfu", "ic_train_mfu_ratio"),
        ("train/step_time_s", "ic_train_step_seconds"),
        ("train/data_wait_share", "ic_train_data_wait_ratio"),
        ("train/context_length", "ic_train_context_length_tokens"),
        ("lr", "ic_train_learning_rate"),
    ):
        for step, row in enumerate(logged, start=1):
            there = look.seen[f"step {step}"][name][0]
            assert there == pytest.approx(float(row[column]), rel=1e-6), (step, name)
    throughput = find_callback(trainer, Throughput)
    memory = find_callback(trainer, MemoryProfiler)
    guardrails = find_callback(trainer, Guardrails)
    assert throughput is not None
    assert memory is not None
    assert memory.recorder is not None
    assert guardrails is not None
    assert value["ic_train_tokens_total"] == throughput.tokens_seen == 4 * 256
    assert value["ic_train_step"] == 4
    assert value["ic_train_gradient_norm"] == guardrails.gradient_norm
    assert value["ic_train_gradient_norm"] > 0
    assert 0 < value["ic_train_gpu_memory_bytes"] <= memory.recorder.run_peak_bytes
    limit = memory_limit_bytes(trainer.strategy.root_device)
    assert value["ic_train_gpu_memory_limit_bytes"] == limit > value["ic_train_gpu_memory_bytes"]
    for name in ("bad_steps", "rollbacks", "requeues"):
        assert value[f"ic_train_{name}_total"] == 0

    # The checkpoint of step 2 is not there at its end, and is at the end of step 3.
    assert "ic_train_checkpoint_timestamp_seconds" not in look.seen["step 2"]
    first = look.seen["step 3"]["ic_train_checkpoint_timestamp_seconds"][0]
    start = value["ic_train_start_timestamp_seconds"]
    assert start < first < value["ic_train_last_step_timestamp_seconds"]
    saved = (folder / "checkpoints/step=4").stat().st_mtime
    assert value["ic_train_checkpoint_timestamp_seconds"] == pytest.approx(saved, abs=1)

    assert look.seen["step 3"]["ic_train_evaluating"][0] == 0
    assert look.seen["validation 2"]["ic_train_evaluating"][0] == 1
    assert value["ic_train_evaluating"] == 1

    said = capsys.readouterr().out
    assert "metrics of rank 0: http://127.0.0.1:" in said
    url = said.split("metrics of rank 0: ")[1].split()[0]
    with pytest.raises(urllib.error.URLError, match="refused"):
        read(url)


def test_a_step_without_a_number_is_seen(tmp_path: Path) -> None:
    def poison(trainer: Trainer) -> None:
        embedding = trainer.lightning_module.model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda *given: given[-1] * math.nan)
        trainer.handle = getattr(trainer, "handle", None) or handle
        if trainer.global_step > 1:
            trainer.handle.remove()
            handle.remove()

    look = Look(poison)
    fit(*FILES, "trainer.max_steps=3", "trainer.val_check_interval=3", look=look)
    assert math.isfinite(look.seen["step 1"]["ic_train_loss"][0])
    assert math.isnan(look.seen["step 2"]["ic_train_loss"][0])
    assert math.isnan(look.seen["step 2"]["ic_train_gradient_norm"][0])
    assert look.seen["step 2"]["ic_train_bad_steps_total"][0] == 1
    assert math.isfinite(look.seen["step 3"]["ic_train_loss"][0])
    assert look.seen["step 3"]["ic_train_bad_steps_total"][0] == 1
    # A run that came to its end takes its files away.
    assert (files(tmp_path / "text"), files(tmp_path / "targets")) == ([], [])


def wait_for(path: Path) -> None:
    """A thread of its own writes it."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))  # a dot begins what is not whole


def test_files_are_there_while_it_trains(tmp_path: Path) -> None:
    def see(trainer: Trainer) -> None:
        if trainer.global_step == 4:  # as by a second Ctrl-C, which is nothing to alert anybody of
            exporter = find_callback(trainer, Prometheus)
            assert exporter is not None
            exporter.on_exception(trainer, trainer.lightning_module, KeyboardInterrupt())
        else:
            wait_for(tmp_path / "text" / WRITTEN[0][0])
        found.append((files(tmp_path / "text"), files(tmp_path / "targets")))
        if trainer.global_step == 4:
            return
        texts.append((tmp_path / "text" / WRITTEN[0][0]).read_text())
        targets.append(json.loads((tmp_path / "targets" / WRITTEN[1][0]).read_text()))
        mode = (tmp_path / "text" / WRITTEN[0][0]).stat().st_mode & 0o777
        assert mode == 0o644  # whatever the umask: node_exporter is another user

    found: list[Any] = []
    texts: list[str] = []
    targets: list[Any] = []
    look = Look(see)
    fit(*FILES, "callbacks.prometheus.textfile_every_s=0.01", look=look)
    assert set(look.seen) >= {"step 4", "validation 2"}
    assert found == [WRITTEN] * 3 + [([], [])]
    assert set(scrape(texts[-1])) >= set(OF_THE_RANK) - {"ic_train_gpu_memory_bytes"}
    [target] = targets[-1]
    assert target["labels"] == {"experiment": "debug", "run_id": "default", "rank": "0"}
    assert target["targets"][0].startswith("127.0.0.1:")


def test_a_run_that_fails_leaves_its_files_for_the_alerts(tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("over")

    with pytest.raises(RuntimeError, match="over"):
        fit(*FILES, look=Look(fail))
    assert (files(tmp_path / "text"), files(tmp_path / "targets")) == WRITTEN
    text = (tmp_path / "text" / WRITTEN[0][0]).read_text()
    assert scrape(text)["ic_train_step"][0] == 3


def test_what_fails_is_a_warning_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        trainer, folder = fit(
            f"callbacks.prometheus.port={port}",
            "callbacks.prometheus.textfile=file/below",
            "callbacks.prometheus.textfile_every_s=0.01",
            look=(look := Look()),
        )
    assert trainer.global_step == 4
    assert look.seen == {}
    assert (folder / "checkpoints/last/config.json").is_file()
    said = [record.message for record in caplog.records if "Prometheus" in record.message]
    assert len(said) == 3  # the file was tried every hundredth of a second, and at the end
    assert f"rank 0 cannot listen at 127.0.0.1:{port} (Address already in use)" in said[0]
    assert "file/below" in said[1]


def test_off_by_default_and_absent_where_nothing_measures() -> None:
    assert compose_config("fit", RunConfig, ["experiment=mla_tiny"])[0].callbacks.prometheus is None
    bare = ("throughput", "memory", "guardrails", "checkpoint", "requeue")
    look = Look()
    fit(*(f"callbacks.{name}=null" for name in bare), "trainer.max_steps=1", look=look)
    assert set(look.seen["step 1"]) == {
        "ic_train_info", "ic_train_loss", "ic_train_learning_rate", "ic_train_step",
        "ic_train_context_length_tokens", "ic_train_start_timestamp_seconds", "ic_train_evaluating",
        "ic_train_last_step_timestamp_seconds", "ic_train_gpu_memory_limit_bytes",
    }  # fmt: skip


def test_requeues_are_the_job_s_and_a_resumed_run_knows_its_checkpoint(tmp_path: Path) -> None:
    requeue = SlurmRequeue(SlurmRequeueOptions(), SlurmJob("7", 1, 1, restart_count=2))
    trainer: Any = SimpleNamespace(callbacks=[requeue], global_step=0)
    assert _sources(trainer)["ic_train_requeues_total"]() == 2

    _, folder = fit("trainer.max_steps=2")
    saved = (folder / "checkpoints/last").resolve()
    config, _ = compose_config("fit", RunConfig, [*TINY, "trainer.max_steps=3"])
    run = build_run(config, Start(saved, continues=True))
    run.trainer.callbacks.insert(-1, look := Look())
    run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=saved, weights_only=True)
    again = look.seen["step 3"]
    before = saved.stat().st_mtime
    assert again["ic_train_checkpoint_timestamp_seconds"][0] == pytest.approx(before)
    assert again["ic_train_tokens_total"][0] == 3 * 256
    assert find_callback(run.trainer, FolderCheckpoint) is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 70000}, "callbacks.prometheus.port=70000: must be from 1 to 65535, 0 for any"),
        ({"port": -1}, "callbacks.prometheus.port=-1: must be"),
        ({"port": None}, "callbacks.prometheus.port=null: nothing could be read"),
        ({"port": None, "textfile": "t", "targets": "d"}, "without a port there is no address"),
        ({"host": ""}, "callbacks.prometheus.host='': give an address"),
        ({"textfile_every_s": 0.0}, "callbacks.prometheus.textfile_every_s=0.0: must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        PrometheusOptions(**given)


def test_a_missing_library_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ic.callbacks.prometheus")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    surroundings: Any = SimpleNamespace(name="a", run_id="b")
    with pytest.raises(UsageError, match=r"install 'infinite-context\[monitoring\]'"):
        PrometheusConfig().build(surroundings)
