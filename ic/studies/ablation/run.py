"""An ablation: variants of a `fit`, several seeds each, trained for equal time, compared at length.

A run is a `fit` in a process of its own, with the passkey grid at its end. **Equal time** is
`max_time_s` of wall clock from the first training step on, whatever the variant does with it:
starting up, and the evaluation, do not count; compilation and slower steps do. Runs that share a
GPU (`jobs_per_gpu`) slow each other down; `max_time_s=null` gives all of them equal steps instead.

The results file is written anew after each run. A run whose row is in it already (same overrides,
seed and commit), or whose folder holds the result of the very same `fit`, is not repeated; failed
ones are.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ic.files.results import commit, read_json, write_results
from ic.files.run_folder import RunFolder
from ic.studies.ablation.finished_run import read_run
from ic.studies.ablation.options import AblationConfig, AblationOptions
from ic.studies.ablation.report import ablation_line, draw_ablation, show_ablation
from ic.studies.ablation.variants import PlannedRun, identity, plan_runs, write_sweep
from ic.studies.processes import FitJob, FitOutcome, TimeLimit, run_fits

_TABLE_WIDTH = 140


def run_ablation(config: AblationConfig) -> int:
    """Run what is missing; 0 if every run of the selected variants is measured, 1 if one failed.

    Raises:
        ValueError: overrides that do not compose; variants that would be asked other questions; a
            results file of another ablation.
    """
    options = config.ablation
    console = Console(soft_wrap=True, highlight=False)  # a file gets whole lines
    plan = plan_runs(options)
    output = Path(options.output)
    now = commit()
    rows = _earlier_rows(options, plan, now)
    selected = [run for run in plan if not options.only or run.variant in options.only]
    todo = []
    for run in selected:
        if rows.get(run.identity, {}).get("status") == "measured":
            console.print(f"{run.title}: in {output} already", markup=False)
        elif run.is_finished(now):
            rows[run.identity] = {**run.row, "status": "measured", **read_run(run.folder)}
            console.print(f"{run.title}: read from {run.folder}", markup=False)
        else:
            rows.pop(run.identity, None)  # it failed before
            todo.append(run)
    if options.sweep_file is not None:
        write_sweep(Path(options.sweep_file), todo)
        console.print(f"{len(todo)} runs to do: {options.sweep_file}", markup=False)
        return 0
    places = _places(options, todo)

    def write() -> list[dict[str, Any]]:
        ordered = [rows[run.identity] for run in plan if run.identity in rows]
        write_results(output, asdict(options), ordered, public=True)
        return ordered

    def on_end(index: int, outcome: FitOutcome) -> None:
        run = todo[index]
        rows[run.identity] = row = _row(run, outcome, now)
        write()
        done = sum(other.identity in rows for other in selected)
        console.print(f"{done}/{len(selected)} {ablation_line(row)}", markup=False)

    for run in todo:
        RunFolder(run.folder).results.unlink(missing_ok=True)  # of an earlier commit
    jobs = [FitJob(run.arguments, RunFolder(run.folder).log) for run in todo]
    run_fits(jobs, places, TimeLimit(options.run_timeout_s, "ablation.run_timeout_s"), on_end)
    ordered = write()
    width = None if console.is_terminal else _TABLE_WIDTH
    show_ablation(ordered, options.max_time_s, Console(width=width))
    plot = output.with_suffix(".png")
    draw_ablation(ordered, plot, options.max_time_s)
    console.print(f"results: {output}, plot: {plot}", markup=False)
    return int(any(rows[run.identity]["status"] == "failed" for run in selected))


def _row(run: PlannedRun, outcome: FitOutcome, now: str) -> dict[str, Any]:
    row = {**run.row, "commit": now, "wall_s": outcome.wall_s}
    reason = outcome.reason
    if reason is None:
        try:
            return {**row, "status": "measured", **read_run(run.folder)}
        except ValueError as error:
            reason = str(error)
    return {**row, "status": "failed", "reason": reason, "log_tail": outcome.log_tail}


def _earlier_rows(
    options: AblationOptions, plan: list[PlannedRun], now: str
) -> dict[str, dict[str, Any]]:
    """Rows of the results file that belong to this plan and commit.

    Raises:
        ValueError: it holds measured rows that do not.
    """
    planned = {run.identity: run for run in plan}
    kept: dict[str, dict[str, Any]] = {}
    others = []
    for row in read_json(Path(options.output)).get("rows", []):
        key = identity(row)
        if key in planned and row["commit"] == now:
            kept[key] = {**row, "variant": planned[key].variant}
        elif row["status"] == "measured":
            others.append(f"{row['variant']}, seed {row['seed']}, commit {row['commit']}")
    if others and not options.drop_others:
        raise ValueError(
            f"{options.output} holds {len(others)} rows of other settings or commits than this "
            f"ablation's at {now} ({others[0]}); choose another ablation.output=, or drop them "
            "with ablation.drop_others=true"
        )
    return kept


def _places(options: AblationOptions, todo: list[PlannedRun]) -> list[dict[str, str]]:
    """Environment of each run at a time: the GPU it sees, or none.

    Raises:
        ValueError: a run needs a GPU and there is none.
    """
    gpus = visible_gpus()
    for run in todo:
        accelerator = run.config.trainer.accelerator
        if accelerator in ("gpu", "cuda") and not gpus:
            raise ValueError(
                f"ablation, variant {run.variant!r}: trainer.accelerator={accelerator}, but "
                "PyTorch sees no CUDA GPU here; add trainer.accelerator=cpu and "
                "trainer.precision=32-true to ablation.common"
            )
    if not gpus or all(run.config.trainer.accelerator == "cpu" for run in todo):
        return [{"CUDA_VISIBLE_DEVICES": ""}] * options.jobs
    return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(options.jobs_per_gpu) for gpu in gpus]


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name for one GPU each of those that this process sees."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]
