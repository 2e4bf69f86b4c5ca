"""The checked configuration: one dataclass a group, filled from `conf/` by Hydra.

Each part's dataclass stands beside the code that it configures; this module adds those without a
file of their own, joins them and registers them as Hydra schemas, so that a wrong type or an
unknown key fails while composing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic.callbacks.options import (
    AdaptiveContextLengthOptions,
    CheckpointOptions,
    GpuUtilisationOptions,
    GuardrailsOptions,
    MemoryProfilerOptions,
    PasskeyEvaluationOptions,
    ProfilerOptions,
    SlurmRequeueOptions,
    ThroughputOptions,
)
from ic.datamodules.options import PreferenceDataOptions
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.files.saved_config import MAY_CHANGE
from ic.model.backends import Backends
from ic.model.dimensions import check_dimensions
from ic.model.options import AdapterOptions
from ic.parallel.options import StrategyOptions, WatchdogOptions
from ic.training.options import ObjectiveOptions, OptimizerOptions, PreferenceOptions

if TYPE_CHECKING:
    from ic.model.config import MLAConfig


@dataclass
class ModelConfig:
    """The model: `MLAConfig`'s names, and how to begin.

    Attributes:
        attention, norm, rope: `torch` or `triton`, each on its own.
        init_from: checkpoint folder whose weights to start from, instead of random ones.
        gradient_checkpointing: recompute each layer in the backward pass.
        adapter: train LoRA layers alone (`model/adapter=lora`); null trains every weight.
        compile: each layer by torch.compile, where it runs without a cache (training, validation).
    """

    hidden_size: int = 2048
    intermediate_size: int = 5440
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    q_lora_rank: int | None = None
    kv_lora_rank: int = 192
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 2**21
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6}
    )
    rope_interleave: bool = True
    length_temperature: str = "ssmax"
    length_temperature_beta: float = 0.1
    length_temperature_original: int = 8192
    nope_layers: list[int] = field(default_factory=list)
    absorbed_max_queries: int = 16
    attention: str = field(default="torch", metadata=MAY_CHANGE)
    norm: str = field(default="torch", metadata=MAY_CHANGE)
    rope: str = field(default="torch", metadata=MAY_CHANGE)
    gradient_checkpointing: bool = False
    compile: bool = field(default=False, metadata=MAY_CHANGE)
    init_from: str | None = None
    adapter: AdapterOptions | None = None

    def __post_init__(self) -> None:
        Backends(self.attention, self.norm, self.rope)
        check_dimensions(self)

    def mla_config(self, vocab_size: int, **token_ids: Any) -> MLAConfig:
        """The Hugging Face configuration of this model."""
        from ic.model.config import MLAConfig

        names = set(self.__dataclass_fields__) - {
            "attention",
            "norm",
            "rope",
            "gradient_checkpointing",
            "compile",
            "init_from",
            "adapter",
        }
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        return MLAConfig(
            vocab_size=vocab_size,
            attention_backend=self.attention,
            norm_backend=self.norm,
            rope_backend=self.rope,
            **values,
            **token_ids,
        )


@dataclass
class TrainerConfig:
    """Arguments of `lightning.Trainer` under their own names.

    Attributes:
        max_time: `DD:HH:MM:SS`; the schedule follows whichever of steps and time is further.
        val_check_interval: optimizer steps between validations.
    """

    max_steps: int = 1000
    max_time: str | None = field(default=None, metadata=MAY_CHANGE)
    accelerator: str = "auto"
    devices: Any = field(default="auto", metadata=MAY_CHANGE)
    num_nodes: int = field(default=1, metadata=MAY_CHANGE)
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    val_check_interval: int = 250
    limit_val_batches: int | None = None
    num_sanity_val_steps: int = 0
    log_every_n_steps: int = field(default=10, metadata=MAY_CHANGE)
    deterministic: bool = False
    detect_anomaly: bool = False

    def __post_init__(self) -> None:
        if self.max_steps < 1 and not (self.max_steps == -1 and self.max_time):
            raise ValueError(
                f"trainer.max_steps={self.max_steps}: at least 1, or -1 with trainer.max_time"
            )
        if self.max_time is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", self.max_time):
            raise ValueError(
                f"trainer.max_time={self.max_time!r}: write days:hours:minutes:seconds, "
                "for example 00:00:07:00"
            )
        for name in (
            "num_nodes",
            "accumulate_grad_batches",
            "val_check_interval",
            "log_every_n_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: must be at least 1")
        for name in ("gradient_clip_val", "limit_val_batches"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: must be at least 0")


@dataclass
class CallbacksConfig:
    """Callbacks; `null` turns one off."""

    checkpoint: CheckpointOptions | None = field(default=None, metadata=MAY_CHANGE)
    context_length: AdaptiveContextLengthOptions | None = None
    guardrails: GuardrailsOptions | None = None
    passkey: PasskeyEvaluationOptions | None = None
    memory: MemoryProfilerOptions | None = field(default=None, metadata=MAY_CHANGE)
    throughput: ThroughputOptions | None = field(default=None, metadata=MAY_CHANGE)
    gpu_utilisation: GpuUtilisationOptions | None = field(default=None, metadata=MAY_CHANGE)
    profiler: ProfilerOptions | None = field(default=None, metadata=MAY_CHANGE)
    watchdog: WatchdogOptions | None = field(default=None, metadata=MAY_CHANGE)
    requeue: SlurmRequeueOptions | None = field(default=None, metadata=MAY_CHANGE)
    progress: bool = field(default=True, metadata=MAY_CHANGE)


@dataclass
class WandbConfig:
    """Weights & Biases; `offline` writes to disk only. Credentials come from the environment."""

    project: str = "infinite-context"
    mode: str = "offline"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline"):
            raise ValueError(f"logger.wandb.mode={self.mode!r}: choose online or offline")


@dataclass
class LoggerConfig:
    """Where metrics go."""

    csv: bool = True
    tensorboard: bool = True
    wandb: WandbConfig | None = None


@dataclass
class RunConfig:
    """Everything that `fit`, `validate`, `test` and `predict` take.

    Attributes:
        name: the experiment's name; with run_id it fixes the run directory.
        run_id: `runs/<name>/<run_id>` is stable, so that a requeued job finds its own checkpoint.
        ckpt_path: checkpoint folder to resume (fit) or to use, or `last` or `best` of this run;
            `auto` (fit) is `last` if there is one, and the beginning otherwise.
        overwrite: begin anew in a run directory that already holds checkpoints.
        allow_config_change: continue a run although its configuration has changed since.
        preference: the objective of data=preference; null with any other data.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = None
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    preference: PreferenceOptions | None = None
    strategy: StrategyOptions = field(default_factory=StrategyOptions, metadata=MAY_CHANGE)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig, metadata=MAY_CHANGE)
    evaluation: PasskeyGridConfig = field(default_factory=PasskeyGridConfig)
    name: str = "run"
    run_id: str = "default"
    output_dir: str = field(default="runs", metadata=MAY_CHANGE)
    seed: int = 0
    tokenizer: str = "bytes"
    ckpt_path: str | None = field(default=None, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)
    allow_config_change: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        for key in ("name", "run_id"):
            value = getattr(self, key)
            if not re.fullmatch(r"[\w.,=+@-]+", value):
                raise ValueError(
                    f"{key}={value!r}: a folder name of letters, digits and any of . , = + @ _ -"
                )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        positions = self.model.max_position_embeddings
        if self.data is None:
            raise ValueError("data: choose one, for example data=passkey")
        if (self.preference is not None) != isinstance(self.data, PreferenceDataOptions):
            raise ValueError(
                f"data={self.data.name} {'without' if self.preference is None else 'with'} an "
                "objective under preference: data=preference and preference=dpo go together"
            )
        if self.strategy.name == "fsdp" and (self.preference or self.model.adapter):
            what = "LoRA (model/adapter)" if self.model.adapter else "preference training"
            raise ValueError(
                f"strategy=fsdp does not run {what}; choose strategy=fsdp2, which shards too, "
                "strategy=ddp, or one device"
            )
        if self.model.compile and getattr(self.data, "mixes_lengths", False):
            raise ValueError(
                "model.compile=true compiles anew for each length, and the rows of "
                f"data={self.data.name} all have their own; set model.compile=false"
                + ("" if self.preference else ", or data.packing=true")
            )
        needed = getattr(self.data, "max_position", self.data.context_length)
        key = "max_position" if hasattr(self.data, "max_position") else "context_length"
        if needed > positions:
            raise ValueError(
                f"data.{key}={needed}: the model has {positions} positions; lower it or raise "
                "model.max_position_embeddings"
            )
        _check_lengths(self.evaluation, positions)


def _check_lengths(grid: PasskeyGridConfig, positions: int) -> None:
    longest = max(grid.lengths)
    if longest >= positions:
        raise ValueError(
            f"evaluation.lengths: {longest} tokens and an answer, but the model has {positions} "
            "positions; shorten the list or raise model.max_position_embeddings"
        )


def run_directory(config: RunConfig) -> Path:
    """`<output_dir>/<name>/<run_id>`, absolute."""
    return (Path(config.output_dir) / config.name / config.run_id).absolute()
