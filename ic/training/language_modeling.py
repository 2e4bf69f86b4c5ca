"""LightningModule for pre-training and supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy
from transformers import PreTrainedTokenizerBase

from ic.model import MLAForCausalLM
from ic.model.loss import linear_cross_entropy, shift_labels
from ic.training.optimizers import OptimizerConfig, build_optimizer, lr_factor


@dataclass
class ObjectiveConfig:
    """Loss of a batch that marks answers: mean over answer tokens + all_tokens_weight x mean over
    all.

    Without answer marks the loss is the mean over all targets.
    """

    all_tokens_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.all_tokens_weight < 0:
            raise ValueError(
                f"objective.all_tokens_weight={self.all_tokens_weight}: must be at least 0"
            )


class LanguageModelingModule(LightningModule):
    """Trains `MLAForCausalLM` on batches of the contract in `ic.datamodules.passkey`.

    Logs `train/loss`, `train/answer_accuracy` (share of answer tokens whose arg max is right),
    `train/context_length`, `lr`; `val/...` and `test/...` likewise over their whole sets.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerConfig,
        objective: ObjectiveConfig,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer_config = optimizer
        self.objective = objective
        self.eval_metrics = torch.nn.ModuleDict(
            {
                stage: MetricCollection(
                    {"loss": MeanMetric(), "answer_accuracy": BinaryAccuracy()},
                    prefix=f"{stage}/",
                    compute_groups=False,
                )
                for stage in ("val", "test")
            }
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, correct, _ = self._loss(batch)
        log: dict[str, Any] = {"train/loss": loss.detach()}
        if correct is not None:
            log["train/answer_accuracy"] = correct.float().mean()
        log["train/context_length"] = float(batch["input_ids"].shape[1])
        self.log_dict(log, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One row a question: the answer expected, and the arg max of each of its tokens."""
        if "answer_mask" not in batch:
            raise ValueError("predict needs data that marks answers, such as data=passkey")
        _, _, predicted = self._loss(batch)
        assert predicted is not None
        rows, at = [], 0
        for row, marks in enumerate(batch["answer_mask"].cpu()):
            for start, end in _runs(marks):
                expected = batch["labels"][row, start:end]
                given = predicted[at : at + len(expected)]
                at += len(expected)
                rows.append(
                    {
                        "step": batch["step"], "row": row, "position": start,
                        "expected": self.tokenizer.decode(expected),
                        "predicted": self.tokenizer.decode(given),
                        "correct": bool((given == expected).all()),
                    }
                )  # fmt: skip
        return rows

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.optimizer_config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.optimizer_config, step, self.progress(step))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def progress(self, step: int) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        trainer = self._trainer
        if trainer is None:
            return 0.0
        by_step = step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        return max(by_step, elapsed_share(trainer))

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)  # type: ignore[union-attr]

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and of each answer token whether it is right and the arg max (None if unmarked)."""
        outputs = self.model.model(
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
            use_cache=False,
        )
        hidden_MD = outputs.last_hidden_state.flatten(0, 1)
        labels_M = shift_labels(batch["labels"]).flatten()
        weight = self.model.lm_head.weight
        if "answer_mask" not in batch:
            return linear_cross_entropy(hidden_MD, weight, labels_M), None, None
        answers = torch.nn.functional.pad(batch["answer_mask"][:, 1:], (0, 1)).flatten()
        at = answers.nonzero().flatten()
        loss = linear_cross_entropy(hidden_MD[at], weight, labels_M[at])
        with torch.no_grad():
            predicted = self.model.lm_head(hidden_MD[at]).argmax(-1)
        if self.objective.all_tokens_weight:
            loss = loss + self.objective.all_tokens_weight * linear_cross_entropy(
                hidden_MD, weight, labels_M
            )
        return loss, predicted == labels_M[at], predicted

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        loss, correct, _ = self._loss(batch)
        metrics: MetricCollection = self.eval_metrics[stage]  # type: ignore[assignment]
        metrics["loss"].update(loss, weight=len(batch["input_ids"]))
        self.log(f"{stage}/loss", metrics["loss"], prog_bar=True, batch_size=1)
        if correct is not None:
            metrics["answer_accuracy"].update(correct.int(), torch.ones_like(correct.int()))
            self.log(f"{stage}/answer_accuracy", metrics["answer_accuracy"], prog_bar=True)


def _runs(marks: Tensor) -> list[tuple[int, int]]:
    """Contiguous True runs of a mask (T,) as (start, end)."""
    edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def elapsed_share(trainer: Trainer) -> float:
    """Elapsed share of `trainer.max_time`, 0 without a limit."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer):
            elapsed = callback.time_elapsed(RunningStage.TRAINING)
            remaining = callback.time_remaining(RunningStage.TRAINING)
            return elapsed / (elapsed + remaining) if remaining is not None else 0.0
    return 0.0
