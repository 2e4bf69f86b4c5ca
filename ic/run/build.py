"""From checked configuration to objects; the only place that builds."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.callbacks.context_length import AdaptiveContextLength
from ic.callbacks.evaluation import SuiteEvaluation
from ic.callbacks.gpu_utilisation import GpuUtilisation
from ic.callbacks.guardrails import Guardrails
from ic.callbacks.improvement import BeforeAndAfter
from ic.callbacks.memory_profiler import MemoryProfiler
from ic.callbacks.profiler import Profiler
from ic.callbacks.progress import TrainingProgress
from ic.callbacks.requeue import SlurmRequeue
from ic.callbacks.throughput import Throughput
from ic.checkpoint.folder import (
    FolderCheckpointIO,
    check_same_architecture,
    load_config,
    load_model,
    trained_length,
)
from ic.config.run import ModelConfig, RunConfig, run_directory
from ic.datamodules.options import (
    PasskeyDataOptions,
    PreferenceDataOptions,
    SFTDataOptions,
    TextDataOptions,
)
from ic.datamodules.passkey import PasskeyDataModule
from ic.datamodules.preference import PreferenceDataModule
from ic.datamodules.sft import SFTDataModule
from ic.datamodules.text import TextDataModule
from ic.datamodules.tokenizers import build_tokenizer, vocabulary_size
from ic.evaluation.registry import build_suite
from ic.files.atomic_write import replacing
from ic.files.run_folder import RunFolder, saved_step
from ic.machine.devices import _resolve, check_accelerator, check_devices
from ic.machine.slurm_job import SlurmJob
from ic.model import MLAForCausalLM
from ic.model.adapter import add_adapter
from ic.model.backends import Backends
from ic.parallel.fsdp import LayerFSDPStrategy
from ic.parallel.fsdp2 import FSDP2Strategy
from ic.parallel.watchdog import Watchdog, record_collectives
from ic.run.resume import starting_checkpoint
from ic.tracking.csv_logger import ContinuedCSVLogger
from ic.training.language_modeling import LanguageModelingModule
from ic.training.preference import PreferenceModule

# A curriculum from 256 tokens to a million doubles twelve times.
MAX_COMPILED_LENGTHS = 32


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> MLAForCausalLM:
    """A fresh model, or the weights of `init_from` in this configuration.

    Args:
        vocab_size: rows of embedding and head; by default the tokenizer's.
    """
    wanted = config.mla_config(
        vocab_size or vocabulary_size(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if config.init_from is None:
        model = MLAForCausalLM(wanted)
    else:
        folder = Path(config.init_from)
        check_same_architecture(wanted, load_config(folder), folder)
        wanted.trained_length = trained_length(folder)
        model = load_model(folder).float()
        # Positions, rotation and backend may change from stage to stage; the weights do not depend
        # on them.
        fresh = MLAForCausalLM(wanted)
        fresh.load_state_dict(model.state_dict())
        model = fresh
    if config.adapter is not None:
        add_adapter(model, config.adapter)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        # One graph a context length: with symbolic lengths each layer falls into several graphs.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, MAX_COMPILED_LENGTHS)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model.train()


def build_datamodule(data: Any, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
    """The datamodule that a data configuration names."""
    if isinstance(data, PasskeyDataOptions):
        return PasskeyDataModule(data, tokenizer)
    if isinstance(data, SFTDataOptions):
        return SFTDataModule(data, tokenizer)
    if isinstance(data, PreferenceDataOptions):
        return PreferenceDataModule(data, tokenizer)
    assert isinstance(data, TextDataOptions)
    return TextDataModule(data, tokenizer)


def build_module(
    config: RunConfig, model: MLAForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> LanguageModelingModule:
    if config.preference is not None:
        return PreferenceModule(model, tokenizer, config.optimizer, config.preference)
    return LanguageModelingModule(model, tokenizer, config.optimizer, config.objective)


def build_callbacks(config: RunConfig) -> list[Callback]:
    """Callbacks in the order in which their hooks should run.

    The passkey evaluation comes before the checkpoint, so that neither changes what the other sees,
    and throughput before both, so that it does not time them.
    """
    wanted = config.callbacks
    built: list[Callback] = []
    if wanted.watchdog is not None:
        built.append(Watchdog(wanted.watchdog))
    if wanted.throughput is not None:
        built.append(Throughput(wanted.throughput))
    if wanted.gpu_utilisation is not None:
        built.append(GpuUtilisation(wanted.gpu_utilisation))
    if wanted.memory is not None:
        built.append(MemoryProfiler(wanted.memory))
    if wanted.context_length is not None:
        built.append(AdaptiveContextLength(wanted.context_length))
    if wanted.guardrails is not None:
        built.append(Guardrails(wanted.guardrails))
    if wanted.checkpoint is not None:
        built.append(FolderCheckpoint(wanted.checkpoint))
    if wanted.profiler is not None:
        built.append(Profiler(wanted.profiler))
    if wanted.requeue is not None and wanted.checkpoint is not None:
        built.append(SlurmRequeue(wanted.requeue, SlurmJob.current()))
    elif wanted.requeue is not None and SlurmJob.current() is not None:
        rank_zero_warn("callbacks.checkpoint=null: this job cannot be requeued, nothing is saved")
    if wanted.passkey is not None:
        built.append(SuiteEvaluation(wanted.passkey, [build_suite("passkey", config.evaluation)]))
    if config.trainer.num_sanity_val_steps:
        built.append(BeforeAndAfter())
    if wanted.progress:
        built.append(TrainingProgress())
    return built


def build_loggers(config: RunConfig, run_dir: Path, ckpt: Path | None) -> list[Logger]:
    """CSV and TensorBoard write into the run directory; W&B keeps the run's id over resumes."""
    run = RunFolder(run_dir)
    loggers: list[Logger] = []
    if config.logger.csv:
        if ckpt is not None and run.owns(ckpt):
            step = saved_step(ckpt.resolve())
            loggers.append(ContinuedCSVLogger(run_dir, version=run.csv.name, first_step=step))
        else:
            loggers.append(CSVLogger(run_dir, name="", version=run.csv.name))
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="", version=run.tensorboard.name))
    if config.logger.wandb is not None:
        wandb = config.logger.wandb
        loggers.append(
            WandbLogger(
                name=f"{config.name}/{config.run_id}",
                save_dir=run_dir,
                project=wandb.project,
                id=f"{config.name}-{config.run_id}",
                resume="allow",
                offline=wandb.mode == "offline",
                tags=wandb.tags,
            )
        )
    return loggers


def build_strategy(config: RunConfig) -> str | Strategy:
    backend = config.strategy.process_group_backend
    config.strategy.check_run(
        accelerator=config.trainer.accelerator,
        gpus=torch.cuda.device_count(),
        precision=config.trainer.precision,
        optimizer=config.optimizer.name,
    )
    match config.strategy.name:
        case "ddp":
            return DDPStrategy(process_group_backend=backend)
        case "fsdp":
            return LayerFSDPStrategy(config.trainer.precision, backend)
        case "fsdp2":
            return FSDP2Strategy(config.strategy.context_parallel_size, backend)
    return "auto"


def build_trainer(
    config: RunConfig, run_dir: Path, io: FolderCheckpointIO, ckpt: Path | None, *, training: bool
) -> Trainer:
    """`lightning.Trainer`; without `training` it writes nothing.

    In a SLURM job the numbers of nodes and devices are the job's.
    """
    check_accelerator(config.trainer.accelerator)
    t = config.trainer
    job = SlurmJob.current()
    if job is None:
        check_devices(t.accelerator, t.devices)
    return Trainer(
        default_root_dir=run_dir,
        callbacks=build_callbacks(config) if training else [],
        logger=build_loggers(config, run_dir, ckpt) if training else False,
        strategy=build_strategy(config),
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
        val_check_interval=t.val_check_interval * t.accumulate_grad_batches,
        limit_val_batches=t.limit_val_batches,
        num_sanity_val_steps=t.num_sanity_val_steps,
        log_every_n_steps=t.log_every_n_steps,
        deterministic=t.deterministic,
        detect_anomaly=t.detect_anomaly,
        enable_checkpointing=config.callbacks.checkpoint is not None and training,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # FSDP's gathered parameters, once made in inference mode, could not be trained.
        inference_mode=config.strategy.name not in ("fsdp", "fsdp2"),
    )


def build_run(config: RunConfig, *, training: bool) -> tuple[Any, ...]:
    """Trainer, LightningModule, datamodule and checkpoint folder (or None) of a run.

    Raises:
        ValueError: what was configured does not fit together, or not to this machine.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    run_dir = run_directory(config)
    ckpt = starting_checkpoint(config, run_dir) if training else None
    if ckpt is not None:
        load_config(ckpt)  # fail before anything is built
    if training and config.callbacks.watchdog is not None and torch.cuda.is_available():
        record_collectives(RunFolder(run_dir).nccl)
    tokenizer = build_tokenizer(config.tokenizer)
    datamodule = build_datamodule(config.data, tokenizer)
    model = build_model(config.model, tokenizer)
    module = build_module(config, model, tokenizer)
    io = FolderCheckpointIO(model.config, tokenizer, config.model.adapter)
    trainer = build_trainer(config, run_dir, io, ckpt, training=training)
    return trainer, module, datamodule, ckpt


def write_config(config: RunConfig, run_dir: Path) -> None:
    """The run's whole configuration as `config.yaml`, written under a temporary name."""
    with replacing(RunFolder(run_dir).config) as partial:
        partial.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def adapt_to_gpu(config: RunConfig) -> RunConfig:
    """The configuration that this machine can run; a line on rank 0 says what is different.

    Raises:
        ValueError: Triton asked for without a GPU.
    """
    model, trainer = config.model, config.trainer
    resolved = _resolve(
        Backends(model.attention, model.norm, model.rope, trainer.precision), trainer.accelerator
    )
    model = replace(model, attention=resolved.attention, norm=resolved.norm, rope=resolved.rope)
    return replace(config, model=model, trainer=replace(trainer, precision=resolved.precision))
