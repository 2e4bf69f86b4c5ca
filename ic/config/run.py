"""The checked configuration of a run, filled from `conf/` by Hydra.

Options stand beside the code that they configure. The classes of this folder add `build`, which
makes the part; nothing that they import at the top needs PyTorch.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ic.config.callbacks import CallbacksConfig
from ic.config.data import DataConfig
from ic.config.logger import LoggerConfig
from ic.config.model import BaseModelConfig, ModelConfig
from ic.config.objective import DistillationConfig, ObjectiveConfig, PreferenceConfig
from ic.config.strategy import StrategyConfig
from ic.config.trainer import TrainerConfig
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.evaluation.registry import check_chosen
from ic.files.run_folder import RunFolder
from ic.files.saved_config import MAY_CHANGE
from ic.training.options import DISTILLATION_METRICS, INDEXER_METRICS, OptimizerOptions


@dataclass
class RunConfig:
    """Everything that `fit`, `validate`, `test` and `predict` take.

    Attributes:
        name: the experiment's name; with run_id it fixes the run directory. `run=FOLDER` stands for
            a run that is there, with its configuration; `from=FOLDER` (fit) begins a new one with
            the configuration of that.
        run_id: `runs/<name>/<run_id>` is stable, so that a requeued job finds its own checkpoint.
        output_dir: folder of all runs.
        seed: of the initial weights and of dropout; the data has its own.
        tokenizer: `bytes`, or a folder that holds a Hugging Face tokenizer; of a run's folder, that
            of its last checkpoint. model=pretrained takes the model's own.
        chat_template: of conversations: `ic`, `chatml`, or a file with a Jinja template; null is
            the tokenizer's own. Checkpoints keep it.
        ckpt_path: checkpoint folder to resume (fit) or to use, or `last` or `best` of this run;
            `auto` (fit) is `last` if there is one, and the beginning otherwise.
        overwrite: begin anew in a run directory that already holds checkpoints.
        allow_config_change: continue a run although its configuration has changed since.
        report: write `report.html` and `curves.png` into the run's folder as `fit` ends.
        suite: suites by name, each with its options, that `callbacks.suites` evaluates; choose with
            suite=NAME or suite=[NAME,...]. Passkeys have the group `evaluation`.
        preference: the objective of data=preference; null with any other data.
        distillation: learn from the distributions of a frozen teacher (distillation=kl); null
            learns from the text alone.
    """

    model: BaseModelConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    preference: PreferenceConfig | None = None
    distillation: DistillationConfig | None = None
    strategy: StrategyConfig = field(default_factory=StrategyConfig, metadata=MAY_CHANGE)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig, metadata=MAY_CHANGE)
    evaluation: PasskeyGridConfig = field(default_factory=PasskeyGridConfig)
    suite: dict[str, Any] = field(default_factory=dict, metadata=MAY_CHANGE)
    name: str = field(default="run", metadata=MAY_CHANGE)
    run_id: str = field(default="default", metadata=MAY_CHANGE)
    output_dir: str = field(default="runs", metadata=MAY_CHANGE)
    seed: int = 0
    tokenizer: str = "bytes"
    chat_template: str | None = None
    ckpt_path: str | None = field(default=None, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)
    allow_config_change: bool = field(default=False, metadata=MAY_CHANGE)
    report: bool = field(default=True, metadata=MAY_CHANGE)

    @property
    def folder(self) -> RunFolder:
        """`<output_dir>/<name>/<run_id>`, absolute."""
        return RunFolder((Path(self.output_dir) / self.name / self.run_id).absolute())

    @property
    def stage(self) -> str:
        """What the run does, in a word."""
        if self.distillation is not None:
            return "distill"
        if self.preference is not None:
            return "preference"
        return {"sft": "sft", "text": "pretrain"}.get(self.data.name, self.data.name)

    def __post_init__(self) -> None:
        for key in ("name", "run_id"):
            value = getattr(self, key)
            # Unless it fits into a folder's name, and is none of the folders `.` and `..`.
            if not re.fullmatch(r"(?!\.{1,2}$)[\w.,=+@-]{1,200}", value):
                raise ValueError(
                    f"{key}={value!r}: a folder name of letters, digits and any of . , = + @ _ -, "
                    "not . or .. and at most 200 characters"
                )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if not isinstance(self.model, BaseModelConfig):  # made without Hydra, and without a model
            self.model = ModelConfig()
        positions = self.model.positions
        if not isinstance(self.data, DataConfig):
            raise ValueError("data: choose one, for example data=passkey")
        if (self.preference is not None) != self.data.HAS_PAIRS:
            raise ValueError(
                f"data={self.data.name} {'without' if self.preference is None else 'with'} an "
                "objective under preference: data=preference and preference=dpo go together"
            )
        self._check_context_lengths()
        if self.distillation is not None:
            self._check_distillation(self.distillation)
        if self.strategy.name == "fsdp" and (self.preference or self.model.adapter):
            what = "LoRA (model/adapter)" if self.model.adapter else "preference training"
            raise ValueError(
                f"strategy=fsdp does not run {what}; choose strategy=fsdp2, which shards too, "
                "strategy=ddp, or one device"
            )
        if self.model.fp8 is not None and self.preference is not None:
            raise ValueError(
                f"model.fp8={self.model.fp8} does not go with preference training: the policy's "
                "products would be rounded and the reference's not, and rewards would show the "
                "difference; set model.fp8=null"
            )
        self._check_indexer()
        if self.model.compile and self.data.mixes_lengths:
            raise ValueError(
                "model.compile=true compiles anew for each length, and the rows of "
                f"data={self.data.name} all have their own; set model.compile=false"
                + ("" if self.preference else ", or data.packing=true")
            )
        key, needed = self.data.positions
        if needed > positions:
            raise ValueError(
                f"data.{key}={needed}: the model has {positions} positions; lower it or raise "
                "model.max_position_embeddings"
            )
        if self.callbacks.passkey is not None:
            _check_lengths(self.evaluation, positions)
        check_chosen(self.suite)
        if "passkey" in self.suite:
            raise ValueError(
                "suite=passkey: a run asks passkeys with callbacks.passkey, by the options of "
                "evaluation; leave it out"
            )
        if self.suite and self.callbacks.suites is None:
            raise ValueError(
                f"suite={list(self.suite)}: callbacks.suites=null evaluates none; leave one of the "
                "two out"
            )
        checkpoint, known = self.callbacks.checkpoint, self.validation_metrics
        monitor = None if checkpoint is None else checkpoint.monitor
        if monitor is not None and monitor not in known:
            near = difflib.get_close_matches(monitor, known, n=1)
            raise ValueError(
                f"callbacks.checkpoint.monitor={monitor!r}: "
                + (f"did you mean {near[0]}? " if near else "")
                + f"the validation logs {', '.join(known[:9])}; null keeps no best"
            )

    def _check_context_lengths(self) -> None:
        lengths, longest = self.callbacks.context_length, self.data.context_length
        if lengths is None:
            return
        if any(length > longest for _, length in lengths.stages):
            raise ValueError(
                f"callbacks.context_length.stages={lengths.stages}: none may be longer than "
                f"data.context_length={longest}"
            )
        if not lengths.stages and not self.data.MARKS_ANSWERS:
            raise ValueError(
                "callbacks.context_length grows with train/answer_accuracy, which "
                f"data={self.data.name} does not have: it would stay at start_length="
                f"{lengths.start_length} for ever; set callbacks.context_length=null to train at "
                f"data.context_length={longest}"
            )

    def _check_indexer(self) -> None:
        mode, trained = self.model.index_mode, self.objective.indexer
        if trained != "none":
            if mode == "off":
                raise ValueError(
                    f"objective.indexer={trained}: the model has no indexer; set "
                    "model.indexer.mode=dense or sparse, or leave it out"
                )
            if self.preference is not None or self.distillation is not None or self.model.adapter:
                raise ValueError(
                    f"objective.indexer={trained} goes without preference training, distillation "
                    "and LoRA (model/adapter): train the indexer in a run of its own"
                )
            if self.strategy.name in ("fsdp", "fsdp2"):
                raise ValueError(
                    f"objective.indexer={trained} does not run with strategy={self.strategy.name}, "
                    "which gathers a layer's weights for the gradient of its output alone; choose "
                    "strategy=ddp or one device"
                )
        if self.preference is not None and mode == "sparse":
            raise ValueError(
                "model.indexer.mode=sparse goes without preference training, whose rows are two "
                "texts of one beginning; set model.indexer.mode=dense"
            )
        if self.strategy.context_parallel_size > 1 and (mode == "sparse" or trained != "none"):
            raise ValueError(
                f"model.indexer.mode={mode} and objective.indexer={trained} do not go with "
                "strategy.context_parallel_size above 1: each rank holds a part of the keys; set "
                "it to 1"
            )

    def _check_distillation(self, distillation: DistillationConfig) -> None:
        if self.data.HAS_PAIRS or self.data.MARKS_ANSWERS:
            raise ValueError(
                f"data={self.data.name} goes without distillation, which learns every target of "
                "text or of conversations: choose data=text or data=sft, or distillation=null"
            )
        if self.strategy.context_parallel_size > 1 or self.strategy.name == "fsdp":
            raise ValueError(
                "distillation runs on one device or with strategy=ddp or strategy=fsdp2, each rank "
                "with the whole teacher and whole sequences; set strategy.context_parallel_size=1 "
                "and another strategy than fsdp"
            )
        distillation.check(self.data.context_length, self.model.sizes.get("vocab_size"))

    @property
    def validation_metrics(self) -> list[str]:
        """Names of what the validation logs."""
        pairs = self.preference
        names = [*self.data.VALIDATION_METRICS] if pairs is None else pairs.metric_names
        if self.distillation is not None:
            names += DISTILLATION_METRICS
        if self.objective.indexer != "none":
            names += INDEXER_METRICS
        return [f"val/{name}" for name in names]


def _check_lengths(grid: PasskeyGridConfig, positions: int) -> None:
    longest = max(grid.lengths)
    if longest >= positions:
        raise ValueError(
            f"evaluation.lengths: {longest} tokens and an answer, but the model has {positions} "
            "positions; shorten the list or raise model.max_position_embeddings"
        )
