"""LightningModule for pre-training and supervised fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from ic.datamodules.accumulation import count_targets
from ic.datamodules.batch import Batch
from ic.model import MLAForCausalLM
from ic.model.labels import IGNORE_INDEX
from ic.model.targets import TargetSums
from ic.parallel.replica import data_replica
from ic.training.find_callback import find_callback
from ic.training.indexer import set_trained
from ic.training.metrics import (
    Accuracy,
    BitsPerByte,
    ObjectiveMean,
    Perplexity,
    bits_per_byte,
    perplexity,
)
from ic.training.objective import objective
from ic.training.optimizers import build_optimizer, lr_factor
from ic.training.options import ObjectiveOptions, OptimizerOptions


class LanguageModelingModule(LightningModule):
    """Trains `MLAForCausalLM` on batches of `ic.datamodules.batch`.

    With `objective.indexer` it trains the model's indexer alone or too, and logs `index_loss`.
    Logs `train/loss`, `train/answer_accuracy` (share of answer tokens whose arg max is right),
    `train/context_length`, `lr`; `val/...` and `test/...` likewise over their whole sets. Where no
    answers are marked, it logs `perplexity`, and of text `bits_per_byte` too.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerOptions,
        objective: ObjectiveOptions,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer_config = optimizer
        self.objective = objective
        set_trained(model, objective.indexer)
        self.eval_metrics = torch.nn.ModuleDict(
            {
                stage: torch.nn.ModuleDict(
                    {
                        "loss": ObjectiveMean(objective.all_tokens_weight),
                        "answer_accuracy": Accuracy(),
                        "perplexity": Perplexity(),
                        "bits_per_byte": BitsPerByte(),
                        "index_loss": MeanMetric(),
                    }
                )
                for stage in ("val", "test")
            }
        )
        # Of the current optimizer step: targets (answers, all) of all ranks, and this rank's share
        # of (loss, right answers, answers, bytes of text).
        self._num_targets: Tensor | None = None
        self._step_sums: Tensor | None = None
        self._index_loss: Tensor | None = None  # likewise, the indexers' own
        self._answer_accuracy: Tensor | None = None  # of the last step that had answers

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if "num_targets" in batch or self.trainer.accumulate_grad_batches == 1:
            self._begin_step(batch)
        if self._num_targets is None or self._step_sums is None:
            raise ValueError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}: the data "
                "gives no num_targets with the first micro-batch of a step, to divide its loss "
                "by; wrap the loader as in ic/datamodules/accumulation.py, or do not accumulate"
            )
        loss, numbers = self._share(batch)
        self._step_sums += torch.stack([number.double() for number in numbers])
        if self.ends_step(batch_idx):
            self._log_step(batch)
        # Lightning divides by the number of micro-batches, and the strategy averages over ranks.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _share(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """This micro-batch's share of the step's loss, and of the four numbers of `_step_sums`."""
        assert self._num_targets is not None
        sums = self._sums(batch)
        loss = objective(
            sums.answers, sums.all_tokens, self._num_targets, self.objective.all_tokens_weight
        )
        correct = loss.new_zeros(())
        if sums.predicted is not None and sums.answer_labels is not None:
            correct = (sums.predicted == sums.answer_labels).sum()
        numbers = [loss.detach(), correct, sums.num_targets[0], self._text_bytes(batch)]
        if sums.index_loss is None:
            return loss, numbers
        # A mean over queries, of which each micro-batch and rank has as many.
        share = sums.index_loss / (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        assert self._index_loss is not None
        self._index_loss += share.detach()
        return (share if self.objective.indexer == "alone" else loss + share), numbers

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One row a question: the answer expected, and the arg max of each of its tokens."""
        if "answer_mask" not in batch:
            raise ValueError("predict needs marked answers: data=passkey or data=retrieval")
        if self.model.model.context_parallel is not None:
            raise ValueError(
                "predict does not run with strategy.context_parallel_size above 1: each rank holds "
                "a part of every answer; choose another strategy"
            )
        predicted = self._sums(batch).predicted
        assert predicted is not None
        rows, at = [], 0
        for row, marks in enumerate(batch["answer_mask"].cpu()):
            for nth, (start, end) in enumerate(_runs(marks)):
                expected = batch["labels"][row, start:end]
                given = predicted[at : at + len(expected)]
                at += len(expected)
                rows.append(
                    {
                        "step": batch["step"],
                        "row": row,
                        "position": start,
                        "expected": self.tokenizer.decode(expected),
                        "predicted": self.tokenizer.decode(given),
                        "correct": bool((given == expected).all()),
                        **({"about": batch["answers"][row][nth]} if "answers" in batch else {}),
                    }
                )
        return rows

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.optimizer_config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.optimizer_config, step, self.progress(step))
        )
        self._optimizer_settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Follow the configuration, whose changes a checkpoint of before them would undo.

        It holds the settings of its own run, and the rate as that run's schedule had it: a finished
        run that is given more steps would take the first of them at its last rate, zero.
        """
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            schedule.base_lrs = [settings["initial_lr"] for settings in self._optimizer_settings]
            for group, settings, factor in zip(
                schedule.optimizer.param_groups,
                self._optimizer_settings,
                schedule.lr_lambdas,
                strict=True,
            ):
                rate = settings["initial_lr"] * factor(schedule.last_epoch)
                group.update({**settings, "lr": rate})

    def progress(self, step: int) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        trainer = self._trainer
        if trainer is None:
            return 0.0
        by_step = step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        return max(by_step, elapsed_share(trainer))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)  # type: ignore[union-attr]

    def ends_step(self, batch_idx: int) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        every = self.trainer.accumulate_grad_batches
        return (batch_idx + 1) % every == 0 or self.trainer.is_last_batch

    def _begin_step(self, batch: Batch) -> None:
        counts = batch["num_targets"] if "num_targets" in batch else count_targets(batch)
        total = self.trainer.strategy.reduce(counts.to(self.device), reduce_op="sum")
        # Ranks that share a sequence each counted all of it.
        self._num_targets = total // (self.trainer.world_size // data_replica(self.trainer)[1])
        self._step_sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._index_loss = torch.zeros((), dtype=torch.float64, device=self.device)

    def _log_step(self, batch: Batch) -> None:
        assert self._step_sums is not None
        loss, correct, answers, text_bytes = self.trainer.strategy.reduce(
            self._step_sums, reduce_op="sum"
        )
        log: dict[str, Any] = {"train/loss": loss.float()}
        if "answer_mask" in batch:
            # A step whose texts all are without questions says what the one before it said; which
            # step that is, only the device knows.
            accuracy = (correct / answers.clamp(min=1)).float()
            before = accuracy if self._answer_accuracy is None else self._answer_accuracy
            self._answer_accuracy = torch.where(answers > 0, accuracy, before)
            log["train/answer_accuracy"] = self._answer_accuracy
        else:
            log["train/perplexity"] = perplexity(loss)
        if "token_bytes" in batch:
            assert self._num_targets is not None
            # As the targets, ranks that share a sequence each counted all of its bytes.
            sharing = self.trainer.world_size // data_replica(self.trainer)[1]
            total = loss * self._num_targets[1]
            log["train/bits_per_byte"] = bits_per_byte(total, text_bytes / sharing)
        if self.objective.indexer != "none":
            log["train/index_loss"] = self.trainer.strategy.reduce(
                self._index_loss, reduce_op="sum"
            ).float()
        log["train/context_length"] = float(batch["input_ids"].shape[1])
        self.log_dict(log, prog_bar=True, batch_size=len(batch["input_ids"]))

    def _sums(self, batch: Batch) -> TargetSums:
        return self.model.target_sums(
            batch["input_ids"],
            batch["labels"],
            answer_mask=batch.get("answer_mask"),
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
            all_tokens="answer_mask" not in batch or self.objective.all_tokens_weight > 0,
            index_loss=self.objective.indexer != "none",
        )

    def _evaluate(self, batch: Batch, stage: str) -> None:
        sums = self._sums(batch)
        metrics: Any = self.eval_metrics[stage]
        terms = [
            torch.zeros((), device=self.device) if term is None else term
            for term in (sums.answers, sums.all_tokens)
        ]
        metrics["loss"].update(torch.stack(terms), sums.num_targets)
        self.log(f"{stage}/loss", metrics["loss"], prog_bar=True, batch_size=1)
        if sums.predicted is not None and sums.answer_labels is not None:
            metrics["answer_accuracy"].update(sums.predicted == sums.answer_labels)
            self.log(f"{stage}/answer_accuracy", metrics["answer_accuracy"], prog_bar=True)
        if sums.index_loss is not None:
            metrics["index_loss"].update(sums.index_loss)
            self.log(f"{stage}/index_loss", metrics["index_loss"], batch_size=1)
        if "answer_mask" not in batch:
            metrics["perplexity"].update(terms[1], sums.num_targets[1])
            self.log(f"{stage}/perplexity", metrics["perplexity"], batch_size=1)
        if "token_bytes" in batch:
            metrics["bits_per_byte"].update(terms[1], self._text_bytes(batch))
            self.log(f"{stage}/bits_per_byte", metrics["bits_per_byte"], batch_size=1)

    @staticmethod
    def _text_bytes(batch: Batch) -> Tensor:
        """Bytes of text that the targets of a batch stand for, int64."""
        if "token_bytes" not in batch:
            return batch["labels"].new_zeros(())
        is_target = batch["labels"][:, 1:] != IGNORE_INDEX
        return (batch["token_bytes"][:, 1:] * is_target).sum()


def _runs(marks: Tensor) -> list[tuple[int, int]]:
    """Contiguous True runs of a mask (T,) as (start, end)."""
    edges = torch.nn.functional.pad(marks.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def elapsed_share(trainer: Trainer) -> float:
    """Elapsed share of `trainer.max_time`, 0 without a limit."""
    timer = find_callback(trainer, Timer)
    remaining = None if timer is None else timer.time_remaining(RunningStage.TRAINING)
    if timer is None or remaining is None:
        return 0.0
    elapsed = timer.time_elapsed(RunningStage.TRAINING)
    return elapsed / (elapsed + remaining)
