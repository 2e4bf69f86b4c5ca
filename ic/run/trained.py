"""`validate`, `test` and `predict`: what a trained run's weights do on its data."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from rich.console import Console
from rich.table import Table

from ic.config.run import RunConfig
from ic.files.json_lines import write_rows
from ic.files.results import write_results
from ic.parallel.launch import ending_together
from ic.parallel.replica import sharing_ranks
from ic.parallel.watchdog import naming_lost_ranks
from ic.run.build import Run, adapt_to_gpu, build_run


def show_metrics(config: RunConfig, verb: str) -> int:
    """Loss and answer accuracy of a checkpoint on the data of `verb`, as a table and a file."""
    config, checkpoint = _with_weights(config)
    run = build_run(config)
    with ending_together(run.trainer.strategy), naming_lost_ranks():
        (metrics,) = getattr(run.trainer, verb)(
            run.module, datamodule=run.datamodule, verbose=False
        )
    if not run.trainer.is_global_zero:
        return 0
    table = Table(title=f"{verb}, synthetic data" if config.data.MARKS_ANSWERS else verb)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6f}")
    Console().print(table)
    rows = [{"what": verb, "metric": name, "value": value} for name, value in metrics.items()]
    _save(run, config, verb, checkpoint, rows)
    return 0


def write_predictions(config: RunConfig) -> int:
    """Write a checkpoint's answers on the test set to `predictions.jsonl`."""
    if not (config.data.MARKS_ANSWERS or config.data.HAS_PAIRS):
        raise ValueError(
            f"predict: data={config.data.name} marks no answers; take data=passkey, "
            "data=retrieval or data=preference, or measure the loss with the verb test"
        )
    config, checkpoint = _with_weights(config)
    run = build_run(config)
    with ending_together(run.trainer.strategy), naming_lost_ranks():
        batches = run.trainer.predict(run.module, datamodule=run.datamodule)
    path = run.folder.predictions
    rows = _rows_of_all_ranks(run.trainer, batches or [])
    if not run.trainer.is_global_zero:
        return 0
    write_rows(path, rows)
    Console().print(f"{len(rows)} predictions: {path}", soft_wrap=True, highlight=False)
    means = {
        f"mean_{name}": sum(row[name] for row in rows) / len(rows)
        for name, value in (rows[0] if rows else {}).items()
        if isinstance(value, bool | float)
    }
    summary = {"what": "predict", "n": len(rows), **means, "predictions": str(path)}
    _save(run, config, "predict", checkpoint, [summary, *_by_kind(rows)])
    return 0


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Right answers by everything that is told about them, printed as a table."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        for name, kind in row.get("about", {}).items():
            right.setdefault((name, kind), []).append(row["correct"])
    if not right:
        return []
    table = Table("by", "kind", "right", "of")
    for (name, kind), values in sorted(right.items()):
        table.add_row(name, kind, str(sum(values)), str(len(values)))
    Console().print(table)
    return [
        {"what": "predict", "by": name, "kind": kind, "n": len(v), "num_correct": sum(v)}
        for (name, kind), v in sorted(right.items())
    ]


def _save(
    run: Run, config: RunConfig, verb: str, checkpoint: Path, rows: list[dict[str, Any]]
) -> None:
    path = run.folder.measured(verb, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_results(path, asdict(config), rows)
    Console().print(f"results: {path}", soft_wrap=True, highlight=False)


def _with_weights(config: RunConfig) -> tuple[RunConfig, Path]:
    """A configuration whose model starts from the checkpoint that the verb was given, and that."""
    if config.ckpt_path is None:
        raise ValueError(
            "ckpt_path: say which checkpoint, for example ckpt_path=last, or run=FOLDER for the "
            "last one of a run with its own configuration"
        )
    folder = config.folder.resolve_checkpoint(config.ckpt_path)
    # Only training multiplies in FP8.
    model = replace(config.model, init_from=str(folder), fp8=None)
    config = adapt_to_gpu(replace(config, ckpt_path=None, model=model))
    return config, folder.resolve()


def _rows_of_all_ranks(trainer: Trainer, batches: list[Any]) -> list[dict[str, Any]]:
    """Rows of every rank's batches, in the order in which the ranks were dealt them."""
    dealt = [batches]
    if trainer.world_size > 1:
        place, _ = sharing_ranks(trainer)  # ranks that share a batch have the same rows
        dealt = [[]] * trainer.world_size
        torch.distributed.all_gather_object(dealt, batches if place == 0 else [])
    rounds = zip_longest(*dealt, fillvalue=[])
    return [row for one_each in rounds for batch in one_each for row in batch]
