"""Conversations about a long text with facts in it, generated, for a share of SFT's micro-batches.

Conversations of the user are mostly short. Trained on them alone a model of long texts loses what
it could find there; rows as long as the context keep it. They are `data=retrieval`'s, in the
tokenizer's own chat template, and as in all of SFT only what the assistant writes is a target.
"""

from __future__ import annotations

from math import floor

import torch
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch, without
from ic.datamodules.options import SFTDataOptions
from ic.datamodules.retrieval import RetrievalBatches
from ic.datamodules.retrieval_options import RetrievalDataOptions
from ic.datamodules.text_files import resolve_files
from ic.model.labels import IGNORE_INDEX

# Of a row: a few facts in a long text as well as many.
_MOST_FACTS, _LEAST_PART = 0.1, 0.05


class NeedleRows:
    """The micro-batches that are generated; the same on every rank, each with rows of its own.

    Raises:
        ValueError: the text files cannot be read, or the tokenizer has no chat template.
    """

    def __init__(self, config: SFTDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.fraction = config.needle_fraction
        self.context_length = config.context_length
        files = config.needle_files
        resolve_files(files, "data.needle_files")  # refused under their own name
        self._make = RetrievalBatches(
            RetrievalDataOptions(
                context_length=config.context_length,
                tokens_per_batch=config.tokens_per_batch,
                seed=config.seed,
                max_position=max(config.max_position, config.context_length),
                skip_probability=0.5,
                train_files=files,
                haystack_weights={"text": 19.0 if files else 0.0, "noise": 1.0},
                question_weights={"chat": 1.0},
                fact_share=_MOST_FACTS,
                least_fact_share=_LEAST_PART,
            ),
            tokenizer,
        )

    def takes(self, step: int) -> bool:
        """Whether micro-batch `step` is generated: a share of them, evenly spread."""
        return floor((step + 1) * self.fraction) > floor(step * self.fraction)

    def batch(self, step: int, rank: int) -> Batch:
        """The micro-batch of a rank, in the form of SFT's."""
        made = self._make(split="train", step=step, rank=rank, context_length=self.context_length)
        labels = made["labels"].masked_fill(~made["answer_mask"], IGNORE_INDEX)
        documents = torch.zeros_like(labels, dtype=torch.int32)
        return {**without(made, "answer_mask"), "labels": labels, "document_ids": documents}
