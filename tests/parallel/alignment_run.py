"""A short preference or SFT run of a tiny model, on any number of processes.

The rows of a step are the same however they are dealt out, so every way to run must give the same
metrics, gradients and weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from ic.checkpoint.folder import FolderCheckpointIO
from ic.config.callbacks import CallbacksConfig, GuardrailsConfig, PasskeyEvaluationConfig
from ic.config.data import PreferenceDataConfig, SFTDataConfig
from ic.config.logger import LoggerConfig
from ic.config.model import ModelConfig
from ic.config.objective import DistillationConfig, PreferenceConfig
from ic.config.run import RunConfig
from ic.config.strategy import StrategyConfig
from ic.config.trainer import TrainerConfig
from ic.datamodules.tokenizers import build_tokenizer
from ic.model.options import AdapterOptions
from ic.run.build import build_module, build_trainer
from ic.run.resume import Start
from ic.training.options import OptimizerOptions
from tests.conftest import SMALL, randomize
from tests.parallel.training_run import GRID, join, whole

STEPS, ROWS = 3, 4
CONTEXT_TOKENS = 128


@dataclass(frozen=True)
class Case:
    """One way to run.

    Attributes:
        data: `preference` or `sft` (rows padded to the longest, which has any length).
        distil: learn the distributions of a small Llama.
        on_disk: precompute the reference's log-probabilities; otherwise it stays in memory.
    """

    data: str = "preference"
    lora: bool = False
    distil: bool = False
    on_disk: bool = True
    strategy: str = "auto"
    context: int = 1
    accumulate: int = 1
    checkpointing: bool = False


def write_data(folder: Path) -> None:
    """Pairs and conversations of odd lengths, `{preference,sft}-{train,val}.jsonl`; an odd number for
    validation, which two ranks cannot share evenly.
    """
    text = "a latent keeps what every key and value of the past would have held in the cache"
    words = text.split() * 2
    for split, count, shift in (("train", 8, 0), ("val", 5, 5)):
        pairs = []
        for start in range(shift, shift + count):
            parts = [words[start + k :][: 2 + (5 * start + k) % 7] for k in range(3)]
            names = ("prompt", "chosen", "rejected")
            pairs.append({name: " ".join(part) for name, part in zip(names, parts, strict=True)})
        chats = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
        for name, rows in (("preference", pairs), ("sft", chats)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}-{split}.jsonl").write_text(lines)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=320)).save_pretrained(
        folder / "teacher"
    )
    build_tokenizer("bytes").save_pretrained(folder / "teacher")


class Recorder(Callback):
    """Metrics of each step, gradients, metrics of each validation."""

    def __init__(self) -> None:
        self.train: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.gradients.append(
            {n: whole(p.grad) for n, p in trainable(pl_module).items() if p.grad is not None}
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > len(self.train):
            self.train.append(metrics(trainer, "train/"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.append(metrics(trainer, "val/"))


def metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    # Padded batches of another length are not another result.
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix) and "context_length" not in name
    }


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def run_case(case: Case, num_processes: int, data: Path, folder: Path) -> dict[str, Any]:
    """Train and validate; the same on every rank."""
    num_shares = num_processes // case.context * case.accumulate
    files: dict[str, Any] = {
        f"{split}_files": [str(data / f"{case.data}-{split}.jsonl")] for split in ("train", "val")
    }
    config = RunConfig(
        model=ModelConfig(
            **{k: v for k, v in SMALL.items() if not k.endswith("token_id") and k != "vocab_size"},
            gradient_checkpointing=case.checkpointing,
            # Three rows do not divide among the ranks.
            adapter=AdapterOptions(
                r=3, target_modules=["q_b_proj", "kv_b_proj", "down_proj"], lora_alpha=1
            )
            if case.lora
            else None,
        ),
        data=PreferenceDataConfig(
            context_length=CONTEXT_TOKENS,
            tokens_per_batch=2 * CONTEXT_TOKENS * ROWS // num_shares,
            **files,
        )
        if case.data == "preference"
        else SFTDataConfig(
            context_length=CONTEXT_TOKENS,
            tokens_per_batch=CONTEXT_TOKENS * ROWS // num_shares,
            packing=False,
            **files,
        ),
        preference=PreferenceConfig(
            beta=0.5, ld_alpha=0.5, precompute_ref_log_probs=case.on_disk, length_buckets=[64]
        )
        if case.data == "preference"
        else None,
        distillation=DistillationConfig(
            str(data / "teacher"), cross_entropy_weight=0.3, chunk_tokens=50
        )
        if case.distil
        else None,
        optimizer=OptimizerOptions(name="adamw", lr=1e-3, warmup_steps=0, decay_fraction=0),
        strategy=StrategyConfig(name=case.strategy, context_parallel_size=case.context),
        trainer=TrainerConfig(
            max_steps=STEPS,
            accelerator="cpu",
            devices=num_processes,
            log_every_n_steps=1,
            accumulate_grad_batches=case.accumulate,
            val_check_interval=STEPS,
        ),
        callbacks=CallbacksConfig(
            progress=False,
            guardrails=GuardrailsConfig(),
            passkey=PasskeyEvaluationConfig() if case.data == "sft" else None,
        ),
        logger=LoggerConfig(csv=False, tensorboard=False),
        evaluation=GRID,
        output_dir=str(folder),
    )
    torch.manual_seed(0)
    tokenizer = build_tokenizer("bytes")
    model = config.model.build(tokenizer)
    randomize(model)
    teacher = None
    if config.distillation is not None:
        teacher = config.distillation.open_teacher(
            tokenizer, CONTEXT_TOKENS, model.config.vocab_size, on_gpu=False
        )
    module = build_module(config, model, tokenizer, teacher)
    io = FolderCheckpointIO(model.config, tokenizer)
    trainer = build_trainer(config, io, Start())
    recorder = Recorder()
    trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined]
    data_module = config.data.build(tokenizer)
    trainer.fit(module, datamodule=data_module)
    if case.on_disk:  # other runs have no reference left to compare with
        trainer.validate(module, datamodule=data_module, verbose=False)
    reference = getattr(module, "reference", None)
    held = [] if reference is None else list(reference.parameters())
    return {
        "train": recorder.train,
        "validation": recorder.validation,
        "gradients": recorder.gradients,
        "weights": {name: whole(p) for name, p in trainable(module).items()},
        "frozen": {n: whole(p) for n, p in module.model.named_parameters() if not p.requires_grad},
        "reference_is_split": reference is not None
        and reference.model.context_parallel is not None,
        "reference_shares": [
            (p.to_local() if isinstance(p, DTensor) else p).numel() / p.numel() for p in held
        ],
    }


def run_rank(
    rank: int, num_processes: int, port: int, case: Case, data: Path, folder: Path
) -> None:
    join(rank, num_processes, port)
    torch.save(run_case(case, num_processes, data, folder), folder / f"rank{rank}.pt")
