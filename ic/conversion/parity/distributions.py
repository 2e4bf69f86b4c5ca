"""What two models make of each token of a text: read side by side, in pieces, over their caches.

Legend: T tokens of the text, N tokens of a piece, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ic.inference.caches import new_cache, piece_tokens

# Of one model's logits of a piece in fp32.
LOGITS_BYTES = 2**29
# Of what is compared at once: some tensors of the size are held beside the logits.
_COMPARED_BYTES = 2**27


@dataclass(frozen=True)
class TokenDistances:
    """Of each token after the first of a text, how the two models predict it.

    Entry t is about token t + 1, predicted from the tokens 0 to t. The first three arrays are as
    long as what both models read, the last as long as what the converted one read.

    Attributes:
        kl: Kullback-Leibler divergence of the converted model's distribution from the original's,
            KL(original || converted) in nats, float32.
        agrees: whether both have the same likeliest token.
        nats_original, nats_converted: negative log-likelihood of the token, float32.
    """

    kl: np.ndarray
    agrees: np.ndarray
    nats_original: np.ndarray
    nats_converted: np.ndarray


@torch.no_grad()
def token_distances(
    original: Any,
    converted: Any,
    ids_T: np.ndarray,
    vocabulary: int,
    *,
    both_tokens: int,
    prefill_chunk_tokens: int,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> TokenDistances:
    """Read a text with both models, of which no more logits are held than a piece has.

    Args:
        original, converted: ours, or causal language models of `transformers`.
        ids_T: token ids, two or more.
        vocabulary: logits that are compared; what a model has beyond them is padding.
        both_tokens: the most tokens that both models can read; what is behind them is read by the
            converted one alone.
        prefill_chunk_tokens: longest piece that is processed at once.
        on_tokens: is told of each piece how many tokens it has.
    """
    predicted = len(ids_T) - 1
    both = min(both_tokens - 1, predicted)
    piece = _piece(original, converted, len(ids_T), prefill_chunk_tokens)
    ids = torch.from_numpy(np.asarray(ids_T, dtype=np.int64)).to(converted.device)
    read_original = _Reader(original, both, vocabulary)
    read_converted = _Reader(converted, predicted, vocabulary)
    parts: list[tuple[Tensor, ...]] = []
    for begin in range(0, both, piece):
        end = min(begin + piece, both)
        targets_N = ids[begin + 1 : end + 1]
        logits = read_original(ids[begin:end]), read_converted(ids[begin:end])
        parts.append(_compare(*logits, targets_N))
        on_tokens(end - begin)
    alone: list[Tensor] = []
    for begin in range(both, predicted, piece):
        end = min(begin + piece, predicted)
        alone.append(_nats(read_converted(ids[begin:end]), ids[begin + 1 : end + 1]).cpu())
        on_tokens(end - begin)
    kl, agrees, nats_original, nats_converted = (
        torch.cat(each) for each in zip(*parts, strict=True)
    )
    return TokenDistances(
        kl.numpy(),
        agrees.numpy(),
        nats_original.numpy(),
        torch.cat([nats_converted, *alone]).numpy(),
    )


class _Reader:
    """Reads a text of one row, piece by piece."""

    def __init__(self, model: Any, tokens: int, vocabulary: int) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.cache = new_cache(model, tokens)

    def __call__(self, ids_N: Tensor) -> Tensor:
        """The next piece -> its logits (N, W)."""
        output = self.model(ids_N[None], past_key_values=self.cache, use_cache=True)
        logits_NW: Tensor = output.logits[0, :, : self.vocabulary]
        return logits_NW


def _piece(original: Any, converted: Any, tokens: int, prefill_chunk_tokens: int) -> int:
    """Tokens that both models process at once."""
    vocabulary = max(each.config.get_text_config().vocab_size for each in (original, converted))
    most = min(piece_tokens(each, prefill_chunk_tokens, tokens) for each in (original, converted))
    return min(most, max(1, LOGITS_BYTES // (4 * vocabulary)))


def _compare(original_NW: Tensor, converted_NW: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
    """The four arrays of `TokenDistances` of a piece, on the CPU."""
    size = max(1, _COMPARED_BYTES // (4 * original_NW.shape[1]))
    found = []
    for first, second, targets in zip(
        original_NW.split(size), converted_NW.split(size), targets_N.split(size), strict=True
    ):
        log_p, log_q = first.float().log_softmax(-1), second.float().log_softmax(-1)
        # Rounding may leave less than nothing of two distributions that are all but equal.
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
        agrees = log_p.argmax(-1) == log_q.argmax(-1)
        own = [-each.gather(-1, targets[:, None])[:, 0] for each in (log_p, log_q)]
        found.append((kl, agrees, *own))
    return tuple(torch.cat(each).cpu() for each in zip(*found, strict=True))


def _nats(logits_NW: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood (N,) float32 of the targets."""
    size = max(1, _COMPARED_BYTES // (4 * logits_NW.shape[1]))
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            for logits, targets in zip(logits_NW.split(size), targets_N.split(size), strict=True)
        ]
    )
