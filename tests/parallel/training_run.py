"""A short training run of a tiny model on fixed data, on any number of processes.

The rows of a step are the same however they are dealt out to data ranks and micro-batches, so every
way to run must give the same losses, gradients and weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ic.checkpoint.folder import FolderCheckpointIO
from ic.config.callbacks import CallbacksConfig, PasskeyEvaluationConfig
from ic.config.data import PasskeyDataConfig
from ic.config.logger import LoggerConfig
from ic.config.run import RunConfig
from ic.config.strategy import StrategyConfig
from ic.config.trainer import TrainerConfig
from ic.datamodules.accumulation import take_lookahead, with_lookahead
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from ic.parallel.replica import data_replica
from ic.run.build import build_module, build_trainer
from ic.run.resume import Start
from ic.training.muon import BatchedMuon
from ic.training.options import OptimizerOptions
from tests.conftest import SMALL, randomize

ROWS, TOKENS, STEPS = 4, 64, 4
VOCAB = 320
GRID = PasskeyGridConfig(
    lengths=[160],
    depths=[0.5],
    samples=3,
    tokens_per_batch=320,
    control_samples=0,
    prefill_chunk_tokens=64,
)


@dataclass(frozen=True)
class Case:
    """One way to run.

    Muon orthogonalises in bfloat16 here, on every CPU. There the last bit of a float32 gradient can
    turn a rounding and move an update by 1 %. With Muon the weights are therefore float64, and the
    temperature is one without weights (`ssmax` computes in float32): sums in another order then
    differ too little to be seen.

    Attributes:
        documents: pack documents into the rows.
        passkey: evaluate a small grid at the end.
        validate: validate once more after training, as the verb `validate` does.
        accelerator: as the trainer's.
    """

    strategy: str = "auto"
    context: int = 1
    accumulate: int = 1
    optimizer: str = "muon"
    documents: bool = False
    checkpointing: bool = False
    passkey: bool = False
    validate: bool = False
    accelerator: str = "cpu"


class FixedRows(LightningDataModule):
    """Random rows with very different numbers of targets; a rank and micro-batch takes its share."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def rows(self, step: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(step)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=rng)

        ids = draw(VOCAB, ROWS, TOKENS)
        index = torch.arange(TOKENS)
        share = torch.tensor([0.05, 0.5, 0.9, 1.0])[:, None]
        labels = ids.where(torch.rand(ROWS, TOKENS, generator=rng) < share, -100)
        marks = torch.rand(ROWS, TOKENS, generator=rng) < share.flip(0) / 4
        batch = {
            "input_ids": ids,
            "labels": labels,
            "answer_mask": marks,
            "position_ids": index + 100 * draw(9, ROWS, 1),
        }
        if self.case.documents:
            edges = draw(TOKENS, ROWS, 3)
            batch["document_ids"] = (index >= edges[..., None]).sum(1).int()
            batch["position_ids"] = index.expand(ROWS, -1).contiguous()
        return batch

    def share(self, step: int, rank: int, num_shares: int) -> dict[str, Tensor]:
        return {key: rows[rank::num_shares] for key, rows in self.rows(step).items()}

    def train_dataloader(self) -> Any:
        rank, num_ranks = data_replica(self.trainer)
        every = self.case.accumulate
        batches = [
            self.share(step, rank * every + micro, num_ranks * every)
            for step in range(STEPS + 1)
            for micro in range(every)
        ]
        return with_lookahead(DataLoader(batches, batch_size=None), self.trainer)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        rank, num_ranks = data_replica(self.trainer)
        batches = [self.share(100 + step, rank, num_ranks) for step in range(2)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return take_lookahead(batch, self.trainer, lambda b: b) if self.trainer.training else batch


class Recorder(Callback):
    """Losses, gradients before clipping, validation metrics.

    No gradients under `fsdp`, which flattens and cuts them.
    """

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.validation: list[tuple[float, float]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if self.strategy == "fsdp":
            return
        self.gradients.append(
            {name: whole(p.grad).cpu() for name, p in pl_module.model.named_parameters()}  # type: ignore[arg-type]
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.validation.append((float(metrics["val/loss"]), float(metrics["val/answer_accuracy"])))


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def build_case(case: Case, num_processes: int, folder: Path) -> tuple[Trainer, Any]:
    config = RunConfig(
        data=PasskeyDataConfig(context_length=128, tokens_per_batch=128, max_position=4096),
        optimizer=OptimizerOptions(
            name=case.optimizer,
            lr=1e-2 if case.optimizer == "muon" else 1e-3,
            warmup_steps=0,
            decay_fraction=0,
        ),
        strategy=StrategyConfig(name=case.strategy, context_parallel_size=case.context),
        trainer=TrainerConfig(
            max_steps=STEPS,
            accelerator=case.accelerator,
            devices=num_processes,
            gradient_clip_val=0.1,
            accumulate_grad_batches=case.accumulate,
            log_every_n_steps=1,
            val_check_interval=2,
        ),
        callbacks=CallbacksConfig(
            progress=False, passkey=PasskeyEvaluationConfig() if case.passkey else None
        ),
        logger=LoggerConfig(csv=False, tensorboard=False),
        evaluation=GRID,
        output_dir=str(folder),
    )
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    muon = case.optimizer == "muon"
    changes = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "length_temperature": "llama4" if muon else "ssmax",
        "length_temperature_original": 16,
    }
    model = MLAForCausalLM(MLAConfig(**{**SMALL, **changes}))
    randomize(model)
    if muon:
        model = model.double()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = build_module(config, model.train(), tokenizer)
    io = FolderCheckpointIO(model.config, tokenizer)
    return build_trainer(config, io, Start()), module


def run_case(case: Case, num_processes: int, folder: Path) -> dict[str, Any]:
    """Train; the same on every rank."""
    trainer, module = build_case(case, num_processes, folder)
    recorder = Recorder(case.strategy)
    trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    # In float32 the last bits of a product may depend on how many matrices a rank works on.
    with patch.object(BatchedMuon, "dtype", torch.bfloat16):
        trainer.fit(module, datamodule=FixedRows(case))
    weights = {}
    if case.strategy != "fsdp":
        weights = {name: whole(p).cpu() for name, p in module.model.named_parameters()}
    if case.validate:
        trainer.validate(module, datamodule=FixedRows(case), verbose=False)
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "validation": recorder.validation,
        "weights": weights,
    }


def join(rank: int, num_processes: int, port: int) -> None:
    """Make this process one of a launched group, as torchrun does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)


def run_rank(rank: int, num_processes: int, port: int, case: Case, folder: Path) -> None:
    join(rank, num_processes, port)
    result = run_case(case, num_processes, folder)
    torch.save(result, folder / f"rank{rank}.pt")
