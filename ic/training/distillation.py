"""LightningModule that teaches a model the next-token distributions of a frozen one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.model import MLAForCausalLM
from ic.model.head import Head
from ic.model.labels import IGNORE_INDEX
from ic.model.loss import shift_labels
from ic.model.plain_layers import plain_weight
from ic.parallel.replica import data_replica
from ic.training.distillation_loss import DistillationSums, compare_chunk, distillation_sums
from ic.training.language_modeling import LanguageModelingModule
from ic.training.metrics import TokenMean, bits_per_byte, perplexity
from ic.training.options import DistillationOptions, ObjectiveOptions, OptimizerOptions
from ic.training.teacher import Teacher


class DistillationModule(LanguageModelingModule):
    """Trains `MLAForCausalLM` on the targets of text or of conversations.

    The loss is a mean over the targets of an optimizer step: all ranks, all micro-batches.

    Logs `train/loss`, `train/kl` (of the teacher to the student, nats per target, at the
    temperature), `train/perplexity` (of the text), and of text `train/bits_per_byte`; `val/...` and
    `test/...` likewise over whole sets, and there `agreement`, the share of targets before which
    both find the same token most likely.

    Args:
        teacher: on the CPU; it is moved to the rank's device before the first step.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerOptions,
        distillation: DistillationOptions,
        teacher: Teacher,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, ObjectiveOptions())
        self.distillation = distillation
        self.teacher = teacher  # no nn.Module, so none of this module's parameters
        self._compare: Any = compare_chunk
        if distillation.compile:
            self._compare = torch.compile(compare_chunk)
        for metrics in self.eval_metrics.values():
            for name in ("loss", "kl", "agreement"):
                metrics[name] = TokenMean()  # type: ignore[operator]

    def setup(self, stage: str) -> None:
        self.teacher.to(self.trainer.strategy.root_device)

    def _share(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        sums = self._distil(batch)
        assert self._num_targets is not None
        num_targets = self._num_targets[1].clamp(min=1)
        loss, kl, cross_entropy = (
            total / num_targets for total in (sums.loss, sums.kl, sums.cross_entropy)
        )
        return loss, [loss.detach(), kl, cross_entropy, self._text_bytes(batch)]

    def _log_step(self, batch: Batch) -> None:
        assert self._step_sums is not None
        assert self._num_targets is not None
        loss, kl, cross_entropy, text_bytes = self.trainer.strategy.reduce(
            self._step_sums, reduce_op="sum"
        )
        log: dict[str, Any] = {
            "train/loss": loss.float(),
            "train/kl": kl.float(),
            "train/perplexity": perplexity(cross_entropy),
        }
        if "token_bytes" in batch:
            sharing = self.trainer.world_size // data_replica(self.trainer)[1]
            total = cross_entropy * self._num_targets[1]
            log["train/bits_per_byte"] = bits_per_byte(total, text_bytes / sharing)
        log["train/context_length"] = float(batch["input_ids"].shape[1])
        self.log_dict(log, prog_bar=True, batch_size=len(batch["input_ids"]))

    def _evaluate(self, batch: Batch, stage: str) -> None:
        sums = self._distil(batch, agreement=True)
        num_targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        metrics: Any = self.eval_metrics[stage]
        values = {
            "loss": sums.loss,
            "kl": sums.kl,
            "agreement": sums.agreeing,
            "perplexity": sums.cross_entropy,
        }
        for name, total in values.items():
            metrics[name].update(total, num_targets)
            self.log(f"{stage}/{name}", metrics[name], prog_bar=name == "loss", batch_size=1)
        if "token_bytes" in batch:
            metrics["bits_per_byte"].update(sums.cross_entropy, self._text_bytes(batch))
            self.log(f"{stage}/bits_per_byte", metrics["bits_per_byte"], batch_size=1)

    def _distil(self, batch: Batch, *, agreement: bool = False) -> DistillationSums:
        ids, teacher = batch["input_ids"], self.teacher
        positions, documents = batch.get("position_ids"), batch.get("document_ids")
        operators = self.model.model.operators.attention
        with teacher.at_hand():
            teacher_hidden = teacher.hidden(ids, positions, documents, operators)

            def compare(hidden_BTD: Tensor, head: Head) -> DistillationSums:
                weight_WD = plain_weight(head.layer)
                assert weight_WD is not None  # LoRA adapts the decoder's layers alone
                return distillation_sums(
                    hidden_BTD.flatten(0, 1),
                    weight_WD,
                    teacher_hidden.flatten(0, 1),
                    teacher.weight,
                    shift_labels(batch["labels"]).flatten(),
                    self.distillation,
                    agreement=agreement,
                    compare=self._compare,
                )

            return self.model.with_head(
                compare, ids, position_ids=positions, document_ids=documents
            )
