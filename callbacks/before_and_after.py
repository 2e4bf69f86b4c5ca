"""Validation metrics before the first step and at the end, side by side."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table


class BeforeAndAfter(Callback):
    """Prints a table of the first and the last validation when training ends.

    The first is Lightning's sanity check: `trainer.num_sanity_val_steps=-1` runs it over the whole
    validation set before the first step. Says nothing where there was no sanity check.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if trainer.sanity_checking:
            self.before = values
        else:
            self.after = values

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.before or not self.after or not trainer.is_global_zero:
            return
        table = Table(title="validation before and after training")
        table.add_column("metric")
        for title in ("before", "after"):
            table.add_column(title, justify="right")
        for row in self.rows:
            table.add_row(row["metric"], f"{row['before']:.4f}", f"{row['after']:.4f}")
        Console().print(table)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A resumed run has no sanity check.
        self.before, self.after = state_dict["before"], state_dict["after"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For the results file: each metric that both validations had."""
        return [
            {"what": "validation", "metric": name, "before": self.before[name], "after": value}
            for name, value in self.after.items()
            if name in self.before
        ]
