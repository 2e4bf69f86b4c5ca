"""Greedy answers over a latent cache that goes over from prompt to prompt.

Legend: B batch, T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ic.model import LatentCache, MLAForCausalLM

# Logits of a piece of a prompt in fp32, where all of them are needed.
LOGITS_BYTES = 2**31

# Sees each cache at its largest; the memory profiler counts it.
OnCache = Callable[[LatentCache], None]


class StoppedError(Exception):
    """The decoder was asked to stop in the middle of a prompt."""


class GreedyDecoder:
    """Answers prompts one batch after another.

    What a prompt has in common with the one before, from its first token on, is not processed
    again: the cache is cropped to it; a context-parallel cache to the last whole piece of it.

    Args:
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        on_cache: sees each cache at its largest.
        stop: asked before each such piece whether to stop, which raises `StoppedError`. Processes
            that share a prompt have to be told the same.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        prefill_chunk_tokens: int,
        on_cache: OnCache | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stop = stop
        self.model = model
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.on_cache = on_cache
        self._cache: LatentCache | None = None
        self._cached_BT: Tensor | None = None

    @torch.no_grad()  # not inference mode: sharded parameters gathered in it could not be trained
    def answers(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        """Greedy continuation (B, new_tokens) of prompts of equal length."""
        ids_BT = ids_BT.to(self.model.device)
        kept = self._common_tokens(ids_BT)
        if kept:
            assert self._cache is not None
            self._cache.keep(kept)
        else:
            self._cache = None  # frees its memory before the next one is allocated
            self._cache = self.model.model.new_cache(ids_BT.shape[1] + new_tokens)
        cache, self._cached_BT = self._cache, None  # unknown, should an error interrupt the prefill
        for chunk in ids_BT[:, kept:].split(self.prefill_chunk_tokens, dim=1):
            if self.stop():
                raise StoppedError
            logits = self.model(
                chunk, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        out = ids_BT.new_empty(len(ids_BT), new_tokens)
        for i in range(new_tokens):
            out[:, i] = logits[:, -1].argmax(-1)
            if i + 1 < new_tokens:
                logits = self.model(out[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        self._cached_BT = ids_BT
        if self.on_cache is not None:
            self.on_cache(cache)
        return out

    @torch.no_grad()
    def losses(self, ids_BT: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each token after the first: (B, T - 1) fp32, on the
        CPU.
        """
        ids_BT = ids_BT.to(self.model.device)
        self._cache = self._cached_BT = None  # frees its memory before the next one is allocated
        cache = self.model.model.new_cache(ids_BT.shape[1])
        out = torch.empty(len(ids_BT), ids_BT.shape[1] - 1)
        row_bytes = len(ids_BT) * self.model.config.vocab_size * 4
        piece = min(self.prefill_chunk_tokens, max(1, LOGITS_BYTES // row_bytes))
        for start in range(0, ids_BT.shape[1] - 1, piece):
            if self.stop():
                raise StoppedError
            chunk, targets = ids_BT[:, start : start + piece], ids_BT[:, start + 1 :][:, :piece]
            logits = self.model(chunk, past_key_values=cache, use_cache=True).logits
            logits = logits[:, : targets.shape[1]].float().transpose(1, 2)
            nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            out[:, start : start + piece] = nats.cpu()
        if self.on_cache is not None:
            self.on_cache(cache)
        return out

    def _common_tokens(self, ids_BT: Tensor) -> int:
        """Cached tokens that each row shares with the same row before; the last one of a prompt is
        left to compute.
        """
        if self._cache is None or self._cached_BT is None:
            return 0
        if len(ids_BT) != len(self._cached_BT):
            return 0
        tokens = min(ids_BT.shape[1], self._cached_BT.shape[1])
        differs_T = (ids_BT[:, :tokens] != self._cached_BT[:, :tokens]).any(0)
        first = int(differs_T.int().argmax()) if bool(differs_T.any()) else tokens
        return self._cache.croppable_length(min(first, ids_BT.shape[1] - 1))
