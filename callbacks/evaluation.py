"""Evaluation suites while training and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

from ic.callbacks.after_training import agree_to_stop, asked_to_stop, interruption
from ic.callbacks.memory_profiler import memory_phase
from ic.callbacks.options import SuiteEvaluationOptions
from ic.callbacks.throughput import throughput_paused
from ic.datamodules.batch import Batch
from ic.evaluation.answered import Ranks
from ic.evaluation.progress import suite_progress
from ic.evaluation.report import write_report
from ic.evaluation.runner import run_suite
from ic.evaluation.statistics import pool
from ic.evaluation.suite import Row, Suite
from ic.files.run_folder import RunFolder, SuiteFolder
from ic.inference.greedy import StoppedError
from ic.inference.model_facts import positions_of
from ic.parallel.sharded_strategy import ShardedStrategy
from ic.tracking.never_fails import NeverFails


class SuiteEvaluation(Callback):
    """Cheap versions of suites every n steps, and the suites as configured at the end.

    Each writes `samples.jsonl`, a CSV file and a picture into a folder of its name in the run
    directory and logs `<name>/<length>` to the loggers. Where each process has the whole model,
    each takes a share of the samples; where it is sharded, all answer each together. The
    evaluation at the end stops when the run is asked to; a resumed run goes on with the samples
    that are missing.

    Attributes:
        cut_short: the evaluation at the end was stopped.
    """

    def __init__(self, config: SuiteEvaluationOptions, suites: Sequence[Suite[Any]]) -> None:
        self.config = config
        self.suites = suites
        self._last_step = -1
        self._rows: list[Row] = []
        self.cut_short = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what the end of the run would be too late for.

        Raises:
            ValueError: what `Suite.check` refuses.
        """
        if stage == "fit" and self.config.at_end:
            module: Any = pl_module
            for suite in self.suites:
                suite.check(module.tokenizer, positions_of(module.model.config))

    @property
    def rows(self) -> list[Row]:
        """For the results file: what the suites measured at the end."""
        return self._rows

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        every, step = self.config.every_n_steps, trainer.global_step
        if not every or step % every or step == self._last_step:
            return
        self._last_step = step
        current = batch["input_ids"].shape[1]
        lengths = [n for n in self.config.cheap_lengths or [] if n <= current]
        if not lengths:
            return
        for suite in self.suites:
            cheap = suite.cheap(lengths, self.config.cheap_samples)
            file = self._folder(trainer, suite).samples_at(step)
            with isolate_rng():  # the training's generators are not the evaluation's
                cells = self._evaluate(trainer, pl_module, cheap, file, quiet=True)
            if cells:
                self._log(trainer, suite, cells, step - 1)  # with the other metrics of this step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.config.at_end or interruption(trainer) is not None:
            return
        for suite in self.suites:
            file = self._folder(trainer, suite).samples
            try:
                cells = self._evaluate(
                    trainer, pl_module, suite, file, quiet=False, stop=asked_to_stop
                )
            except StoppedError:
                agree_to_stop(trainer)
                self.cut_short = True
                rank_zero_info(
                    f"{suite.name}: stopped; the samples that are done are kept in {file}"
                )
                return
            if cells:
                self._report(trainer, suite, cells)

    def _evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        suite: Suite[Any],
        file: Path,
        *,
        quiet: bool,
        stop: Callable[[Trainer], bool] = lambda _: False,
    ) -> list[Row]:
        """The cells on rank 0, nothing elsewhere.

        Raises:
            StoppedError: on all ranks, once `stop` has said so on any of them.
        """
        module: Any = pl_module
        strategy = trainer.strategy
        sharded = isinstance(strategy, ShardedStrategy)

        def stop_together() -> bool:
            asked = stop(trainer)
            return strategy.reduce_boolean_decision(asked, all=False) if sharded else asked

        with (
            memory_phase(trainer, suite.name) as phase,
            throughput_paused(trainer),
            trainer.precision_plugin.forward_context(),
            strategy.gathered() if isinstance(strategy, ShardedStrategy) else nullcontext(),
            suite_progress(
                suite,
                quiet=quiet or not trainer.is_global_zero,
                processes=1 if sharded else trainer.world_size,
            ) as on_sample,
        ):
            cells = run_suite(
                module.model,
                module.tokenizer,
                suite,
                file,
                on_sample,
                phase.record_cache,
                ranks=None if sharded else cast(Ranks, strategy),
                sharded=sharded,
                stop=stop_together,
            )
        return cells if trainer.is_global_zero else []

    def _report(self, trainer: Trainer, suite: Suite[Any], cells: list[Row]) -> None:
        name = Path(trainer.default_root_dir).parent.name
        picture = write_report(
            suite,
            cells,
            self._folder(trainer, suite),
            title=f"{name}: {suite.title}, step {trainer.global_step:,}",
            trained_length=getattr(trainer.datamodule, "context_length", None),  # type: ignore[attr-defined]
        )
        self._rows += suite.rows(cells)
        self._log(trainer, suite, cells, trainer.global_step)
        self._log_image(trainer, suite, picture)
        console = Console()
        console.print(suite.table(cells))
        console.print(f"{suite.picture}: {picture}", soft_wrap=True, highlight=False)

    @staticmethod
    def _log(trainer: Trainer, suite: Suite[Any], cells: list[Row], step: int) -> None:
        by_length = pool(suite.counted(cells), "length_tokens")
        values = {
            f"{suite.name}/{length}": answers.share for (length,), answers in by_length.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        shown = ", ".join(f"{length}: {answers}" for (length,), answers in by_length.items())
        rank_zero_info(f"step {trainer.global_step}: {suite.name} {shown}")

    @staticmethod
    def _log_image(trainer: Trainer, suite: Suite[Any], picture: Path) -> None:
        tag = f"{suite.name}/{suite.picture}"
        for logger in trainer.loggers:
            if isinstance(logger, NeverFails):
                logger.log_picture(tag, picture, trainer.global_step)
                table = SuiteEvaluation._folder(trainer, suite).table(suite.picture)
                logger.log_csv(f"{tag}_table", table, trainer.global_step)

    @staticmethod
    def _folder(trainer: Trainer, suite: Suite[Any]) -> SuiteFolder:
        return RunFolder(trainer.default_root_dir).suite(suite.name)
