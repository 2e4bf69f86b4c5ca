"""Predicted against measured memory: a few real steps of each case on this machine's GPU."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console

from ic.display.numbers import gib
from ic.files.results import read_json, write_results
from ic.model.torch_operators import has_liger
from ic.planning.measurements import MEMORY_FILE
from ic.planning.options import PlanConfig
from ic.planning.plan import Planner
from ic.planning.report import comparison_table
from ic.run.build import build_run
from ic.run.resume import starting_checkpoint

CASES = Path(__file__).with_name("cases.yaml")
# The second step is the first with optimizer state; the others are timed.
_STEPS = 4
_QUIET = (
    f"trainer.max_steps={_STEPS}",
    "trainer.max_time=null",
    "trainer.limit_val_batches=0",
    "trainer.devices=1",
    "logger=none",
    "callbacks.checkpoint=null",
    "callbacks.context_length=null",
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "callbacks.progress=false",
    "callbacks.throughput.warmup_steps=2",
    "data.num_workers=2",
)


def read_cases(path: Path) -> list[list[str]]:
    """Lists of overrides from a YAML file.

    Raises:
        ValueError: no such file, or something else in it.
    """
    if not path.is_file():
        raise ValueError(f"plan.cases={path}: there is no such file")
    cases = yaml.safe_load(path.read_text())
    if not isinstance(cases, list) or not cases or not all(isinstance(c, list) for c in cases):
        raise ValueError(f"plan.cases={path}: must hold a list of lists of overrides")
    return cases


def measure_cases(config: PlanConfig) -> int:
    """Measure every case, show the table, write it.

    Raises:
        ValueError: no CUDA GPU here.
    """
    if not torch.cuda.is_available():
        raise ValueError("plan.measure=true: PyTorch sees no CUDA GPU here")
    from ic.config.compose import compose_config

    asked = config.plan
    output = asked.output_file(MEMORY_FILE)
    rows: list[dict[str, Any]] = []
    for overrides in read_cases(Path(asked.cases) if asked.cases else CASES):
        with tempfile.TemporaryDirectory() as folder:
            settings = [*overrides, *_QUIET, f"output_dir={folder}", "plan.num_gpus=1"]
            case, _ = compose_config("plan", PlanConfig, settings)
            try:
                row = _measure(case)
            except torch.cuda.OutOfMemoryError as error:
                rank_zero_info(f"{' '.join(overrides)}: left out, {error}")
                continue
        rows.append({"case": " ".join(overrides), "overrides": overrides, **row})
        # What is measured stays if a later case fails.
        write_results(output, asdict(asked), rows, public=True)
        rank_zero_info(
            f"{' '.join(overrides)}: predicted {gib(row['predicted_peak_bytes'], 2)}, "
            f"measured {gib(row['measured_peak_bytes'], 2)}"
        )
    if not rows:
        raise ValueError(
            "plan.measure=true: no case fits this GPU; give smaller ones in plan.cases="
        )
    Console().print(comparison_table(rows))
    return 0


def _measure(case: PlanConfig) -> dict[str, Any]:
    liger = has_liger()
    case = replace(case, plan=replace(case.plan, liger=liger))
    planner = Planner(case)
    shape = planner.batch_shape()
    predicted = planner.training(*shape)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = build_run(case, starting_checkpoint(case))
    run.trainer.fit(run.module, datamodule=run.datamodule)
    measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    speed = read_json(run.folder.throughput)
    del run
    (timed,) = speed["by_context_length"]
    return {
        "device_name": torch.cuda.get_device_name(),
        "device_memory_bytes": total,
        "model": asdict(case.model),
        "rows": shape[0],
        "context_length_tokens": shape[1],
        "precision": case.trainer.precision,
        "optimizer": case.optimizer.name,
        "liger": liger,
        "predicted_peak_bytes": predicted.total_bytes,
        "measured_peak_bytes": measured,
        "error_share": predicted.total_bytes / measured - 1,
        "measured_reserved_bytes": reserved,
        "context_bytes": outside,
        "predicted_parts_bytes": predicted.parts_bytes,
        "num_steps_timed": timed["num_steps_timed"],
        "tokens_per_s": timed.get("tokens_per_s"),
        "mfu": timed.get("mfu"),
    }
