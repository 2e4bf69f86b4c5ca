"""Passkey evaluation while training and at its end."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from rich.console import Console

from ic.callbacks.memory_profiler import memory_phase
from ic.callbacks.throughput import throughput_paused
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.evaluation.passkey.heatmap import pool, summary_table, write_csv, write_png
from ic.evaluation.passkey.run import run_grid
from ic.evaluation.runner import Ranks
from ic.parallel.sharded import ShardedStrategy


@dataclass
class PasskeyEvaluationConfig:
    """When to evaluate.

    Attributes:
        every_n_steps: steps between cheap grids; 0 for none.
        cheap_lengths: lengths of the cheap grid; each at most the current context length counts.
        cheap_samples: samples a cell and filler of the cheap grid.
        at_end: evaluate the full grid of `evaluation` when training ends.
    """

    every_n_steps: int = 0
    cheap_lengths: list[int] | None = None
    cheap_samples: int = 1
    at_end: bool = True

    def __post_init__(self) -> None:
        if self.every_n_steps < 0:
            raise ValueError(
                f"callbacks.passkey.every_n_steps={self.every_n_steps}: must be at least 0"
            )
        if self.cheap_samples < 1:
            raise ValueError(
                f"callbacks.passkey.cheap_samples={self.cheap_samples}: must be at least 1"
            )
        if self.every_n_steps and not self.cheap_lengths:
            raise ValueError("callbacks.passkey.cheap_lengths: needed with every_n_steps above 0")


class PasskeyEvaluation(Callback):
    """A cheap grid on validation keys every n steps, the full grid on test keys at the end.

    Writes `passkey/cells.jsonl`, `heatmap.csv` and `heatmap.png` into the run directory and logs
    `passkey/<length>` to the loggers. Where each process has the whole model, each takes a share of
    the cells; where it is sharded, all compute each cell together.
    """

    def __init__(self, config: PasskeyEvaluationConfig, grid: PasskeyGridConfig) -> None:
        self.config = config
        self.grid = grid
        self._last_step = -1
        self.final_rows: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.config.every_n_steps, trainer.global_step
        if not every or step % every or step == self._last_step:
            return
        self._last_step = step
        current = batch["input_ids"].shape[1]
        lengths = [n for n in self.config.cheap_lengths or [] if n <= current]
        if not lengths:
            return
        grid = replace(
            self.grid,
            lengths=lengths,
            samples=self.config.cheap_samples,
            samples_by_length={},
            control_samples=0,
            split="validation",
        )
        rows = self._evaluate(trainer, pl_module, grid, f"cells-step={step}.jsonl", quiet=True)
        if rows:
            self._log(trainer, rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interrupted = any(getattr(c, "interrupted", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if not self.config.at_end or interrupted:
            return
        rows = self._evaluate(trainer, pl_module, self.grid, "cells.jsonl", quiet=False)
        if not rows:
            return
        folder = self._folder(trainer)
        write_csv(rows, folder / "heatmap.csv")
        trained = getattr(trainer.datamodule, "context_length", None)  # type: ignore[attr-defined]
        write_png(
            rows,
            folder / "heatmap.png",
            trained_length=trained,
            title=f"{Path(trainer.default_root_dir).parent.name}: passkey retrieval on synthetic "
            f"text, step {trainer.global_step:,}",
        )
        self.final_rows = rows
        self._log(trainer, rows)
        self._log_image(trainer, folder / "heatmap.png")
        console = Console()
        console.print(summary_table(rows))
        console.print(f"heatmap: {folder / 'heatmap.png'}", soft_wrap=True, highlight=False)

    def _evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        grid: PasskeyGridConfig,
        name: str,
        *,
        quiet: bool,
    ) -> list[dict[str, Any]]:
        strategy = trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)
        with (
            memory_phase(trainer, "passkey") as phase,
            throughput_paused(trainer),
            trainer.precision_plugin.forward_context(),
            strategy.gathered() if isinstance(strategy, ShardedStrategy) else nullcontext(),
        ):
            rows = run_grid(
                pl_module.model,
                pl_module.tokenizer,
                grid,
                self._folder(trainer) / name,
                quiet=quiet or not trainer.is_global_zero,
                on_cache=phase.record_cache,
                ranks=None if sharded else cast(Ranks, strategy),
                sharded=sharded,
            )
        return rows if trainer.is_global_zero else []

    def _log(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        sums: dict[int, list[int]] = {}
        for cell in pool(rows):
            if cell.depth >= 0:
                total = sums.setdefault(cell.length_tokens, [0, 0])
                total[0] += cell.correct
                total[1] += cell.n
        values = {f"passkey/{length}": right / n for length, (right, n) in sums.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        shown = ", ".join(f"{length}: {right}/{n}" for length, (right, n) in sums.items())
        rank_zero_info(f"step {trainer.global_step}: passkey {shown}")

    @staticmethod
    def _log_image(trainer: Trainer, path: Path) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                image = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(
                    "passkey/heatmap", image, trainer.global_step, dataformats="HWC"
                )
            elif isinstance(logger, WandbLogger):
                logger.log_image("passkey/heatmap", [str(path)], step=trainer.global_step)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "passkey"
