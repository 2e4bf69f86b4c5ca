"""Conversations of several turns over one cache each: whether later turns lose more than the first.

A cache that is read back otherwise than it was written answers a first turn well, which it has
just read, and later ones badly.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ic.conversion.parity.instructions import Message, conversations, prompt_after
from ic.conversion.parity.options import ParityOptions
from ic.conversion.parity.pair import Pair
from ic.evaluation.statistics import mean_columns, mean_interval
from ic.inference.caches import new_cache, piece_tokens
from ic.inference.greedy import GreedyDecoder
from ic.inference.model_facts import end_tokens

Row = dict[str, Any]


@torch.no_grad()
def turn_rows(
    options: ParityOptions, pair: Pair, on_turn: Callable[[int], None] = lambda _: None
) -> list[Row]:
    """A row for each turn; a conversation is the unit of every interval.

    The original answers greedily. Both models then read its answer token by token, each over a
    cache that goes on from turn to turn: `agreement` is the share of those tokens that the
    converted model would have given, `kl` is KL(original || converted) in nats per token, and
    `difference` the converted model's mean loss on them minus the original's.
    """
    original = pair.original.model
    decoder = GreedyDecoder(
        original, options.prefill_chunk_tokens, ends=end_tokens(original, pair.tokenizer)
    )
    found: list[list[dict[str, float]]] = [[] for _ in range(options.turns)]
    for asked in conversations(options):
        readers = {
            name: _Reader(side.model, options.prefill_chunk_tokens)
            for name, side in pair.sides.items()
        }
        messages: list[Message] = []
        for turn, instruction in enumerate(asked):
            messages.append({"role": "user", "content": instruction})
            prompt_T = prompt_after(pair.tokenizer, messages)
            answer = decoder.answers(torch.from_numpy(prompt_T)[None], options.answer_tokens)[0]
            ids_T = torch.cat((torch.from_numpy(prompt_T), answer.cpu()))
            log_p, log_q = (
                reader.read(ids_T, len(prompt_T))[:, : pair.vocabulary].log_softmax(-1)
                for reader in readers.values()
            )
            found[turn].append(_distances(log_p, log_q, answer.cpu()))
            text = str(pair.tokenizer.decode(answer.tolist(), skip_special_tokens=True)).strip()
            messages.append({"role": "assistant", "content": text})
            on_turn(1)
    return [_row(turn, values) for turn, values in enumerate(found, 1)]


class _Reader:
    """A model that reads conversations as they grow, over one cache."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        self._model, self._chunk_tokens = model, chunk_tokens
        self._cache: Any = new_cache(model, 0)
        self._held_T = torch.empty(0, dtype=torch.long)

    def read(self, ids_T: Tensor, prompt_tokens: int) -> Tensor:
        """Logits (T - prompt_tokens, V) float32, on the CPU, that predict the tokens behind the
        prompt, which are read one by one; what the cache holds already is not read again.
        """
        both = min(len(ids_T), len(self._held_T))
        differs_T = ids_T[:both] != self._held_T[:both]
        kept = int(differs_T.int().argmax()) if bool(differs_T.any()) else both
        kept = min(kept, prompt_tokens - 1)
        if kept < len(self._held_T):
            if kept := self._cache.croppable_length(kept):
                self._cache.keep(kept)
            else:
                self._cache = new_cache(self._model, 0)
        ids_1T = ids_T[None].to(self._model.device)
        piece = piece_tokens(self._model, self._chunk_tokens, len(ids_T))
        logits: list[Tensor] = []
        pieces = list(ids_1T[:, kept:prompt_tokens].split(piece, dim=1))
        # The last token is predicted, and not read: the next turn begins with it.
        answered_1T = ids_1T[:, prompt_tokens:-1]
        pieces += answered_1T.split(1, dim=1) if answered_1T.shape[1] else []
        for part in pieces:
            out = self._model(part, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            logits.append(out.logits[0, -1].float().cpu())
        self._held_T = ids_T[:-1]
        return torch.stack(logits[-(len(ids_T) - prompt_tokens) :])


def _distances(log_p: Tensor, log_q: Tensor, answer_T: Tensor) -> dict[str, float]:
    nats = [-each.gather(1, answer_T[:, None]).mean() for each in (log_p, log_q)]
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return {
        "agreement": float((log_q.argmax(-1) == answer_T).float().mean()),
        "kl": float(kl.mean()),
        "difference": float(nats[1] - nats[0]),
        "tokens": len(answer_T),
    }


def _row(turn: int, values: list[dict[str, float]]) -> Row:
    apart = [each["difference"] for each in values]
    low, high = mean_interval(apart) or (None, None)
    return {
        "what": "turns",
        "turn": turn,
        "n": len(values),
        "n_tokens": int(sum(each["tokens"] for each in values)),
        **mean_columns("agreement", [each["agreement"] for each in values], most=1.0),
        **mean_columns("kl", [each["kl"] for each in values]),
        "difference": sum(apart) / len(apart),
        "difference_low_95": low,
        "difference_high_95": high,
    }
