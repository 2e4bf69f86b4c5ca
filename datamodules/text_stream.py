"""An endless, ordered stream of tokenized documents that can be taken up again at any token.

Order: epoch after epoch. In an epoch the files come in an order drawn from (seed, epoch); of them
the shard's documents are read in blocks of `shuffle_buffer`, and each block is permuted by
(seed, shard, epoch, block). A position therefore names a block by where it starts, and taking the
stream up again costs reading that block once more. A rolling shuffle buffer, as in `datasets`,
mixes a little further, but its content is lost when a run is resumed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ic.datamodules.batch import Batch
from ic.datamodules.held_out import Part
from ic.datamodules.packing import PackedRow, collate_text, pack_documents
from ic.datamodules.text_files import TextFiles
from ic.datamodules.workers import WorkerLoader

_FILE_ORDER, _BLOCK_ORDER = 0, 1  # keep the two draws of a seed apart
# A beginning is cut from so many characters, which are enough in most languages; others get more.
_CHARACTERS_PER_TOKEN, _MARGIN_TOKENS = 6, 64


@dataclass(frozen=True)
class StreamPosition:
    """A token of a stream: everything before it has been used.

    Attributes:
        epoch: passes over the shard's documents, from 0.
        file: place in the epoch's order of files where the document's block starts.
        row: row of that file where the block starts.
        block: blocks of this epoch before it.
        index: place of the document in the permuted block.
        num_used_tokens: tokens of the document already used.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    block: int = 0
    index: int = 0
    num_used_tokens: int = 0

    def as_list(self) -> list[int]:
        return list(astuple(self))


class DocumentTokenizer:
    """Text to (tokens, 2) int32: each token's id, and how many bytes of the text it stands for.

    The bytes of a document's tokens add up to its UTF-8 bytes; first and last special tokens stand
    for none. The text is plain text throughout: a document that spells a special token does not
    become one.

    Raises:
        ValueError: a special token is asked for that the tokenizer does not have.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool, append_eos: bool
    ) -> None:
        self.tokenizer = tokenizer
        self._first = self._special("bos", "prepend_bos") if prepend_bos else []
        self._last = self._special("eos", "append_eos") if append_eos else []

    def __call__(self, text: str) -> np.ndarray:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,  # no warning that a document is longer than the model
        )
        ids = encoded["input_ids"]
        num_bytes = bytes_of_tokens(text, len(ids), encoded.get("offset_mapping"))
        first, last = len(self._first), len(self._last)
        return np.array(
            [[*self._first, *ids, *self._last], np.pad(num_bytes, (first, last))], dtype=np.int32
        ).T

    def beginning(self, text: str, tokens: int) -> np.ndarray:
        """The first `tokens` of what the whole text gives, without reading all of a long one."""
        size = _CHARACTERS_PER_TOKEN * (tokens + _MARGIN_TOKENS)
        # Without offsets, how many bytes a token stands for is known of whole texts alone.
        while self.tokenizer.is_fast and size < len(text):
            part = self(text[:size])
            # What a cut does to the tokens before it stays within a word.
            if len(part) >= tokens + _MARGIN_TOKENS:
                return part[:tokens]
            size *= 2
        return self(text)[:tokens]

    def _special(self, token: str, setting: str) -> list[int]:
        token_id = getattr(self.tokenizer, f"{token}_token_id")
        if token_id is None:
            raise ValueError(
                f"data.{setting}=true, but the tokenizer has no {token} token; "
                f"set data.{setting}=false or choose a tokenizer that has one"
            )
        return [token_id]


def bytes_of_tokens(
    text: str, num_tokens: int, offsets: list[tuple[int, int]] | None
) -> np.ndarray:
    """How many bytes of a text each of its tokens stands for (tokens,); the sum is the text's.

    Args:
        offsets: first character and end of each token, where the tokenizer tells them. A token
            gets what lies between the ends of the one before and of its own, so a character that
            several tokens share counts once. Without them all tokens get alike, as near as whole
            numbers can.
    """
    total = len(text.encode())
    if not num_tokens:
        return np.zeros(0, dtype=np.int64)
    if offsets is None:
        ends = np.arange(1, num_tokens + 1) * total // num_tokens
    else:
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
        end_of_character = np.concatenate([[0], sizes.cumsum()])
        ends = end_of_character[np.maximum.accumulate([end for _, end in offsets])]
        ends[-1] = total  # what a tokenizer leaves out at the end is part of the text too
    return np.diff(ends, prepend=0)


@dataclass
class TokenStream:
    """The documents of one shard, tokenized.

    Attributes:
        tokenize: text to the tokens that `DocumentTokenizer` gives.
        shard: one of `num_shards`; no two shards share a document, in any epoch.
        shuffle_buffer: documents of a block; 0 keeps the order of the files and rows.
        min_tokens: what a pass over the data must hold at least, or it is an error.
        part: which documents belong to it.
    """

    files: TextFiles
    tokenize: Callable[[str], np.ndarray]
    seed: int
    shard: int
    num_shards: int
    shuffle_buffer: int
    min_tokens: int
    part: Part = field(default_factory=lambda: Part())

    def documents(
        self, start: StreamPosition, *, repeat: bool = True
    ) -> Iterator[tuple[StreamPosition, np.ndarray]]:
        """Documents from the one `start` lies in (whole, its used tokens included) on, for ever.

        Args:
            start: where to begin.
            repeat: False ends the stream with the epoch of `start`.

        Raises:
            ValueError: a pass over the shard's documents gives too few tokens; a broken file.
        """
        for epoch in count(start.epoch):
            num_tokens, num_documents = 0, 0
            begin = start if epoch == start.epoch else StreamPosition(epoch=epoch)
            for position, text in self._epoch(begin):
                tokens = self.tokenize(text)
                num_tokens += len(tokens)
                num_documents += 1
                yield position, tokens
            # Only a pass from the first document on tells how much there is.
            if begin == StreamPosition(epoch=epoch) and num_tokens < self.min_tokens:
                raise ValueError(self._too_little(num_documents, num_tokens))
            if not repeat:
                return

    def rows(self, start: StreamPosition, context_length: int) -> Iterator[PackedRow]:
        """Rows of `context_length` tokens from `start` on, for ever."""
        return pack_documents(self.documents(start), context_length, start.num_used_tokens)

    def _epoch(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, str]]:
        skip = start.index
        for position, block in self._blocks(start):
            order = np.arange(len(block))
            if self.shuffle_buffer:
                key = [self.seed, _BLOCK_ORDER, self.shard, position.epoch, position.block]
                order = np.random.default_rng(key).permutation(len(block))
            for index in range(skip, len(block)):
                yield replace(position, index=index), block[order[index]]
            skip = 0

    def _blocks(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, list[str]]]:
        position = replace(start, index=0, num_used_tokens=0)
        block: list[str] = []
        for file, row, text in self._ordered_documents(start.epoch, start.file, start.row):
            block.append(text)
            if len(block) >= self.shuffle_buffer:
                yield position, block
                block = []
                position = replace(position, file=file, row=row + 1, block=position.block + 1)
        if block:
            yield position, block

    def _ordered_documents(
        self, epoch: int, first_file: int, first_row: int
    ) -> Iterator[tuple[int, int, str]]:
        order = np.arange(len(self.files))
        if self.shuffle_buffer:
            key = [self.seed, _FILE_ORDER, epoch]
            order = np.random.default_rng(key).permutation(len(self.files))
        for file in range(first_file, len(self.files)):
            start_row = first_row if file == first_file else 0
            for row, text in self.files.documents(
                int(order[file]), start_row, self.shard, self.num_shards
            ):
                if text in self.part:
                    yield file, row, text

    def _too_little(self, num_documents: int, num_tokens: int) -> str:
        share = "the data hold"
        if self.num_shards > 1:
            share = (
                f"share {self.shard + 1} of {self.num_shards} of the data (one for each rank and "
                "each of data.num_streams) holds"
            )
        return (
            f"{share} {num_documents} documents with {num_tokens} tokens, less than one sequence "
            f"of data.context_length={self.min_tokens}; give more data, a shorter context"
            + (", or fewer streams" if self.num_shards > 1 else "")
            + f" (first file: {self.files.files[0]})"
            + self.part.advice
        )


@dataclass
class Progress:
    """How far training has come: micro-batches used, and the next token of each stream."""

    step: int
    streams: list[StreamPosition]


@dataclass
class BrokenData:
    """What a worker hands over in place of a batch when the data are at fault."""

    message: str


class TextBatches(IterableDataset, ABC):
    """Batches whose `ValueError` reaches the user as it was raised; see `TextLoader`."""

    def __iter__(self) -> Iterator[Batch | BrokenData]:
        try:
            yield from self.batches()
        except ValueError as error:
            if get_worker_info() is None:
                raise
            yield BrokenData(str(error))

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """The batches, in order."""


class TextLoader(WorkerLoader):
    """Raises for broken data here; else the loader adds a worker's traceback to the message."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        for batch in iterator:
            if isinstance(batch, BrokenData):
                break
            yield batch
        else:
            return
        del iterator  # ends the workers; the traceback would keep them
        raise ValueError(batch.message)


class TrainingBatches(TextBatches):
    """Endless batches; batch i comes from stream i % S and from worker (i - start) % W.

    The batches do not depend on the number of workers. A worker tokenizes the streams that its
    batches come from, so W workers share the work where W divides S.

    Args:
        streams: the S streams of this rank.
        progress: where to start, read when iteration begins (the datamodule keeps it current).
    """

    def __init__(
        self,
        streams: list[TokenStream],
        progress: Progress,
        *,
        rows_per_batch: int,
        context_length: int,
    ) -> None:
        self.streams = streams
        self.progress = progress
        self.rows_per_batch = rows_per_batch
        self.context_length = context_length

    def batches(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        num_streams = len(self.streams)
        first = self.progress.step
        common = math.gcd(num_workers, num_streams)
        rows = {
            stream: self.streams[stream].rows(self.progress.streams[stream], self.context_length)
            for stream in range(num_streams)
            # Only these streams ever have their turn in this worker.
            if (stream - first - worker) % common == 0
        }
        for step in count(first):
            stream = step % num_streams
            if stream not in rows:
                continue
            batch = [next(rows[stream]) for _ in range(self.rows_per_batch)]
            if (step - first) % num_workers != worker:
                continue
            last = batch[-1]
            position = replace(last.mark, num_used_tokens=last.num_used_tokens)
            yield {
                # Rows are full, so no padding is ever looked up.
                **collate_text([row.runs for row in batch], self.context_length, pad_token_id=0),
                "step": step,
                "position": position.as_list(),
            }


class EvaluationBatches(TextBatches):
    """One pass over the data in file order; rows go round the ranks.

    Every rank packs all of the data and keeps every R-th row, because under sharded training all
    ranks must make the same number of batches. The last row is padded. A rank without a row in the
    last batch gets a row of padding, which has no target.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        rank: int,
        num_ranks: int,
        rows_per_batch: int,
        context_length: int,
        pad_token_id: int,
    ) -> None:
        self.stream = stream
        self.rank = rank
        self.num_ranks = num_ranks
        self.rows_per_batch = rows_per_batch
        self.context_length = context_length
        self.pad_token_id = pad_token_id

    def batches(self) -> Iterator[Batch]:
        documents = self.stream.documents(StreamPosition(), repeat=False)
        own: list[list[np.ndarray]] = []
        num_rows, step = 0, 0
        for row in pack_documents(documents, self.context_length):
            if num_rows % self.num_ranks == self.rank:
                own.append(row.runs)
            num_rows += 1
            if num_rows == self.rows_per_batch * self.num_ranks:
                yield self._batch(own, step)
                own, num_rows, step = [], 0, step + 1
        if num_rows:
            yield self._batch(own or [[]], step)

    def _batch(self, rows: list[list[np.ndarray]], step: int) -> Batch:
        return {**collate_text(rows, self.context_length, self.pad_token_id), "step": step}
