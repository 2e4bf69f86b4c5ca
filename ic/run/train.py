"""`fit`: a training run from its configuration to its results file."""

from __future__ import annotations

from dataclasses import asdict

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ic.callbacks.checkpoint import INTERRUPTED_EXIT_CODE, FolderCheckpoint
from ic.callbacks.evaluation import SuiteEvaluation
from ic.callbacks.improvement import BeforeAndAfter
from ic.callbacks.requeue import SlurmRequeue
from ic.config.run import RunConfig, run_directory
from ic.files.results import write_results
from ic.files.run_folder import RunFolder
from ic.model.cost import cache_bytes_per_token, num_parameters
from ic.run.build import adapt_to_gpu, build_run, write_config
from ic.run.resume import forget_checkpoints
from ic.run.summary import run_rows


def train(config: RunConfig) -> int:
    """Train. Resumes with ckpt_path=last, or by itself after SLURM has requeued its job."""
    config = adapt_to_gpu(config)
    trainer, module, data, ckpt = build_run(config, training=True)
    run_dir = run_directory(config)
    run = RunFolder(run_dir)
    if trainer.is_global_zero:
        if ckpt is None or not run.owns(ckpt):
            forget_checkpoints(run_dir)
        write_config(config, run_dir)
    model_config = module.model.config
    rank_zero_info(
        f"{config.name}: {num_parameters(model_config):,} parameters, "
        f"{cache_bytes_per_token(model_config):,} bytes of bf16 cache a token, run in {run_dir}"
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # a sweep's next run in this process needs its own
    for callback in trainer.callbacks:
        if isinstance(callback, SlurmRequeue) and callback.interrupted:
            return callback.finish(trainer.is_global_zero)
    checkpoints = [c for c in trainer.callbacks if isinstance(c, FolderCheckpoint)]
    if any(c.interrupted for c in checkpoints):
        rank_zero_info(f"interrupted; continue with ckpt_path=last (run in {run_dir})")
        return INTERRUPTED_EXIT_CODE
    if trainer.is_global_zero:
        measured = [
            row
            for c in trainer.callbacks
            if isinstance(c, (SuiteEvaluation, BeforeAndAfter))
            for row in c.rows
        ]
        write_results(run.results, asdict(config), run_rows(run_dir) + measured)
    if checkpoints:
        rank_zero_info(f"checkpoint: {run.last}")
    return 0
