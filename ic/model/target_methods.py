"""What a training loop asks of the language model beside logits: sums over targets, and what else
is made of hidden states and head within a forward pass.

Legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from ic.model.branches import Branches
from ic.model.context import AttentionContext
from ic.model.head import Head
from ic.model.loss import shift_labels as shift
from ic.model.targets import TargetLogProbs, TargetSums, log_probs_of_targets, sum_targets

Result = TypeVar("Result")


class TargetsMixin:
    """Of an `MLAForCausalLM`: passes without a cache that end in its head."""

    model: Any
    lm_head: Any

    def target_sums(
        self,
        input_ids: Tensor,
        labels: Tensor,
        answer_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        all_tokens: bool = True,
        index_loss: bool = False,
    ) -> TargetSums:
        """Cross-entropy summed, not averaged: for means over several batches or ranks.

        Args:
            input_ids, document_ids: as in `MLAModel.forward`, whole sequences.
            position_ids: (B, T) int64, which only rotate: `document_ids` alone mark documents.
            labels: (B, T) aligned with `input_ids`, -100 where not a target.
            answer_mask: (B, T) bool, aligned with `labels`, or None.
            all_tokens: sum over all targets as well as over the marked ones.
            index_loss: the indexers' loss too (`ic.model.index_loss`).
        """
        context = self.model.make_context(
            *input_ids.shape, input_ids.device, position_ids=position_ids, document_ids=document_ids
        )
        if index_loss:
            context = replace(context, indexing=self.model.new_indexing(has_losses=True))
        hidden_BTD = self._last_hidden(input_ids, context)
        sums = sum_targets(
            hidden_BTD,
            self.head,
            shift(labels),
            None if answer_mask is None else F.pad(answer_mask[:, 1:], (0, 1)),
            parallel=self.model.context_parallel,
            all_tokens=all_tokens,
        )
        return sums._replace(index_loss=context.indexing.loss) if index_loss else sums

    def target_log_probs(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        branches: Branches | None = None,
    ) -> TargetLogProbs:
        """Log-probabilities of the targets one by one, without logits of the other tokens;
        arguments as in `target_sums` and `MLAModel.forward`.
        """
        hidden_BTD = self._hidden(input_ids, position_ids=position_ids, branches=branches)
        return log_probs_of_targets(hidden_BTD, self.head, labels, self.model.context_parallel)

    def with_head(
        self, use: Callable[[Tensor, Head], Result], input_ids: Tensor, **described: Any
    ) -> Result:
        """`use(hidden states (B, T, D), head)` within a forward pass, where a sharded model has the
        head's weights whole.

        Args:
            input_ids: (B, T) int64.
            described: `position_ids` and `document_ids`, as in `target_sums`.
        """
        return use(self._hidden(input_ids, **described), self.head)

    @property
    def head(self) -> Head:
        """The head as losses use it."""
        return Head(self.lm_head, self.model.operators.loss.summed_linear_cross_entropy)

    def _hidden(self, input_ids: Tensor, **described: Any) -> Tensor:
        """Hidden states (B, T, D) of a pass without a cache, in whose positions nobody looks for
        documents: that would wait for the GPU.
        """
        context = self.model.make_context(*input_ids.shape, input_ids.device, **described)
        return self._last_hidden(input_ids, context)

    def _last_hidden(self, input_ids: Tensor, context: AttentionContext) -> Tensor:
        outputs = self.model(input_ids, context=context, use_cache=False, return_dict=True)
        hidden_BTD: Tensor = outputs.last_hidden_state
        return hidden_BTD
