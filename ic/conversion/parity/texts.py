"""Documents read by both models: a file of each, and from them distances and perplexity in rows.

A document is read once, at the longest length that wants it: what comes later does not change how
its beginning is predicted. A file of arrays is complete or absent, and named for both models'
weights and the document's tokens, so that an interrupted report goes on at the next document.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.conversion.parity.distributions import TokenDistances, token_distances
from ic.conversion.parity.options import ParityConfig, ParityOptions
from ic.conversion.parity.pair import Pair
from ic.evaluation.perplexity.documents import Document, Documents
from ic.evaluation.statistics import mean_columns, mean_interval
from ic.files.atomic_write import replacing
from ic.files.run_folder import ParityFolder

Row = dict[str, Any]
# What `position` says: one bucket of positions, or all of a length together.
BUCKET, WHOLE = "bucket", "all"
# Columns that need the original.
_OF_BOTH = (
    *("nats_original", "perplexity_original"),
    *("perplexity_original_low_95", "perplexity_original_high_95"),
    *("difference", "ratio", "ratio_low_95", "ratio_high_95"),
    *("kl", "kl_low_95", "kl_high_95", "kl_median", "kl_p99"),
    *("agreement", "agreement_low_95", "agreement_high_95"),
)


@dataclass(frozen=True)
class Texts:
    """The documents of each length, and each of them once at its longest.

    Attributes:
        by_length: for each length its documents, as indices of `documents`.
        documents: without repetition.
    """

    by_length: dict[int, list[int]]
    documents: list[Document]

    def tokens_left(self, read: Callable[[Document], bool]) -> int:
        """Tokens of those that have not been read."""
        return sum(len(each) - 1 for each in self.documents if not read(each))


def draw_texts(options: ParityOptions, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The user's documents.

    Raises:
        ValueError: files that cannot be read, or too few documents that are long enough.
    """
    files = Documents(options.documents_options())
    shortest = min(options.lengths)
    documents: list[Document] = []
    places: dict[tuple[str, bytes], int] = {}
    by_length: dict[int, list[int]] = {}
    for length in sorted(options.lengths, reverse=True):
        by_length[length] = []
        for document in files.of_length(tokenizer, length):
            known = document.name, document.ids_T[:shortest].tobytes()
            if known not in places:
                places[known] = len(documents)
                documents.append(document)
            by_length[length].append(places[known])
    return Texts(dict(sorted(by_length.items())), documents)


def read_texts(
    pair: Pair,
    texts: Texts,
    options: ParityConfig,
    folder: ParityFolder,
    on_tokens: Callable[[int], None],
) -> list[TokenDistances]:
    """What both models make of each document; those that are in the folder are not read again.

    Args:
        on_tokens: is told of tokens that were read now.
    """
    found = []
    for document in texts.documents:
        file = tokens_file(folder, pair, document)
        if file.is_file():
            with np.load(file) as arrays:
                found.append(TokenDistances(**{name: arrays[name] for name in arrays}))
            continue
        distances = token_distances(
            pair.original.model,
            pair.converted.model,
            document.ids_T,
            pair.vocabulary,
            both_tokens=min(pair.both_positions, len(document)),
            prefill_chunk_tokens=options.prefill_chunk_tokens,
            on_tokens=on_tokens,
        )
        for side, nats in (
            (pair.original, distances.nats_original),
            (pair.converted, distances.nats_converted),
        ):
            if not np.isfinite(nats).all():
                raise ValueError(
                    f"{side.source} gives logits that are no numbers (NaN or infinite) on "
                    f"{document.name}; its weights are damaged, or dtype={options.dtype} is too "
                    "small for them: try dtype=float32"
                )
        with replacing(file) as partial, partial.open("wb") as arrays:
            np.savez(arrays, **asdict(distances))
        found.append(distances)
    return found


def tokens_file(folder: ParityFolder, pair: Pair, document: Document) -> Path:
    """Where the arrays of a document lie."""
    digest = hashlib.blake2b(digest_size=12)
    for side in (pair.original, pair.converted):
        digest.update(f"{side.weights} {side.model.dtype} ".encode())
    digest.update(document.ids_T.tobytes())
    return folder.tokens / f"{digest.hexdigest()}.npz"


def text_rows(
    texts: Texts, distances: Sequence[TokenDistances], options: ParityOptions, both_positions: int
) -> list[Row]:
    """A row for each length and bucket of positions, and one for all positions of a length.

    Documents are the unit of every interval, which is Student's of the mean over them. `nats` are a
    mean over documents of each one's mean loss per token, and `difference` is the converted model's
    minus the original's on the same tokens; `ratio` is its exponential, the perplexities' ratio.
    Median and 99th percentile are of all tokens. What the original could not read is null.
    """
    rows = []
    shared = [length for length in texts.by_length if length <= both_positions]
    for length, places in texts.by_length.items():
        of_length = [distances[place] for place in places]
        edges = options.documents_options().edges(length)
        spans = [(WHOLE, 1, length), *((BUCKET, *span) for span in pairwise(edges))]
        for position, first, end in spans:
            rows.append(
                {
                    "what": "logits",
                    "length_tokens": length,
                    "position": position,
                    "from_token": first,
                    "to_token": end,
                    "n": len(of_length),
                    "n_tokens": len(of_length) * (end - first),
                    **_columns(of_length, first - 1, end - 1, original=length in shared),
                }
            )
    return rows


def _columns(documents: Sequence[TokenDistances], first: int, end: int, *, original: bool) -> Row:
    """What is said of the entries from `first` to `end` of each document."""
    converted = [_mean(each.nats_converted[first:end]) for each in documents]
    columns: Row = _perplexity("converted", converted)
    if not original:
        return {**dict.fromkeys(_OF_BOTH), **columns}
    own = [_mean(each.nats_original[first:end]) for each in documents]
    apart = [b - a for a, b in zip(own, converted, strict=True)]
    low, high = mean_interval(apart) or (None, None)
    kl = np.concatenate([each.kl[first:end] for each in documents])
    return {
        **_perplexity("original", own),
        **columns,
        "difference": math.fsum(apart) / len(apart),
        "ratio": math.exp(math.fsum(apart) / len(apart)),
        "ratio_low_95": None if low is None else math.exp(low),
        "ratio_high_95": None if high is None else math.exp(high),
        **mean_columns("kl", [_mean(each.kl[first:end]) for each in documents]),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        **mean_columns("agreement", [_mean(each.agrees[first:end]) for each in documents], most=1),
    }


def _perplexity(side: str, nats: Sequence[float]) -> Row:
    mean = math.fsum(nats) / len(nats)
    low, high = mean_interval(nats) or (None, None)
    return {
        f"nats_{side}": mean,
        f"perplexity_{side}": math.exp(mean),
        f"perplexity_{side}_low_95": None if low is None else math.exp(low),
        f"perplexity_{side}_high_95": None if high is None else math.exp(high),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))
