"""The rows that callbacks keep for a run's results file, over a stop too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ic.callbacks.before_and_after import BeforeAndAfter
from ic.callbacks.final_losses import FinalLosses


def trainer(step: int, *, sanity: bool = False, leads: bool = True, **metrics: float) -> Any:
    values = {name.replace("_", "/", 1): torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(
        global_step=step, sanity_checking=sanity, is_global_zero=leads, callback_metrics=values
    )


MODULE: Any = None


def test_the_last_losses_of_each_split() -> None:
    callback = FinalLosses()
    callback.on_validation_end(trainer(0, sanity=True, val_loss=9.0, val_perplexity=9.0), MODULE)
    assert callback.rows == []
    for step in (2, 4):
        losses = {"val_loss": 1.0 * step, "val_perplexity": 2.0 * step, "val_bits_per_byte": 0.5}
        callback.on_validation_end(trainer(step, **losses), MODULE)
    callback.on_train_end(trainer(5, train_loss=3.0, train_perplexity=8.0), MODULE)
    val = {"what": "losses", "split": "val", "step": 4, "loss": 4.0, "perplexity": 8.0}
    train = {"what": "losses", "split": "train", "step": 5, "loss": 3.0, "perplexity": 8.0}
    assert callback.rows == [{**val, "bits_per_byte": 0.5}, train]
    resumed = FinalLosses()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.rows == callback.rows
    resumed.on_train_end(trainer(9, train_loss=2.0, train_perplexity=7.0), MODULE)
    assert [(row["split"], row["step"]) for row in resumed.rows] == [("val", 4), ("train", 9)]


def test_a_run_without_perplexity_has_no_losses() -> None:
    callback = FinalLosses()
    callback.on_validation_end(trainer(2, val_loss=1.0), MODULE)
    callback.on_train_end(trainer(2, train_loss=1.0), MODULE)
    assert callback.rows == []


def test_the_first_and_the_last_validation_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    callback = BeforeAndAfter()
    callback.on_validation_end(trainer(0, sanity=True, val_loss=6.0, val_margin=0.0), MODULE)
    for step, loss in ((2, 5.0), (4, 4.5)):
        metrics = {"val_loss": loss, "val_other": 1.0, "train_loss": 3.0}
        callback.on_validation_end(trainer(step, **metrics), MODULE)
    row = {"what": "validation", "metric": "val/loss", "before": 6.0, "after": 4.5}
    assert callback.rows == [row]
    callback.on_train_end(trainer(4, leads=False), MODULE)
    assert capsys.readouterr().out == ""
    callback.on_train_end(trainer(4), MODULE)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "val/loss" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["val/loss", "6.0000", "4.5000"]
    assert "val/margin" not in printed
    assert "val/other" not in printed
    resumed = BeforeAndAfter()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.rows == [row]


@pytest.mark.parametrize("sanity", [True, False])
def test_nothing_is_said_without_both_validations(
    sanity: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = BeforeAndAfter()
    callback.on_validation_end(trainer(0, sanity=sanity, val_loss=6.0), MODULE)
    callback.on_train_end(trainer(0), MODULE)
    assert capsys.readouterr().out == ""
    assert callback.rows == []
