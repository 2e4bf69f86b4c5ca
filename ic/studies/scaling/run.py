"""Training under different strategies, measured on the GPUs of this host.

A case is a `fit` of a few optimizer steps at one context length in a process of its own, without
evaluation, checkpoints, validation or Weights & Biases. Its row comes from what that run wrote
(`throughput.json`, `memory/memory.json`, `gpu_utilisation.json`, `config.yaml`). The results file
is written anew after each case.

**Ratio to the baseline** is tokens/s over those of the baseline case's row with as many GPUs,
**efficiency** tokens/s over those of the one-GPU row times the number of GPUs. Both compare only
rows whose overrides are equal but for `strategy` and the number of devices.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ic.errors import UsageError
from ic.files.results import read_json, write_results
from ic.files.run_folder import RunFolder
from ic.files.saved_config import read_config
from ic.studies.processes import FitJob, TimeLimit, run_fit
from ic.studies.scaling.options import ScalingCase, ScalingConfig, ScalingOptions
from ic.studies.scaling.report import draw_scaling, scaling_line, show_scaling

# What a strategy changes; the other overrides say what is trained.
_STRATEGY_KEYS = ("strategy", "trainer.devices")
_QUIET = (
    "trainer.max_time=null",
    "trainer.limit_val_batches=0",
    "trainer.log_every_n_steps=1000",
    "logger=none",
    "callbacks.checkpoint=null",
    "callbacks.requeue=null",
    "callbacks.context_length=null",
    "callbacks.passkey=null",
    "callbacks.memory.every_n_steps=0",
    "callbacks.memory.oom_snapshot=false",
)
_DEVICES = "{devices}"
_TABLE_WIDTH = 120


def run_scaling(config: ScalingConfig) -> int:
    """Measure every case; 0 if each was measured or had no GPUs for it, 1 if one failed.

    Raises:
        ValueError: there is no case.
        UsageError: no case can run here; nothing has been written then.
    """
    options = config.scaling
    gpus = torch.cuda.device_count()
    runs = [(case, n) for case in options.selected() for n in case.devices or gpu_counts(gpus)]
    if not runs:
        raise ValueError("scaling.cases is empty: give at least one {name: ..., overrides: [...]}")
    if not any(_can_run(_overrides(options, case, n), n, gpus) for case, n in runs):
        raise UsageError(
            f"scaling: this host has {gpus} GPUs and every case needs {min(n for _, n in runs)} or "
            "more, so there is nothing to measure and nothing was written; run it on a GPU "
            "machine, or put trainer.accelerator=cpu into scaling.common"
        )
    output = Path(options.output)
    console = Console(soft_wrap=True, highlight=False)  # a file gets whole lines
    rows: list[dict[str, Any]] = []
    for number, (case, devices) in enumerate(runs, 1):
        rows.append(_row(options, case, devices, gpus))
        compare(rows, options.baseline)
        write_results(output, asdict(options), rows, public=True)
        console.print(f"{number}/{len(runs)} {scaling_line(rows[-1])}", markup=False)
    show_scaling(
        rows, options.baseline, Console(width=None if console.is_terminal else _TABLE_WIDTH)
    )
    draw_scaling(rows, output.with_suffix(".png"))
    console.print(f"results: {output}, plot: {output.with_suffix('.png')}", markup=False)
    return int(any(row["status"] == "failed" for row in rows))


def gpu_counts(gpus: int) -> list[int]:
    """2, 4, 8, ... up to the host's number of GPUs; 2 at least, for the row that says why not."""
    return [n for n in (2, 4, 8, 16) if n <= max(gpus, 2)]


def compare(rows: list[dict[str, Any]], baseline: str) -> None:
    """Fill in `ratio_to_baseline` and `scaling_efficiency` wherever there is a row for them."""
    measured = [row for row in rows if row["status"] == "measured"]
    for row in measured:
        alike = [other for other in measured if _trained(other) == _trained(row)]
        bases = [r for r in alike if r["name"] == baseline and r["num_gpus"] == row["num_gpus"]]
        singles = [r for r in alike if r["num_gpus"] == 1]
        speed = row["tokens_per_s"]
        row["ratio_to_baseline"] = speed / bases[0]["tokens_per_s"] if bases else None
        row["scaling_efficiency"] = (
            speed / (row["num_gpus"] * singles[0]["tokens_per_s"]) if singles else None
        )


def _trained(row: dict[str, Any]) -> list[str]:
    """What is trained, whatever the strategy."""
    settings = _settings(row["overrides"])
    return sorted(f"{k}={v}" for k, v in settings.items() if not k.startswith(_STRATEGY_KEYS))


def _settings(overrides: list[str]) -> dict[str, str]:
    """Keys and values; as for Hydra, the last of several wins."""
    return {key: value for key, _, value in (o.partition("=") for o in overrides)}


def _overrides(options: ScalingOptions, case: ScalingCase, devices: int) -> list[str]:
    given = [o.replace(_DEVICES, str(devices)) for o in [*options.common, *case.overrides]]
    return [*given, f"trainer.devices={devices}"]


def _can_run(overrides: list[str], devices: int, gpus: int) -> bool:
    return devices <= gpus or _settings(overrides).get("trainer.accelerator") == "cpu"


def _row(options: ScalingOptions, case: ScalingCase, devices: int, gpus: int) -> dict[str, Any]:
    overrides = _overrides(options, case, devices)
    row = {"name": case.name, "overrides": overrides, "num_gpus": devices}
    if not _can_run(overrides, devices, gpus):
        reason = f"needs {devices} GPUs, this host has {gpus}"
        return {**row, "status": "skipped", "reason": reason}
    warmup = options.warmup_steps if case.warmup_steps is None else case.warmup_steps
    timed = case.timed_steps or options.timed_steps
    limit_s = case.case_timeout_s or options.case_timeout_s
    with tempfile.TemporaryDirectory(prefix="ic-scaling-") as folder:
        settings = [
            *overrides,
            *_QUIET,
            f"trainer.max_steps={warmup + timed}",
            f"callbacks.throughput.warmup_steps={warmup}",
            f"callbacks.gpu_utilisation.warmup_steps={warmup}",
            # The optimizer's state is there from the second step on.
            f"callbacks.memory.first_steps={max(2, warmup)}",
            f"output_dir={folder}",
            "name=scaling",
            "run_id=case",
        ]
        job = FitJob(settings, Path(folder) / "log.txt")
        outcome = run_fit(job, TimeLimit(limit_s, "scaling.case_timeout_s"))
        row["wall_s"] = outcome.wall_s
        run = RunFolder(Path(folder) / "scaling" / "case")
        failure = outcome.reason
        if failure is None and not run.throughput.is_file():
            failure = f"the run wrote no {run.throughput.name}; leave callbacks.throughput on"
        if failure is not None:
            return {**row, "status": "failed", "reason": failure, "log_tail": outcome.log_tail}
        return {**row, "status": "measured", **read_run(run.path)}


def read_run(folder: Path) -> dict[str, Any]:
    """The measured part of a row, from a run directory."""
    run = RunFolder(folder)
    config = read_config(run.config)
    speed = read_json(run.throughput)
    (timed,) = speed["by_context_length"]
    memory = read_json(run.memory())
    utilisation = read_json(run.gpu_utilisation)
    if not timed["num_steps_timed"]:
        raise ValueError(f"{folder}: no step was timed")
    return {
        "device": speed["device"],
        "num_processes": speed["num_devices"],
        "strategy": config["strategy"]["name"],
        "process_group_backend": config["strategy"]["process_group_backend"],
        "context_parallel_size": config["strategy"]["context_parallel_size"],
        "context_length_tokens": timed["context_length_tokens"],
        "tokens_per_step": timed["tokens_timed"] // timed["num_steps_timed"],
        "num_steps_timed": timed["num_steps_timed"],
        "step_time_median_s": timed["step_time_median_s"],
        "step_time_p10_s": timed["step_time_p10_s"],
        "step_time_p90_s": timed["step_time_p90_s"],
        "data_wait_share": timed["data_wait_share"],
        "tokens_per_s": timed["tokens_per_s"],
        "mfu": timed.get("mfu"),
        "gpu_utilisation": utilisation.get("mean"),
        "gpu_utilisation_by_gpu": utilisation.get("by_gpu"),
        "peak_bytes_per_gpu": memory.get("run_peak_bytes"),
        "memory_meter": memory.get("meter"),
    }
