"""Runs the model over the paged cache: a decode pass of all rows, or a piece of one prompt.

Legend: B rows, T tokens of a piece, N pages of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch
from torch import Tensor

from ic.inference.engine.decode_inputs import DecodeInputs
from ic.inference.engine.graphs import DecodeGraphs, padded_batch, padded_width
from ic.inference.engine.pages import NULL_PAGE
from ic.inference.engine.scheduler import Chunk, Sequence
from ic.inference.fused import fuse_for_inference
from ic.model import MLAForCausalLM
from ic.model.context import AttentionContext
from ic.model.paged_cache import PagedLatentCache


@dataclass
class _Row:
    """A row of the decode batch: a sequence, and how many of its pages the device knows."""

    sequence: Sequence
    num_pages: int = 0


class Runner:
    """A model with its paged cache.

    Nothing here waits for the device. The model is fused for inference where it can be.

    Args:
        num_pages: that requests may hold; one more stands for nobody.
        max_batch: most rows of a decode pass.
        graphs: record decode passes, and replay them.
    """

    def __init__(
        self,
        model: MLAForCausalLM,
        *,
        num_pages: int,
        page_tokens: int,
        max_batch: int,
        codes: torch.dtype | None,
        graphs: bool,
    ) -> None:
        fuse_for_inference(model)
        self.model = model
        self.page_tokens = page_tokens
        self.device = model.device
        config = model.config
        self.cache = PagedLatentCache(
            config, num_pages + 1, page_tokens, dtype=model.dtype, codes=codes, device=self.device
        )
        longest = min(config.max_position_embeddings, num_pages * page_tokens)
        self._max_pages = -(-longest // page_tokens)
        self._inputs = DecodeInputs(
            padded_batch(max_batch), self._max_pages, config.qk_rope_head_dim // 2, self.device
        )
        self._rows: list[_Row] = []
        self._graphs = DecodeGraphs(self._pass) if graphs else None
        # With and without graphs alike: the same kernels then give the same numbers.
        self._pads = self.device.type == "cuda"
        can = model.model.operators.attention.capabilities
        self._reads_lengths = can.row_lengths
        self._reads_pages = (
            can.row_lengths and can.block_table and (codes is None or can.quantised_cache)
        )

    def decode(self, sequences: Ordered[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Compute the last token of each sequence -> the sequences in their order in the batch, and
        the logits (B, V) of their next tokens.
        """
        self._seat(sequences)
        rows, width = len(self._rows), max(row.num_pages for row in self._rows)
        if self._pads:
            rows, width = padded_batch(rows), padded_width(width, self._max_pages)
        self._send(rows)
        run = self._pass if self._graphs is None else self._graphs.replay
        logits_BV = run(rows, width)
        return [row.sequence for row in self._rows], logits_BV[: len(self._rows)]

    def decode_next(self, tokens_B: Tensor) -> None:
        """Take in the tokens that were drawn from the logits of `decode`, on the device."""
        self._inputs.tokens_B[: len(tokens_B)].copy_(tokens_B)

    def read(self, chunk: Chunk) -> Tensor | None:
        """Compute a piece of a prompt -> the logits (1, V) behind it if it is the last piece."""
        sequence, tokens = chunk.sequence, self.page_tokens
        ids_BT = self._upload(sequence.tokens[chunk.start : chunk.end], torch.int64)[None]
        pages_N = self._upload(sequence.pages[: -(-chunk.end // tokens)], torch.int32)
        position_BT = torch.arange(chunk.start, chunk.end, device=self.device)[None]
        slots_BT = pages_N[position_BT // tokens].long() * tokens + position_BT % tokens
        cos_BTF, sin_BTF = self.model.model.rotary_emb(position_BT)
        context = AttentionContext(
            cos_BTF,
            sin_BTF,
            visible_BT=position_BT + 1,
            append_slots_M=slots_BT.flatten(),
            num_keys=chunk.end,
            block_table_BN=pages_N[None],
        )
        if not chunk.is_last:
            self.model.model(ids_BT, past_key_values=self.cache, context=context)
            return None
        logits: Tensor = self.model(
            ids_BT, past_key_values=self.cache, context=context, logits_to_keep=1
        ).logits
        return logits[:, 0]

    def begin_decoding(self, sequence: Sequence, tokens_B: Tensor) -> None:
        """Take in the token that was drawn from the logits of `read`, on the device."""
        row = len(self._rows)
        self._rows.append(_Row(sequence))
        self._inputs.tokens_B[row : row + 1].copy_(tokens_B)

    def forget(self) -> None:
        """Leave out all rows."""
        self._rows.clear()

    def _seat(self, sequences: Ordered[Sequence]) -> None:
        """Give each sequence a row, in which it stays as long as it decodes, and its pages."""
        wanted = set(sequences)
        for index in range(len(self._rows) - 1, -1, -1):
            if self._rows[index].sequence in wanted:
                continue
            last = self._rows.pop()
            if index < len(self._rows):
                self._inputs.move_row(len(self._rows), index, last.num_pages)
                self._rows[index] = last
        seated = {row.sequence for row in self._rows}
        for sequence in sequences:
            if sequence not in seated:
                # It was preempted, and read all but its last token again.
                self._inputs.set_token(len(self._rows), sequence.tokens[-1])
                self._rows.append(_Row(sequence))
        for index, row in enumerate(self._rows):
            pages = row.sequence.pages
            if row.num_pages < len(pages):
                self._inputs.set_pages(index, row.num_pages, pages[row.num_pages :])
                row.num_pages = len(pages)

    def _send(self, num_rows: int) -> None:
        """Send the numbers of a step; rows behind those of sequences stand for nobody."""
        numbers, tokens = self._inputs.host_numbers(), self.page_tokens
        lengths = [row.sequence.num_computed for row in self._rows]
        slots = [
            row.sequence.pages[(length - 1) // tokens] * tokens + (length - 1) % tokens
            for row, length in zip(self._rows, lengths, strict=True)
        ]
        nobody = num_rows - len(lengths)
        lengths += [1] * nobody
        slots += [NULL_PAGE * tokens] * nobody
        visible_B = torch.tensor(lengths)
        cos_BTF, sin_BTF = self.model.model.rotary_emb(visible_B[:, None] - 1)
        numbers.slots_B[:num_rows] = torch.tensor(slots)
        numbers.visible_B[:num_rows] = visible_B
        numbers.lengths_B[:num_rows] = visible_B
        numbers.cos_BF[:num_rows] = cos_BTF[:, 0]
        numbers.sin_BF[:num_rows] = sin_BTF[:, 0]
        self._inputs.send_numbers()

    def _pass(self, rows: int, width: int) -> Tensor:
        """Launch a decode pass of the first rows, with tables of `width` pages -> logits (B, V)."""
        numbers = self._inputs.numbers
        visible_B1 = numbers.visible_B[:rows, None]
        mask_BTS = None
        if not self._reads_lengths:
            index_S = torch.arange(width * self.page_tokens, device=self.device)
            mask_BTS = index_S < visible_B1[..., None]
        context = AttentionContext(
            numbers.cos_BF[:rows, None],
            numbers.sin_BF[:rows, None],
            visible_BT=visible_B1,
            mask_BTS=mask_BTS,
            lengths_B=numbers.lengths_B[:rows] if self._reads_lengths else None,
            append_slots_M=numbers.slots_B[:rows],
            block_table_BN=self._inputs.table_BN[:rows, :width],
            reads_pages=self._reads_pages,
        )
        logits: Tensor = self.model(
            self._inputs.tokens_B[:rows, None], past_key_values=self.cache, context=context
        ).logits
        return logits[:, 0]

    def _upload(self, numbers: list[int], dtype: torch.dtype) -> Tensor:
        pinned = self.device.type == "cuda"
        host = torch.tensor(numbers, dtype=dtype, pin_memory=pinned)
        return host.to(self.device, non_blocking=True)
