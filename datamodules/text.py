"""Packed documents with document masking, from local text, JSON Lines or parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ic.datamodules.accumulation import take_lookahead, with_lookahead
from ic.datamodules.batch import Batch, without
from ic.datamodules.file_contents import FileSum, refuse_shared_files, sum_files
from ic.datamodules.held_out import Part
from ic.datamodules.options import TextDataOptions
from ic.datamodules.packing import cut_rows
from ic.datamodules.text_files import TextFiles, detect_format, resolve_files
from ic.datamodules.text_stream import (
    DocumentTokenizer,
    EvaluationBatches,
    Progress,
    StreamPosition,
    TextBatches,
    TextLoader,
    TokenStream,
    TrainingBatches,
)
from ic.datamodules.workers import make_loader
from ic.parallel.replica import data_replica


class TextDataModule(LightningDataModule):
    """Documents packed into full sequences, in an order that depends on the seed alone.

    A row is as long as the context. The part of a document that lies in one row is a run
    (`ic.datamodules.packing` has the rule): `document_ids` hold its number in the row,
    `position_ids` begin from 0 in each, and its first token is no target.
    Training rows are always full. In evaluation the last row is padded (a run of its own), the last
    batch may hold fewer rows, and a rank that has none left gets one row of padding.

    Batches are a function of (files, seed, num_streams, rank, number of ranks) and their index;
    the number of workers changes nothing. No two ranks train on the same document, in any epoch.
    Epochs follow each other without end.

    A checkpoint holds the position behind the last micro-batch that was trained on, of every rank:
    `state_dict` is collective when there are several. Resuming reads the current file up to the
    position (without parsing), one block of `shuffle_buffer` documents, and tokenizes one document
    twice; the batches that follow are those of an unbroken run.

    Raises:
        ValueError: from the constructor and `setup`, on settings or files that cannot be used;
            from iteration, on a malformed row, naming file and line; from `load_state_dict`, on a
            position recorded with other files or settings.
    """

    def __init__(self, config: TextDataOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self._tokenize = DocumentTokenizer(
            tokenizer, prepend_bos=config.prepend_bos, append_eos=config.append_eos
        )
        self._files: dict[str, TextFiles] = {}
        # Of the training files, from when they are first read on.
        self._sums: list[FileSum] = []
        self._progress = Progress(0, [StreamPosition()] * config.num_streams)
        # What the last micro-batch replaced, until the trainer is done with that micro-batch.
        self._before_last: Progress | None = None
        self._num_processed_before_last = 0
        self._curriculum_length: int | None = None

    @property
    def context_length(self) -> int:
        """Tokens of a training sequence now; evaluation always uses `config.context_length`."""
        return self._curriculum_length or self.config.context_length

    def set_context_length(self, tokens: int) -> None:
        """Length of the training sequences from the next micro-batch on, tokens a batch unchanged.

        Raises:
            ValueError: a length that does not divide `config.context_length`.
        """
        longest = self.config.context_length
        if tokens < 2 or longest % tokens:
            raise ValueError(
                f"context length {tokens}: must be at least 2 and divide "
                f"data.context_length={longest}"
            )
        self._curriculum_length = None if tokens == longest else tokens

    def check_files(self) -> None:
        """See `ReadsFiles`."""
        for split in ("train", "val") if self.config.val_files else ("train",):
            self._text_files(split)

    def setup(self, stage: str) -> None:
        """Resolve the files and read the first sequence, so that bad input ends the run here."""
        needed = {TrainerFn.VALIDATING: "val", TrainerFn.TESTING: "test"}.get(TrainerFn(stage))
        self._refuse_shared_files([needed] if needed else ["val", "test"])
        if stage == TrainerFn.FITTING:
            for stream in self._training_streams():
                next(self._beginnings(stream).rows(StreamPosition(), self.config.context_length))
        if needed or (stage == TrainerFn.FITTING and self._validates):
            stream = self._beginnings(self._evaluation_stream(needed or "val"))
            next(stream.documents(StreamPosition(), repeat=False))

    def train_dataloader(self) -> Iterable[Batch]:
        config = self.config
        if config.num_workers and config.num_streams % config.num_workers:
            rank_zero_warn(
                f"data.num_workers={config.num_workers} does not divide "
                f"data.num_streams={config.num_streams}: some documents are tokenized by several "
                "workers, which is correct but slow. Choose num_streams as a multiple of "
                "num_workers (this changes the order of the documents)."
            )
        if not self._sums:
            self._sums = sum_files(self._text_files("train").files)
        batches = TrainingBatches(
            self._training_streams(),
            self._progress,
            rows_per_batch=config.tokens_per_batch // config.context_length,
            context_length=config.context_length,
        )
        return with_lookahead(self._loader(batches, config.num_workers), self.trainer)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        # Training without validation is a choice; setup() refuses `validate` without files.
        if not self._validates:
            rank_zero_info(
                "no validation: name data.val_files, or hold documents out with "
                "data.val_fraction=0.05"
            )
            return []
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Called when a batch is used, not when a worker or Lightning fetches it ahead.
        position, trainer = batch.get("position"), self.trainer
        if position is None or trainer is None:
            return self._ready(batch)
        progress = self._progress
        self._before_last = replace(progress, streams=list(progress.streams))
        self._num_processed_before_last = self._num_processed()
        progress.step = batch["step"] + 1
        progress.streams[batch["step"] % self.config.num_streams] = StreamPosition(*position)
        return take_lookahead(batch, trainer, self._ready)

    def _ready(self, batch: Batch) -> Batch:
        """Without its position, in rows of the present length if it is for training."""
        rest = without(batch, "position")
        if "position" not in batch or self.trainer is None:
            return rest
        return cut_rows(rest, self.context_length)

    def state_dict(self) -> dict[str, Any]:
        """Position of every rank; empty before `setup("fit")`. All ranks must call it."""
        if "train" not in self._files:
            return {}
        progress = self._progress
        if self._before_last and self._num_processed() == self._num_processed_before_last:
            # Saved amid a step, say after Ctrl-C: its batch has not been trained on.
            progress = self._before_last
        return {
            "step": progress.step,
            "context_length": self._curriculum_length,
            "order": self._order(),
            "files": [each.as_list() for each in self._sums],
            "ranks": self._gather([position.as_list() for position in progress.streams]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trainer = self.trainer
        if trainer is not None and trainer.state.fn != TrainerFn.FITTING:
            return  # evaluation of a checkpoint, perhaps without its training files
        if self.config.ignore_checkpoint_position:
            return
        # Earlier versions held nothing out.
        saved, now = {"data.val_fraction": 0.0, **state_dict["order"]}, self._order()
        changed = [
            f"{key} was {saved.get(key)}, now {now[key]}"
            for key in now
            if saved.get(key) != now[key]
        ]
        changed += self._changed_files(
            [FileSum.from_list(each) for each in state_dict.get("files", [])]
        )
        if changed:
            raise ValueError(
                "the checkpoint's position in the data was recorded with other settings: "
                + "; ".join(changed)
                + ". Set them back, or begin the data anew with "
                "data.ignore_checkpoint_position=true"
            )
        if state_dict["context_length"] is not None:
            self.set_context_length(state_dict["context_length"])
        rank, _ = data_replica(self.trainer)
        # The loader holds this object: change it, do not replace it.
        self._progress.step = state_dict["step"]
        self._progress.streams = [StreamPosition(*each) for each in state_dict["ranks"][rank]]
        self._before_last = None

    def _refuse_shared_files(self, splits: list[str]) -> None:
        """Refuse evaluation on training files, where those are at hand."""
        config = self.config
        given = [split for split in splits if getattr(config, f"{split}_files")]
        try:
            training = resolve_files(config.train_files, "data.train_files")
        except ValueError:
            return  # training says what is wrong with them; evaluation does without
        refuse_shared_files(
            training, {f"data.{split}_files": self._text_files(split).files for split in given}
        )

    def _changed_files(self, saved: list[FileSum]) -> list[str]:
        """What is different about the training files, by name; reads those that may be."""
        files = self._text_files("train").files
        self._sums = sum_files(files, saved)
        return [
            f"{file} has other content"
            for file, before, now in zip(files, saved, self._sums, strict=False)
            if before.digest != now.digest
        ]

    @property
    def _validates(self) -> bool:
        return bool(self.config.val_files or self.config.val_fraction)

    def _text_files(self, split: str) -> TextFiles:
        if split not in self._files:
            config = self.config
            setting = f"data.{split}_files"
            patterns: list[str] = getattr(config, f"{split}_files")
            if not patterns:
                raise ValueError(
                    f"{setting} is empty: give paths or globs of local files, "
                    f"for example '{setting}=[corpus/*.jsonl]'"
                )
            files = resolve_files(patterns, setting)
            file_format = detect_format(files, config.format, setting)
            if file_format != "text" and config.document_unit != "file":
                raise ValueError(
                    f"data.document_unit={config.document_unit} is for text files; in {setting} "
                    f"({file_format}) each row is a document: leave it at 'file'"
                )
            self._files[split] = TextFiles(
                files, file_format, config.text_column, config.document_unit
            )
        return self._files[split]

    def _training_streams(self) -> list[TokenStream]:
        config = self.config
        rank, num_ranks = data_replica(self.trainer)
        return [
            TokenStream(
                self._text_files("train"),
                self._tokenize,
                seed=config.seed,
                shard=rank * config.num_streams + index,
                num_shards=num_ranks * config.num_streams,
                shuffle_buffer=config.shuffle_buffer,
                min_tokens=config.context_length,
                part=Part(config.val_fraction),
            )
            for index in range(config.num_streams)
        ]

    def _beginnings(self, stream: TokenStream) -> TokenStream:
        """A stream whose first sequence takes no whole book to read."""
        tokens = self.config.context_length
        return replace(stream, tokenize=partial(self._tokenize.beginning, tokens=tokens))

    def _evaluation_stream(self, split: str) -> TokenStream:
        fraction = self.config.val_fraction if split == "val" else 0.0
        return TokenStream(
            self._text_files("train" if fraction else split),
            self._tokenize,
            seed=0,
            shard=0,
            num_shards=1,
            shuffle_buffer=0,
            min_tokens=1,
            part=Part(fraction, held_out=fraction > 0),
        )

    def _evaluation_loader(self, split: str) -> DataLoader:
        rank, num_ranks = data_replica(self.trainer)
        pad_token_id = self.tokenizer.pad_token_id
        batches = EvaluationBatches(
            self._evaluation_stream(split),
            rank=rank,
            num_ranks=num_ranks,
            rows_per_batch=self.config.tokens_per_batch // self.config.context_length,
            context_length=self.config.context_length,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
        )
        # One worker: several would each pack everything.
        return self._loader(batches, min(1, self.config.num_workers))

    def _loader(self, batches: TextBatches, num_workers: int) -> DataLoader:
        return make_loader(TextLoader, batches, self.config, num_workers, self.trainer)

    def _order(self) -> dict[str, Any]:
        """What fixes the order of the documents and the meaning of a position."""
        config = self.config
        files = [Path(file) for file in self._text_files("train").files]
        sizes = [(file.name, file.stat().st_size) for file in files]
        return {
            "number of files": len(files),
            "their bytes": sum(size for _, size in sizes),
            "their names and sizes": hashlib.sha256(repr(sizes).encode()).hexdigest()[:16],
            "data.val_fraction": config.val_fraction,
            "data.document_unit": config.document_unit,
            "data.text_column": config.text_column,
            "data.prepend_bos": config.prepend_bos,
            "data.append_eos": config.append_eos,
            "data.shuffle_buffer": config.shuffle_buffer,
            "data.num_streams": config.num_streams,
            "data.seed": config.seed,
            "tokens in the vocabulary": len(self.tokenizer),
            "number of data-parallel ranks": data_replica(self.trainer)[1],
        }

    def _gather(self, own: list[list[int]]) -> list[list[list[int]]]:
        rank, num_ranks = data_replica(self.trainer)
        if num_ranks == 1:
            return [own]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (rank, own))
        by_rank = dict(everyone)
        return [by_rank[index] for index in range(num_ranks)]

    def _num_processed(self) -> int:
        if self.trainer is None:
            return -1
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed
