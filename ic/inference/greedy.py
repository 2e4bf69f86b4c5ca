"""Greedy answers over a cache that goes over from prompt to prompt.

Legend: B batch, T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ic.inference.caches import (
    TransformersCache,
    cut_rows,
    new_cache,
    piece_tokens,
    takes_unequal_rows,
)
from ic.model import LatentCache

# Logits of a piece of a prompt in fp32, where all of them are needed.
LOGITS_BYTES = 2**31
# Tokens that a prompt is padded by at most, to be answered with another; of long ones an eighth.
PADDING = 64

# Sees each cache at its largest; the memory profiler counts it.
OnCache = Callable[[LatentCache | TransformersCache], None]


class StoppedError(Exception):
    """The decoder was asked to stop in the middle of a prompt."""


class GreedyDecoder:
    """Answers prompts one batch after another.

    What a prompt has in common with the one before, from its first token on, is not processed
    again: the cache is cropped to it; a context-parallel cache to the last whole piece of it.

    Args:
        model: ours, or a causal language model of `transformers` with attention in every layer.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        on_cache: sees each cache at its largest.
        stop: asked before each such piece whether to stop, which raises `StoppedError`. Processes
            that share a prompt have to be told the same.
        ends: tokens that end an answer. A row is filled up with the first of them, from its end on;
            once every row has ended, a shorter answer is returned.
    """

    def __init__(
        self,
        model: Any,
        prefill_chunk_tokens: int,
        on_cache: OnCache | None = None,
        stop: Callable[[], bool] = lambda: False,
        ends: Sequence[int] = (),
    ) -> None:
        self.stop = stop
        self.model = model
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.on_cache = on_cache
        self.ends = list(ends)
        self._cache: LatentCache | TransformersCache | None = None
        self._cached_BT: Tensor | None = None

    @torch.no_grad()  # not inference mode: sharded parameters gathered in it could not be trained
    def answers(
        self, ids_BT: Tensor, new_tokens: int, ended: Callable[[Tensor], bool] = lambda _: False
    ) -> Tensor:
        """Greedy continuation (B, new_tokens) of prompts of equal length.

        Args:
            ended: sees the continuation (B, n) after each token; a shorter one is returned once it
                says so.
        """
        ids_BT = ids_BT.to(self.model.device)
        kept = self._keep_common(ids_BT, ids_BT.shape[1] - 1, ids_BT.shape[1] + new_tokens)
        logits = self._prefill(ids_BT[:, kept:])
        out = self._continue(logits, new_tokens, ended)
        self._done(ids_BT)
        return out

    @torch.no_grad()
    def answers_of_any_length(
        self,
        prompts: Sequence[Tensor],
        new_tokens: int,
        ended: Callable[[Sequence[int], Tensor], bool] = lambda *_: False,
    ) -> list[Tensor]:
        """Greedy continuations, up to (new_tokens,), of prompts (T,) in their order.

        Prompts of about the same length are read and continued together, if the model can do that
        and give what it gives to each alone; others are those of equal length.

        Args:
            ended: sees the indices of prompts that are continued together and the continuation
                (B, n) after each token; theirs is over once it says so.
        """
        answers: dict[int, Tensor] = {}
        unequal = takes_unequal_rows(self.model)
        groups: list[list[int]] = []
        for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
            shortest = len(prompts[groups[-1][0]]) if groups else 0
            padding = max(PADDING, shortest // 8) if unequal else 0
            if groups and len(prompts[index]) <= shortest + padding:
                groups[-1].append(index)
            else:
                groups.append([index])
        for group in groups:
            lengths = [len(prompts[index]) for index in group]
            ids_BT = pad_sequence([prompts[index] for index in group], batch_first=True)
            over = partial(ended, group)
            if lengths[0] == lengths[-1]:
                out = self.answers(ids_BT, new_tokens, over)
            else:
                out = self._unequal(ids_BT.to(self.model.device), lengths, new_tokens, over)
            answers.update(zip(group, out, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _unequal(
        self,
        ids_BT: Tensor,
        lengths: Sequence[int],
        new_tokens: int,
        ended: Callable[[Tensor], bool],
    ) -> Tensor:
        """Greedy continuation (B, new_tokens) of prompts that are padded at their ends.

        The padding is read with them, and hidden from what follows.
        """
        shortest, longest = min(lengths), max(lengths)
        begin = self._keep_common(ids_BT[:, :shortest], shortest - 1, longest + new_tokens)
        piece = piece_tokens(self.model, self.prefill_chunk_tokens, longest)
        logits: Any = [None] * len(lengths)
        for chunk in ids_BT[:, begin:].split(piece, dim=1):
            last = [length - 1 - begin for length in lengths]
            wanted = sorted({place for place in last if 0 <= place < chunk.shape[1]})
            keep = torch.tensor(wanted or [chunk.shape[1] - 1], device=ids_BT.device)
            found = self._piece(chunk, logits_to_keep=keep)
            for row, place in enumerate(last):
                if place in wanted:
                    logits[row] = found[row, wanted.index(place)]
            begin += chunk.shape[1]
        if isinstance(self._cache, LatentCache):
            self._cache = cut_rows(self._cache, lengths, longest + new_tokens)
            lengths_B = None
        else:
            lengths_B = torch.tensor(lengths, device=ids_BT.device)
        out = self._continue(torch.stack(logits)[:, None], new_tokens, ended, lengths_B)
        self._done(ids_BT[:, :shortest])
        return out

    def _continue(
        self,
        logits: Tensor,
        new_tokens: int,
        ended: Callable[[Tensor], bool] = lambda _: False,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """The likeliest tokens (B, up to new_tokens) from the logits (B, 1, V) behind prompts.

        Args:
            lengths_B: of the prompts, where the cache also holds what pads them.
        """
        out = torch.empty((len(logits), new_tokens), dtype=torch.long, device=logits.device)
        padded = 0 if self._cache is None else self._cache.get_seq_length()
        ends = out.new_tensor(self.ends)
        ended_B = torch.zeros_like(out[:, 0], dtype=torch.bool)
        for i in range(new_tokens):
            out[:, i] = logits[:, -1].argmax(-1)
            if self.ends:
                ended_B |= torch.isin(out[:, i], ends)
                out[ended_B, i] = self.ends[0]
            if i + 1 == new_tokens or bool(ended_B.all()) or ended(out[:, : i + 1]):
                out = out[:, : i + 1]
                break
            hidden: dict[str, Tensor] = {}
            if lengths_B is not None:
                place_S = torch.arange(padded + i + 1, device=out.device)
                real_BS = (place_S < lengths_B[:, None]) | (place_S >= padded)
                hidden = {"attention_mask": real_BS.long(), "position_ids": lengths_B[:, None] + i}
            logits = self._forward(out[:, i : i + 1], **hidden)
        return out

    def losses(self, ids_BT: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each token after the first: (B, T - 1) fp32, on the
        CPU.
        """
        return self.targets(ids_BT, 1)[0]

    @torch.no_grad()
    def targets(self, ids_BT: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Of each token from index `start` on, at least 1: its negative log-likelihood in nats,
        (B, T - start) fp32, and whether it is the likeliest, (B, T - start) bool; on the CPU.
        """
        ids_BT = ids_BT.to(self.model.device)
        kept = self._keep_common(ids_BT, start - 1, ids_BT.shape[1])
        if kept < start - 1:
            self._prefill(ids_BT[:, kept : start - 1])
        shape = (len(ids_BT), ids_BT.shape[1] - start)
        nats_BS, likeliest_BS = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
        row_bytes = len(ids_BT) * self.model.config.get_text_config().vocab_size * 4
        piece = piece_tokens(self.model, self.prefill_chunk_tokens, ids_BT.shape[1])
        piece = min(piece, max(1, LOGITS_BYTES // row_bytes))
        for begin in range(0, shape[1], piece):
            targets = ids_BT[:, start + begin :][:, :piece]
            chunk = ids_BT[:, start + begin - 1 :][:, : targets.shape[1]]
            logits = self._piece(chunk).float().transpose(1, 2)
            nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            nats_BS[:, begin : begin + piece] = nats.cpu()
            likeliest_BS[:, begin : begin + piece] = (logits.argmax(1) == targets).cpu()
        self._done(ids_BT[:, :-1])
        return nats_BS, likeliest_BS

    def _keep_common(self, ids_BT: Tensor, at_most: int, capacity_tokens: int) -> int:
        """Crop the cache to what the prompts have in common with those before, or begin a new one
        -> the number of tokens that it holds.
        """
        kept = self._common_tokens(ids_BT, at_most)
        if kept:
            assert self._cache is not None
            self._cache.keep(kept)
        else:
            self._cache = None  # frees its memory before the next one is allocated
            self._cache = new_cache(self.model, capacity_tokens)
        self._cached_BT = None  # unknown, should an error interrupt the prefill
        return kept

    def _prefill(self, ids_BT: Tensor) -> Tensor:
        """Process prompts in pieces -> logits (B, 1, V) behind the last token."""
        assert self._cache is not None
        tokens = self._cache.get_seq_length() + ids_BT.shape[1]
        piece = piece_tokens(self.model, self.prefill_chunk_tokens, tokens)
        for chunk in ids_BT.split(piece, dim=1):
            logits = self._piece(chunk, logits_to_keep=1)
        return logits

    def _piece(self, ids_BT: Tensor, **options: int | Tensor) -> Tensor:
        """`_forward` of a piece of a prompt.

        Raises:
            StoppedError: it was asked to stop.
        """
        if self.stop():
            raise StoppedError
        return self._forward(ids_BT, **options)

    def _forward(self, ids_BT: Tensor, **options: int | Tensor) -> Tensor:
        """Append tokens to the cache -> their logits."""
        output = self.model(ids_BT, past_key_values=self._cache, use_cache=True, **options)
        logits: Tensor = output.logits
        return logits

    def _done(self, cached_BT: Tensor) -> None:
        """Remember which tokens the cache begins with, and show it."""
        self._cached_BT = cached_BT
        if self.on_cache is not None:
            assert self._cache is not None
            self.on_cache(self._cache)

    def _common_tokens(self, ids_BT: Tensor, at_most: int) -> int:
        """Cached tokens that each row shares with the same row before, at most so many."""
        if self._cache is None or self._cached_BT is None:
            return 0
        if len(ids_BT) != len(self._cached_BT):
            return 0
        tokens = min(ids_BT.shape[1], self._cached_BT.shape[1])
        differs_T = (ids_BT[:, :tokens] != self._cached_BT[:, :tokens]).any(0)
        first = int(differs_T.int().argmax()) if bool(differs_T.any()) else tokens
        return self._cache.croppable_length(min(first, at_most))
