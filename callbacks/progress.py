"""Progress of a training run: a live line on a terminal, plain lines in a file or a job's log.

The position is in steps or in time, whatever the trainer is limited by, because an epoch of an
endless stream has no length. Metrics are read from the trainer at most twice a second: reading one
that lives on a GPU waits for the GPU.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn, RichProgressBarTheme
from rich.console import Console
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text
from torch import Tensor

from ic.display.numbers import clock_text, short_number
from ic.training.find_callback import find_callback


@dataclass
class TrainingProgressConfig:
    """How often something new appears.

    Attributes:
        refresh_per_second: redraws of the live line.
        plain_every_n_steps: steps between plain lines,
        plain_every_s: or seconds, whichever comes first.
    """

    refresh_per_second: int = 4
    plain_every_n_steps: int = 50
    plain_every_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("refresh_per_second", "plain_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"callbacks.progress.{name}={getattr(self, name)}: must be at least 1"
                )
        if not self.plain_every_s > 0:
            raise ValueError(
                f"callbacks.progress.plain_every_s={self.plain_every_s}: must be above 0"
            )


# Logged name, name on the live line, name on plain lines, format.
METRICS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("train/loss", "loss", "loss", lambda v: f"{v:.3f}"),
    ("train/answer_accuracy", "acc", "answer accuracy", lambda v: f"{v:.3f}"),
    ("train/context_length", "ctx", "context", lambda v: f"{v:,.0f}"),
    ("train/tokens_per_s", "tok/s", "tokens/s", short_number),
    ("lr", "lr", "lr", lambda v: f"{v:.1e}"),
)
READ_INTERVAL_S = 0.5


class TrainingProgress(RichProgressBar):
    """Step and time against their limits, loss, answer accuracy, context length, tokens/s, lr, ETA.

    On a terminal (or in a notebook) Lightning's rich bar with our columns; elsewhere plain lines
    without control characters. Quiet on ranks above 0. The ETA is the smaller of what is left of
    `max_time` and the steps left at the pace of the last 100, evaluations included.

    Args:
        clock: seconds; for tests.
        console_kwargs: of the `rich.console.Console`, as for `RichProgressBar`.
    """

    def __init__(
        self,
        config: TrainingProgressConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.config = config or TrainingProgressConfig()
        theme = RichProgressBarTheme(metrics="", metrics_text_delimiter="  ")
        super().__init__(
            refresh_rate=self.config.refresh_per_second,
            leave=True,
            theme=theme,
            console_kwargs=console_kwargs,
        )
        self._clock = clock
        self._plain: Console | None = None
        self._pace: deque[tuple[float, int]] = deque(maxlen=101)
        self._max_steps = math.inf
        self._last_read = -math.inf
        self._first_step = 0
        self._last_line = (-math.inf, 0)

    @property
    def is_enabled(self) -> bool:
        """Whether there is a live line; never without a terminal."""
        return super().is_enabled and self._plain is None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        is_live = (console.is_terminal and not console.is_dumb_terminal) or console.is_jupyter
        self._plain = None if is_live else console

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        style = self.theme.progress_bar
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(
                bar_width=14, complete_style=style, finished_style=style, pulse_style=style
            ),
            PositionColumn(),
        ]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The live line's metrics, formatted."""
        known = self._read_metrics(trainer)
        shown = {short: text for (_, short, _, _), text in known}
        shown["eta"] = clock_text(self._eta_s(trainer))
        return dict(shown)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._max_steps = _max_steps(trainer)
        self._pace.clear()
        self._first_step = trainer.global_step
        self._last_line = (self._clock(), trainer.global_step)
        super().on_train_start(trainer, pl_module)
        self._say(trainer, f"training: {self._position(trainer)}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._init_progress(trainer)  # a no-op unless the epoch before has stopped it
        if self.is_enabled and self.progress is not None and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = self._clock(), trainer.global_step
        if not self._pace or step > self._pace[-1][1]:
            self._pace.append((now, step))
        is_last = step >= self._max_steps or trainer.should_stop
        if self.is_enabled:
            if now - self._last_read >= READ_INTERVAL_S or is_last:
                self._last_read = now
                self._draw(trainer, pl_module)
        elif self._is_line_due(now, step) or (is_last and step > self._last_line[1]):
            self._last_line = (now, step)
            parts = [self._position(trainer)]
            parts += [f"{name} {text}" for (_, _, name, _), text in self._read_metrics(trainer)]
            parts.append(f"ETA {clock_text(self._eta_s(trainer))}")
            self._say(trainer, ", ".join(parts))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Stop drawing here, not at teardown: other callbacks report and draw in on_train_end.
        if self.is_enabled and self.train_progress_bar_id is not None:
            self._draw(trainer, pl_module)
            self._stop_progress()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        shown = ", ".join(f"{name} {float(value):.3f}" for name, value in values.items())
        self._say(trainer, f"validation at step {trainer.global_step:,}: {shown or 'done'}")

    def _initialize_train_progress_bar_id(self) -> None:
        # The bar is a share of the run: steps and time have no common unit.
        assert self.progress is not None
        self.train_progress_bar_id = self.progress.add_task("train", total=1.0, position="")

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.progress is None:
            return
        if self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
        assert self.train_progress_bar_id is not None
        self.progress.update(
            self.train_progress_bar_id,
            completed=self._share(trainer),
            position=self._position(trainer),
        )
        self._update_metrics(trainer, pl_module)
        self.refresh()

    def _say(self, trainer: Trainer, line: str) -> None:
        if self._plain is not None and trainer.is_global_zero and self._enabled:
            self._plain.print(line, markup=False, highlight=False, soft_wrap=True)
            self._plain.file.flush()

    def _is_line_due(self, now: float, step: int) -> bool:
        last_time, last_step = self._last_line
        if self._plain is None or step == last_step:
            return False
        return (
            last_step == self._first_step
            or step - last_step >= self.config.plain_every_n_steps
            or now - last_time >= self.config.plain_every_s
        )

    def _read_metrics(self, trainer: Trainer) -> list[tuple[tuple[Any, ...], str]]:
        values = {**trainer.callback_metrics, **trainer.progress_bar_metrics}
        return [
            (metric, metric[3](_to_float(values[metric[0]])))
            for metric in METRICS
            if metric[0] in values
        ]

    def _position(self, trainer: Trainer) -> str:
        """`step 120/1,000`, `0:02:10/0:07:00`, or both."""
        text = f"step {trainer.global_step:,}"
        if math.isfinite(self._max_steps):
            text += f"/{self._max_steps:,.0f}"
        elapsed, limit = _time_limit(trainer)
        return text if limit is None else f"{text}, {clock_text(elapsed)}/{clock_text(limit)}"

    def _share(self, trainer: Trainer) -> float:
        elapsed, limit = _time_limit(trainer)
        by_time = elapsed / limit if limit else 0.0
        return min(1.0, max(trainer.global_step / self._max_steps, by_time))

    def _eta_s(self, trainer: Trainer) -> float | None:
        left = []
        elapsed, limit = _time_limit(trainer)
        if limit is not None:
            left.append(max(0.0, limit - elapsed))
        if math.isfinite(self._max_steps) and len(self._pace) > 1:
            (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
            seconds_a_step = (last_time - first_time) / (last_step - first_step)
            left.append(max(0.0, self._max_steps - last_step) * seconds_a_step)
        return min(left, default=None)


class PositionColumn(ProgressColumn):
    """Our position text; batches for the bars that Lightning adds (validation, test, predict)."""

    def render(self, task: Task) -> Text:
        total = task.total if task.total is not None and math.isfinite(task.total) else "--"
        return Text(task.fields.get("position", f"{int(task.completed)}/{total}"))


def _to_float(value: Any) -> float:
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def _max_steps(trainer: Trainer) -> float:
    if trainer.max_steps > 0:
        return trainer.max_steps
    return trainer.estimated_stepping_batches


def _time_limit(trainer: Trainer) -> tuple[float, float | None]:
    """Seconds of training so far, and `max_time` (None without one)."""
    timer = find_callback(trainer, Timer)
    remaining = None if timer is None else timer.time_remaining("train")
    if timer is None or remaining is None:
        return 0.0, None
    elapsed = timer.time_elapsed("train")
    return elapsed, elapsed + remaining
