"""`fit`: a training run from its configuration to its results file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ic.callbacks.after_training import evaluation_incomplete, interruption, measured_rows
from ic.config.run import RunConfig
from ic.files.atomic_write import write_json
from ic.files.leftovers import clear_leftovers
from ic.files.results import RunStatus, results_of_run, set_status
from ic.files.run_folder import RunFolder
from ic.files.run_lock import locked
from ic.model.cost import cache_bytes_per_token, num_parameters
from ic.parallel.launch import ending_together, leads_the_run
from ic.parallel.watchdog import naming_lost_ranks
from ic.run.build import adapt_to_gpu, build_run, write_config
from ic.run.copied import restore_links
from ic.run.notices import notices, trained
from ic.run.resume import forget_results, nothing_left, starting_checkpoint
from ic.tracking.never_fails import NeverFails
from ic.tracking.outcome import log_outcome
from ic.tracking.provenance import provenance
from ic.tracking.tracker import Tracker


def train(config: RunConfig) -> int:
    """Train. Resumes with ckpt_path=last, or by itself after SLURM has requeued its job.

    Raises:
        RunInUseError: another process trains in the run's folder.
    """
    if not leads_the_run():
        return _train(config)
    with locked(config.folder):
        clear_leftovers(config.folder)
        restore_links(config.folder)
        return _train(config)


def _train(config: RunConfig) -> int:
    config = adapt_to_gpu(config)
    start = starting_checkpoint(config)
    if (done := nothing_left(config, start)) is not None:
        rank_zero_info(done)
        return 0
    if start.continues:
        rank_zero_info(f"continuing from {start.checkpoint}")
    run = build_run(config, start)
    trainer, folder = run.trainer, run.folder
    if trainer.is_global_zero:
        if start.continues:
            all_steps = start.first_step == config.trainer.max_steps
            status = RunStatus.EVALUATION_INCOMPLETE if all_steps else RunStatus.TRAINING
            set_status(folder.results, status)
        else:
            forget_results(folder)
        write_config(config)
    model_config = run.module.model.config
    for notice in notices(config, start):
        rank_zero_info(f"warning: {notice}")
    rank_zero_info(
        f"{config.name}: {num_parameters(model_config):,} parameters, {trained(run.module.model)}"
        f"{cache_bytes_per_token(model_config):,} bytes of bf16 cache per token, "
        f"run in {folder.path}"
    )
    trackers = [each for each in trainer.loggers if isinstance(each, Tracker)]
    if trackers and trainer.is_global_zero:
        start_of_run = provenance(asdict(config), config.stage, with_diff=config.logger.diff)
        for tracker in trackers:
            tracker.begin(start_of_run)
    with ending_together(trainer.strategy), naming_lost_ranks():
        trainer.fit(
            run.module, datamodule=run.datamodule, ckpt_path=start.checkpoint, weights_only=True
        )
    interrupted = interruption(trainer)
    if trainer.is_global_zero:
        log_outcome(trackers, folder, trainer.global_step)
    for logger in trainer.loggers:
        if isinstance(logger, NeverFails):
            logger.close(finished=interrupted is None)
    cut_short = evaluation_incomplete(trainer)
    if trainer.is_global_zero and (interrupted is None or cut_short):
        status = RunStatus.EVALUATION_INCOMPLETE if cut_short else RunStatus.FINISHED
        results = results_of_run(asdict(config), measured_rows(trainer), status)
        # Before the results: a run that has those is finished, and nothing is made of it again.
        if config.report:
            _report(folder, results)
        write_json(folder.results, results)
    if interrupted is not None:
        return interrupted.finish(trainer)
    if config.callbacks.checkpoint is not None:
        rank_zero_info(f"checkpoint: {folder.last}")
    return 0


def _report(folder: RunFolder, results: Mapping[str, Any]) -> None:
    """A report that cannot be written is a warning: the training that it tells of has ended."""
    from ic.run.report.page import write_report  # draws, which a run without a report does not

    try:
        rank_zero_info(f"report: {write_report(folder, results)}")
    except (OSError, ValueError) as error:
        rank_zero_warn(f"no report is written: {error}; make it with report run={folder.path}")
