"""Synthetic long-context and needle data, made while training.

Batches mark their answers.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.datamodules.generated import GeneratedDataModule, stack_sequences
from ic.datamodules.needle_names import SPLITS
from ic.datamodules.options import PasskeyDataOptions
from ic.datamodules.synthetic import draw_sequence
from ic.model.byte_tokenizer import ByteTokenizer


def make_batch(
    config: PasskeyDataOptions, *, split: str, step: int, rank: int, context_length: int
) -> Batch:
    """The batch of a step; a pure function of its arguments, whatever process makes it."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), step, rank])
    tasks = [task for task, weight in config.task_weights.items() if weight > 0]
    weights = np.array([config.task_weights[task] for task in tasks])
    sequences = [
        draw_sequence(
            rng,
            context_length,
            split=split,
            task=tasks[int(rng.choice(len(tasks), p=weights / weights.sum()))],
            num_needles=config.num_needles,
            max_position=config.max_position,
            skip_probability=config.skip_probability,
            num_skips=config.num_skips,
        )
        for _ in range(max(1, config.tokens_per_batch // context_length))
    ]
    return stack_sequences(sequences, step)


class PasskeyDataModule(GeneratedDataModule):
    """Dense pairs, passkeys and position skips.

    Raises:
        ValueError: a tokenizer other than `ByteTokenizer`; slots are counted in bytes.
    """

    def __init__(self, config: PasskeyDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, ByteTokenizer):
            raise ValueError(
                f"data=passkey works on bytes, not with {type(tokenizer).__name__}; "
                "use tokenizer: bytes, data=retrieval or data=text"
            )
        super().__init__(config, partial(make_batch, config))
        self.tokenizer = tokenizer
