"""From a checked configuration to a run: its trainer, module and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from ic.callbacks.throughput import Throughput
from ic.checkpoint.folder import FolderCheckpointIO, load_config
from ic.config.run import RunConfig
from ic.config.trainer import TrainerConfig
from ic.datamodules.file_contents import ReadsFiles
from ic.datamodules.tokenizers import build_tokenizer, vocabulary_size
from ic.files.atomic_write import replacing
from ic.files.run_folder import RunFolder
from ic.inference.loading import Opened
from ic.machine.devices import check_accelerator, check_devices, num_devices, runnable_backends
from ic.machine.slurm_job import SlurmJob
from ic.model import MLAForCausalLM
from ic.model.backends import Backends, gpu_capability
from ic.model.fp8 import check_fp8, use_fp8
from ic.run.resume import Start, begins_again
from ic.tracking.tracker import Tracker
from ic.training.find_callback import find_callback
from ic.training.language_modeling import LanguageModelingModule
from ic.training.loops import use_resumable_loops


@dataclass
class Run:
    """A run that is ready to go.

    Attributes:
        folder: where everything of the run lies.
    """

    trainer: Trainer
    module: LanguageModelingModule
    datamodule: LightningDataModule
    folder: RunFolder


def build_run(config: RunConfig, start: Start | None = None) -> Run:
    """Build all parts of a run.

    Args:
        start: where training starts (`ic.run.resume.starting_checkpoint`); None for a run that only
            evaluates, and writes nothing.

    Raises:
        ValueError: what was configured does not fit together, or not to this machine.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    if start is not None and start.checkpoint is not None:
        load_config(start.checkpoint)  # fail before anything is built
    tokenizer = _tokenizer(config, start)
    datamodule = config.data.build(tokenizer)
    if start is not None and isinstance(datamodule, ReadsFiles):
        datamodule.check_files()  # before the model is built, and anything written
    # The reference of preference training is what the run began with.
    restored = start is not None and start.checkpoint is not None and config.preference is None
    teacher = _open_teacher(config, tokenizer)
    model = config.model.build(tokenizer, take_over=not restored)
    if (recipe := config.model.fp8) is not None:
        capability = gpu_capability(config.trainer.accelerator)
        keep_layers, keep = config.model.fp8_keep_layers, config.model.fp8_keep
        rank_zero_info(
            f"model.fp8={recipe}: {use_fp8(model, recipe, capability, keep_layers, keep)}"
        )
    module = build_module(config, model, tokenizer, teacher)
    io = FolderCheckpointIO(model.config, tokenizer, config.model.adapter)
    trainer = build_trainer(config, io, start)
    return Run(trainer, module, datamodule, config.folder)


def _tokenizer(config: RunConfig, start: Start | None) -> PreTrainedTokenizerBase:
    """The run's tokenizer: the one in its checkpoint where the folder that it came from is gone."""
    checkpoint = config.model.init_from if start is None else start.checkpoint
    there = config.tokenizer == "bytes" or Path(config.tokenizer).is_dir()
    if there or checkpoint is None or (start is not None and not start.continues):
        return build_tokenizer(config.tokenizer, config.chat_template)
    return build_tokenizer(str(checkpoint))


def _open_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Opened | None:
    """The teacher of a distillation, refused before any weights are loaded if it does not fit."""
    if config.distillation is None:
        return None
    return config.distillation.open_teacher(
        tokenizer,
        config.data.context_length,
        config.model.mla_config(vocabulary_size(tokenizer)).vocab_size,
        config.trainer.accelerator != "cpu" and torch.cuda.is_available(),
    )


def build_module(
    config: RunConfig,
    model: MLAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Opened | None = None,
) -> LanguageModelingModule:
    """The module that trains `model` for the run's objective.

    Args:
        teacher: of a distillation, without its weights.
    """
    if config.distillation is not None:
        assert teacher is not None
        return config.distillation.build(model, tokenizer, config.optimizer, teacher)
    objective = config.preference or config.objective
    return objective.build(model, tokenizer, config.optimizer)


def build_trainer(config: RunConfig, io: FolderCheckpointIO, start: Start | None) -> Trainer:
    """`lightning.Trainer`; without a `start` of a training it writes nothing.

    In a SLURM job the numbers of nodes and devices are the job's.

    Raises:
        ValueError: what was configured does not fit together, or not to this machine.
    """
    check_accelerator(config.trainer.accelerator)
    t = config.trainer
    job = SlurmJob.current()
    if job is None:
        check_devices(t.accelerator, t.devices)
        num_processes = num_devices(t.accelerator, t.devices) * t.num_nodes
    else:
        num_processes = job.tasks_per_node * job.num_nodes
    config.strategy.check_run(
        accelerator=t.accelerator,
        gpus=torch.cuda.device_count(),
        precision=t.precision,
        optimizer=config.optimizer.name,
    )
    callbacks, loggers = [], []
    if start is not None:
        callbacks = config.callbacks.build(config)
        loggers = config.logger.build(
            config.name,
            config.run_id,
            config.folder,
            start.first_step,
            stage=config.stage,
            goes_on=start.continues or begins_again(config),
        )
    trainer = Trainer(
        default_root_dir=config.folder.path,
        callbacks=callbacks,
        logger=loggers,
        strategy=config.strategy.build(t.precision, num_processes),
        plugins=[io] if job is None else [io, job.environment()],
        max_epochs=-1,
        max_steps=t.max_steps,
        max_time=t.max_time,
        accelerator=t.accelerator,
        devices=t.devices if job is None else job.tasks_per_node,
        num_nodes=t.num_nodes if job is None else job.num_nodes,
        precision=t.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.gradient_clip_val,
        check_val_every_n_epoch=None,
        # Lightning counts micro-batches here, and optimizer steps everywhere else.
        val_check_interval=_validate_every(t) * t.accumulate_grad_batches,
        limit_val_batches=t.limit_val_batches,
        num_sanity_val_steps=t.num_sanity_val_steps,
        log_every_n_steps=t.log_every_n_steps,
        deterministic=t.deterministic,
        detect_anomaly=t.detect_anomaly,
        enable_checkpointing=config.callbacks.checkpoint is not None and start is not None,
        enable_progress_bar=config.callbacks.progress,  # without ours Lightning would add its own
        enable_model_summary=False,
        use_distributed_sampler=False,
        # FSDP's gathered parameters, once made in inference mode, could not be trained.
        inference_mode=config.strategy.name not in ("fsdp", "fsdp2"),
    )
    throughput = find_callback(trainer, Throughput)
    for logger in trainer.loggers:
        if isinstance(logger, Tracker) and throughput is not None:
            logger.count_tokens = partial(getattr, throughput, "tokens_seen")
    return use_resumable_loops(trainer)


def _validate_every(trainer: TrainerConfig) -> int:
    """Optimizer steps between validations; a run that is shorter is validated at its end."""
    if trainer.max_steps < 1:
        return trainer.val_check_interval
    return min(trainer.val_check_interval, trainer.max_steps)


def write_config(config: RunConfig) -> None:
    """The run's whole configuration as `config.yaml`, written under a temporary name."""
    with replacing(config.folder.config) as partial:
        partial.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def adapt_to_gpu(config: RunConfig) -> RunConfig:
    """The configuration that this machine can run; a line on rank 0 says what is different.

    Raises:
        ValueError: Triton asked for without a GPU, or FP8 products that it cannot compute.
    """
    model, trainer = config.model, config.trainer
    resolved = runnable_backends(
        Backends(model.attention, model.norm, model.rope, trainer.precision), trainer.accelerator
    )
    if model.fp8 is not None:
        check_fp8(model.fp8, gpu_capability(trainer.accelerator))
    model = replace(model, attention=resolved.attention, norm=resolved.norm, rope=resolved.rope)
    return replace(config, model=model, trainer=replace(trainer, precision=resolved.precision))
