"""A picture of the losses, drawn anew at every validation and at the end of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ic.callbacks.context_length import ContextLength
from ic.callbacks.throughput import throughput_paused
from ic.display.figure import new_figure, save_png
from ic.display.numbers import tokens
from ic.files.run_folder import RunFolder
from ic.tracking.csv_logger import read_metrics
from ic.training.find_callback import all_callbacks

TRAIN_COLOR, VAL_COLOR, MARK_COLOR = "#5B8DB8", "#D1495B", "#888888"
TRAIN, VAL = "train/loss", "val/loss"
_DOTS_UP_TO = 60  # points of a line that are marked one by one


class LossCurve(Callback):
    """Draws `loss.png` from the rows of the CSV logger, those from before a resume too.

    Without the CSV logger, or before its first row, there is nothing to draw. A picture that cannot
    be written is a warning: it ends no training.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    @staticmethod
    def _draw(trainer: Trainer) -> None:
        logger = next((each for each in trainer.loggers if isinstance(each, CSVLogger)), None)
        if logger is None or not trainer.is_global_zero:
            return
        folder = RunFolder(trainer.default_root_dir)
        lengths = [
            (step, length)
            for callback in all_callbacks(trainer)
            if isinstance(callback, ContextLength)
            for step, length, _ in callback.history
        ]
        with throughput_paused(trainer):
            logger.save()
            rows = read_metrics(folder.metrics)
            try:
                draw_losses(rows, folder.path.parent.name, folder.loss_curve, lengths)
            except OSError as error:
                rank_zero_warn(f"{folder.loss_curve} is not drawn: {error}")


def draw_losses(
    rows: Sequence[Mapping[str, str]],
    name: str,
    path: Path,
    lengths: Sequence[tuple[int, int]] = (),
) -> None:
    """Write a PNG of the training and validation loss by step; none without a loss.

    A dotted line marks each step at which a curriculum changed the context length.

    Args:
        rows: of `metrics.csv`.
        name: the model's.
        lengths: (steps done, context length in tokens from there on) of the curriculum. A row's
            own length is none of it: unpacked data and preferences have another in each batch.
    """
    train, val = _series(rows, TRAIN), _series(rows, VAL)
    if not train and not val:
        return
    figure = new_figure(7.2, 4.2)
    axis = figure.add_subplot()
    for points, label, color in ((train, "training", TRAIN_COLOR), (val, "validation", VAL_COLOR)):
        if points:
            mark = "o" if len(points) <= _DOTS_UP_TO else None
            axis.plot(
                *zip(*points, strict=True), label=label, color=color, marker=mark, markersize=3
            )
    marked = lengths if len(lengths) > 1 else ()
    for step, length in marked:
        axis.axvline(step, color=MARK_COLOR, linestyle=":", linewidth=1)
        axis.annotate(
            f" {tokens(length)}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8,
            color=MARK_COLOR,
        )
    dotted = "; dotted: context length in tokens from there on" if marked else ""
    axis.set_xlabel(f"optimizer step{dotted}")
    axis.set_ylabel("loss")
    axis.set_title(f"{name}: loss", loc="left", fontsize=11)
    axis.grid(axis="y", color="#E6E6E6")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_png(figure, path, dpi=130)


def _series(rows: Sequence[Mapping[str, str]], metric: str) -> list[tuple[int, float]]:
    return [(int(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
