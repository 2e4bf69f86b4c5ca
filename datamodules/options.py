"""What each datamodule is asked. Imports no PyTorch, so that help and errors come at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from ic.datamodules.needle_names import TASKS
from ic.files.saved_config import MAY_CHANGE

SLOT_BYTES = 64
SUFFIXES = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
}
# Each may follow a suffix of text and JSON Lines; parquet compresses by itself.
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = ("auto", *SUFFIXES)
# `ic.datamodules.chat_templates` holds them.
CHAT_TEMPLATES = ("ic", "chatml")
DOCUMENT_UNITS = ("file", "paragraph", "line")


@dataclass
class DataOptions:
    """What every datamodule is asked.

    Attributes:
        name: of the option in the group `data`.
        context_length: longest sequence in tokens.
        tokens_per_batch: tokens of one micro-batch and rank.
        num_workers: processes that make batches ahead; the batches do not depend on it.
        worker_timeout_s: how long to wait for a batch of theirs before the run ends.
        seed: of the data: which samples are drawn, and in which order.
    """

    # Whether a row is a pair of answers, which a preference objective compares.
    HAS_PAIRS: ClassVar[bool] = False
    # Whether batches hold an `answer_mask`: what a curriculum over the length grows on.
    MARKS_ANSWERS: ClassVar[bool] = False
    # What the validation logs of it below `val/`; of pairs the objective says.
    VALIDATION_METRICS: ClassVar[tuple[str, ...]] = ("loss", "perplexity")

    name: str = "???"
    context_length: int = 2048
    tokens_per_batch: int = 4096
    num_workers: int = field(default=0, metadata=MAY_CHANGE)
    worker_timeout_s: float = field(default=600.0, metadata=MAY_CHANGE)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.worker_timeout_s < math.inf:
            raise ValueError(
                f"data.worker_timeout_s={self.worker_timeout_s}: must be above 0, and finite"
            )

    @property
    def mixes_lengths(self) -> bool:
        """Whether batches differ in length from one to the next."""
        return False

    @property
    def positions(self) -> tuple[str, int]:
        """How many positions the model must have, and the key that says so."""
        return "context_length", self.context_length


@dataclass
class GeneratedDataOptions(DataOptions):
    """Configuration of a `GeneratedDataModule`; subclasses add what they generate.

    Attributes:
        context_length: longest sequence; the curriculum, if any, starts shorter.
        tokens_per_batch: tokens of one micro-batch and rank, held constant over lengths.
        max_position: positions are drawn below this (skips).
        skip_probability: share of the sequences with position skips; 0 turns them off.
        num_skips: skips a sequence.
        val_batches: batches of the validation and of the test set.
        num_workers: processes that make batches ahead; the batches do not depend on it.
    """

    MARKS_ANSWERS = True
    VALIDATION_METRICS = ("loss", "answer_accuracy")
    # The fewest tokens of a sequence.
    LEAST_LENGTH: ClassVar[int]

    max_position: int = 2**20
    skip_probability: float = 0.8
    num_skips: int = 3
    val_batches: int = 8

    @property
    def positions(self) -> tuple[str, int]:
        return "max_position", self.max_position

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_length < self.LEAST_LENGTH:
            raise ValueError(
                f"data.context_length={self.context_length}: must be at least {self.LEAST_LENGTH}, "
                "which a needle and a question take"
            )
        if self.tokens_per_batch < self.context_length:
            raise ValueError(
                f"data.tokens_per_batch={self.tokens_per_batch}: must hold one sequence of "
                f"data.context_length={self.context_length}"
            )
        if self.max_position < self.context_length:
            raise ValueError(
                f"data.max_position={self.max_position}: must be at least "
                f"data.context_length={self.context_length}"
            )
        if not 0 <= self.skip_probability <= 1:
            raise ValueError(f"data.skip_probability={self.skip_probability}: must be in [0, 1]")
        for name, least in (("num_skips", 0), ("val_batches", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")


def check_weights(setting: str, weights: dict[str, float], names: tuple[str, ...]) -> None:
    """Raises a ValueError for an unknown name, a negative weight, or none above 0."""
    unknown = set(weights) - set(names)
    if unknown:
        raise ValueError(f"{setting}: unknown {sorted(unknown)}; choose from {', '.join(names)}")
    if not weights or min(weights.values()) < 0 or not sum(weights.values()):
        raise ValueError(f"{setting}={weights}: must be >= 0, one above 0")


@dataclass
class PasskeyDataOptions(GeneratedDataOptions):
    """Configuration of `PasskeyDataModule`.

    Attributes:
        task_weights: how often a sequence ends in each needle task.
        num_needles: distractors of `multi_key`, values of `multi_value`, queries of `multi_query`.
    """

    LEAST_LENGTH = 2 * SLOT_BYTES

    name: str = "passkey"
    task_weights: dict[str, float] = field(
        default_factory=lambda: {
            "single": 1.0,
            "multi_key": 0.0,
            "multi_value": 0.0,
            "multi_query": 0.0,
        }
    )
    num_needles: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_needles <= 8:
            raise ValueError(f"data.num_needles={self.num_needles}: must be from 1 to at most 8")
        check_weights("data.task_weights", self.task_weights, TASKS)


class _ReadsText(Protocol):
    """Options of data that read documents from files."""

    format: str
    document_unit: str
    text_column: str


def check_text_options(options: _ReadsText, files: tuple[str, ...]) -> None:
    """Raises a ValueError for file names that are no list, or an unknown format or unit."""
    for name in files:
        given = getattr(options, name)
        if isinstance(given, str):
            raise ValueError(
                f"data.{name}={given!r}: must be a list of paths or globs, such as [{given}]"
            )
    for name, allowed in (("format", FORMATS), ("document_unit", DOCUMENT_UNITS)):
        if getattr(options, name) not in allowed:
            raise ValueError(
                f"data.{name}={getattr(options, name)!r}: choose from {', '.join(allowed)}"
            )
    if not options.text_column:
        raise ValueError("data.text_column is empty: name the key or column with the document")


@dataclass
class TextDataOptions(DataOptions):
    """Configuration of `TextDataModule`.

    Attributes:
        train_files, val_files, test_files: paths or globs of local files.
        val_fraction: without `val_files`, share of the training documents to hold out and validate
            on; each document's content decides.
        format: `text`, `jsonl`, `parquet`, or `auto` for the files' suffix.
        text_column: key (jsonl) or column (parquet) that holds the document.
        document_unit: what of a text file is one document: `file`, `paragraph` or `line`.
        append_eos: end each document with the tokenizer's eos token, a target like any other.
        prepend_bos: start each document with the tokenizer's bos token.
        context_length: tokens of a sequence.
        tokens_per_batch: tokens of one micro-batch and rank, a multiple of `context_length`.
        shuffle_buffer: documents that are permuted together, held in memory by each stream and
            read again on resume; 0 keeps files and rows in their order.
        num_streams: streams a rank reads side by side; micro-batch i comes from stream i % this.
            Workers share the work when their number divides it. It is part of what fixes the order.
        num_workers: processes that make batches ahead; the batches do not depend on it.
        ignore_checkpoint_position: on resume begin with the first document, rather than refuse when
            the checkpoint's position does not fit these files and settings.
    """

    VALIDATION_METRICS = ("loss", "perplexity", "bits_per_byte")

    name: str = "text"
    train_files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    test_files: list[str] = field(default_factory=list)
    val_fraction: float = 0.0
    format: str = "auto"
    text_column: str = "text"
    document_unit: str = "file"
    append_eos: bool = True
    prepend_bos: bool = False
    shuffle_buffer: int = 256
    num_streams: int = 1
    ignore_checkpoint_position: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_options(self, ("train_files", "val_files", "test_files"))
        if not 0 <= self.val_fraction < 1:
            raise ValueError(
                f"data.val_fraction={self.val_fraction}: must be from 0 to below 1, such as 0.05"
            )
        if self.val_fraction and self.val_files:
            raise ValueError(
                f"data.val_fraction={self.val_fraction} holds training documents out for "
                "validation, but data.val_files are given: choose one of them"
            )
        for name, least in (
            ("context_length", 2),
            ("shuffle_buffer", 0),
            ("num_streams", 1),
            ("num_workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")
        sequences = self.tokens_per_batch // self.context_length
        if sequences < 1 or self.tokens_per_batch % self.context_length:
            nearest = max(1, sequences) * self.context_length
            raise ValueError(
                f"data.tokens_per_batch={self.tokens_per_batch}: must be a multiple of "
                f"data.context_length={self.context_length}, such as {nearest}"
            )


@dataclass
class EpochDataOptions(DataOptions):
    """Configuration of an `EpochDataModule`; subclasses add the columns they read.

    Attributes:
        train_files, val_files, test_files: paths or globs of `.jsonl` and `.parquet`, folders
            that `datasets` saved, or `bundled:NAME`.
        context_length: most tokens of a sequence.
        tokens_per_batch: tokens of a micro-batch and rank.
        too_long: what to do with an example beyond the context, one of `TOO_LONG`.
        shuffle: another order each epoch.
        num_workers: processes that make batches ahead; the batches do not depend on it.
    """

    TOO_LONG: ClassVar[tuple[str, ...]]
    SEQUENCES_PER_ROW: ClassVar[int] = 1

    train_files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    test_files: list[str] = field(default_factory=list)
    too_long: str = "error"
    shuffle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.too_long not in self.TOO_LONG:
            raise ValueError(
                f"data.too_long={self.too_long!r}: choose from {', '.join(self.TOO_LONG)}"
            )
        if self.context_length < 2:
            raise ValueError(f"data.context_length={self.context_length}: must be at least 2")
        for name in ("num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 0")

    @property
    def mixes_lengths(self) -> bool:
        return True

    @property
    def rows_per_batch(self) -> int:
        """Rows of a micro-batch and rank."""
        return self.tokens_per_batch // (self.SEQUENCES_PER_ROW * self.context_length)


@dataclass
class SFTDataOptions(EpochDataOptions):
    """Configuration of `SFTDataModule`.

    Attributes:
        messages_column: conversations; where a row lacks it, `prompt_column` and
            `completion_column` hold text or messages.
        prompt_column, completion_column: question and answer of a row without `messages_column`.
        context_length: most tokens of a row.
        tokens_per_batch: a multiple of `context_length`.
        packing: several conversations a row, each attending to itself; otherwise one a row.
        too_long: what to do with a conversation beyond the context: `error`, or `drop` it, or
            `split` it into rows that do not see each other; both are counted and reported.
        needle_fraction: share of the training micro-batches that are generated: conversations as
            long as the context, about a text with facts in it (`data=retrieval`).
        needle_files: paths or globs of the texts for them; without files they are synthetic.
        max_position: their positions skip up to here in half of the rows; 0 for none.
    """

    TOO_LONG = ("error", "drop", "split")

    name: str = "sft"
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    packing: bool = True
    needle_fraction: float = 0.0
    needle_files: list[str] = field(default_factory=list)
    max_position: int = 0

    @property
    def mixes_lengths(self) -> bool:
        return not self.packing

    @property
    def positions(self) -> tuple[str, int]:
        return ("max_position", self.max_position) if self.max_position else super().positions

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.needle_fraction <= 0.9:
            raise ValueError(
                f"data.needle_fraction={self.needle_fraction}: must be from 0 to at most 0.9"
            )
        if self.max_position and self.max_position < self.context_length:
            raise ValueError(
                f"data.max_position={self.max_position}: must be at least "
                f"data.context_length={self.context_length}, or 0"
            )
        if not self.needle_fraction and (self.needle_files or self.max_position):
            raise ValueError(
                "data.needle_fraction=0 generates no rows, but data.needle_files or "
                "data.max_position say what they are like; give it a share, such as 0.25"
            )
        if self.tokens_per_batch < 1 or self.tokens_per_batch % self.context_length:
            raise ValueError(
                f"data.tokens_per_batch={self.tokens_per_batch}: must be a multiple of "
                f"data.context_length={self.context_length}"
            )


@dataclass
class PreferenceDataOptions(EpochDataOptions):
    """Configuration of `PreferenceDataModule`; a row is a pair.

    Attributes:
        prompt_column, chosen_column, rejected_column: names of the columns; a row without the
            prompt's has it as the common beginning of the other two.
        share_prompt: run a pair's prompt through the model once, not twice. The loss is the same.
        tokens_per_batch: a pair counts as two context lengths, whether its prompt is shared or not.
        too_long: what to do with a pair beyond the context: `error`, or `drop` and report it.
    """

    TOO_LONG = ("error", "drop")
    SEQUENCES_PER_ROW = 2
    HAS_PAIRS = True

    name: str = "preference"
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    share_prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_batch < 2 * self.context_length:
            raise ValueError(
                f"data.tokens_per_batch={self.tokens_per_batch}: must hold a pair, two times "
                f"data.context_length={self.context_length}"
            )
