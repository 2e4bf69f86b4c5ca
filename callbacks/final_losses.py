"""The last losses of a run, for its results file."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

_NAMES = ("loss", "perplexity", "bits_per_byte")


class FinalLosses(Callback):
    """Keeps the losses of the last step and of the last validation of a run on text.

    A run that logs no perplexity (its data mark answers, or are pairs) has none of these rows.
    """

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For the results file: a row for `train` and one for `val`, if there was a validation."""
        return list(self._rows.values())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._keep(trainer, "val")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, "train")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self._rows.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = {row["split"]: row for row in state_dict["rows"]}

    def _keep(self, trainer: Trainer, split: str) -> None:
        values = trainer.callback_metrics
        if f"{split}/perplexity" not in values:
            return
        measured = {name: values.get(f"{split}/{name}") for name in _NAMES}
        self._rows[split] = {
            "what": "losses",
            "split": split,
            "step": trainer.global_step,
            **{name: float(value) for name, value in measured.items() if value is not None},
        }
