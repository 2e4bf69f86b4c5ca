"""Documents as tokens, with the places between two of them where a sentence ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.datamodules.sentences import sentence_ends
from ic.datamodules.text_stream import bytes_of_tokens
from ic.model.byte_tokenizer import ByteTokenizer

# Of documents that are tokenized at once: a library that knows threads then uses them, and the
# lists that it makes stay below a gigabyte.
_CHARACTERS_AT_ONCE = 2**24


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (tokens,) int64 of each text; what spells a special token stays text."""
    if isinstance(tokenizer, ByteTokenizer):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # no warning that a text is longer than the model
    )
    return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def tokenize_sentences(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids (T,) int64 of each text, and the places in 1..T where a sentence ends, T among
    them.

    A tokenizer that tells where its tokens lie reads the whole text; a sentence that ends within a
    token then has no place behind it. Any other reads it sentence by sentence, each with the space
    before it.
    """
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE:
            yield from _tokenize(tokenizer, some)
            some, size = [], 0
    if some:
        yield from _tokenize(tokenizer, some)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not tokenizer.is_fast:
        for text in texts:
            ends = _ends(text)
            starts = [0, *ends[:-1]]
            parts = encode_texts(tokenizer, [text[a:b] for a, b in zip(starts, ends, strict=True)])
            yield np.concatenate(parts), np.cumsum([len(part) for part in parts])
        return
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for text, ids, offsets in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if not ids:
            yield np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
            continue
        ends = _ends(text)
        starts = [0, *ends[:-1]]
        sizes = np.cumsum([len(text[a:b].encode()) for a, b in zip(starts, ends, strict=True)])
        bytes_before = np.cumsum(bytes_of_tokens(text, len(ids), offsets), dtype=np.int64)
        places = np.searchsorted(bytes_before, sizes, side="right")
        whole = (places > 0) & (bytes_before[places - 1] == sizes)
        yield np.array(ids, dtype=np.int64), places[whole]


def _ends(text: str) -> list[int]:
    """Where sentences end, the text's own end the last."""
    return [*(end for end, _ in sentence_ends(text) if 0 < end < len(text)), len(text)]
