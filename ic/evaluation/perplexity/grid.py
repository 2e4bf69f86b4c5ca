"""What a perplexity evaluation measures: texts, lengths, windows and the buckets of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ic.datamodules.options import DOCUMENT_UNITS, FORMATS
from ic.errors import check_once
from ic.evaluation.options import SuiteOptions

FULL, SLIDING = "full", "sliding"
TASKS = (FULL, SLIDING)
BUCKETS = ("log2", "fixed")
# More are no curve but noise, and too many numbers for a line of the cells file.
MOST_BUCKETS = 1024


@dataclass
class Config(SuiteOptions):
    """Perplexity by position on long documents.

    Attributes:
        files: texts that the model was not trained on: folders, paths or globs; text, JSON Lines or
            parquet, compressed or not.
        format: `text`, `jsonl`, `parquet`, or `auto` for the files' suffix.
        text_column: key (jsonl) or column (parquet) that holds the document.
        document_unit: what of a text file is one document: `file`, `paragraph` or `line`.
        tasks: `full`: one pass, each token is predicted from all before it; `sliding`: windows,
            each token is predicted from at most `window_tokens` - 1 before it.
        samples: documents of each length. They are drawn by `seed` from those that are as long; of
            each the beginning is read.
        window_tokens: length of a sliding window.
        stride_tokens: how far the window moves on; only what is new in a window counts.
        buckets: positions are put together in buckets of `bucket_tokens` (`fixed`), or in one of
            `bucket_tokens` and others that each double the position (`log2`).
        bucket_tokens: positions of the first bucket, or of each.
    """

    suite: ClassVar[str] = "perplexity"

    lengths: list[int] = field(default_factory=lambda: [131072])
    samples: int = 10
    tokens_per_batch: int | None = 65536  # documents are read one by one; more are lost if stopped
    files: list[str] = field(default_factory=list)
    format: str = "auto"
    text_column: str = "text"
    document_unit: str = "file"
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    window_tokens: int = 4096
    stride_tokens: int = 2048
    buckets: str = "log2"
    bucket_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt != "plain":
            raise ValueError(f"{self.key('prompt')}: documents are read as they are; leave it out")
        for name, allowed in (
            ("format", FORMATS),
            ("document_unit", DOCUMENT_UNITS),
            ("buckets", BUCKETS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{self.key(name)}: choose one of {', '.join(allowed)}")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"{self.key('tasks')}: one or both of {', '.join(TASKS)}")
        check_once("suite.perplexity.tasks", self.tasks)
        for name in ("stride_tokens", "bucket_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.key(name)}: must be at least 1")
        if SLIDING in self.tasks:
            self._check_window()
        if len(self.edges(max(self.lengths))) > MOST_BUCKETS + 1:
            least = -(-max(self.lengths) // MOST_BUCKETS)
            raise ValueError(
                f"{self.key('bucket_tokens')}: more than {MOST_BUCKETS} buckets to "
                f"{max(self.lengths)} tokens; set it to at least {least}, or buckets=log2"
            )

    def _check_window(self) -> None:
        if self.window_tokens > min(self.lengths):
            raise ValueError(
                f"{self.key('window_tokens')}: larger than the length {min(self.lengths)}, so "
                "nothing would slide; choose a smaller window or longer lengths, or tasks=[full]"
            )
        if not self.stride_tokens < self.window_tokens:
            raise ValueError(
                f"{self.key('stride_tokens')}: must be below window_tokens={self.window_tokens}, "
                "or the first token of a window would have nothing before it"
            )

    def edges(self, length: int) -> list[int]:
        """Edges of the buckets: positions from 1 to `length`; the token at 0 is not predicted."""
        edges, at = [1], self.bucket_tokens
        while at < length:
            if at > 1:
                edges.append(at)
            at += at if self.buckets == "log2" else self.bucket_tokens
            if len(edges) > MOST_BUCKETS + 1:
                break
        return [*edges, length]


def windows(length: int, window: int, stride: int) -> Sequence[tuple[int, int, int]]:
    """First token, end and number of new tokens of each window, in order.

    As in Hugging Face's recipe (huggingface.co/docs/transformers/perplexity): the first window is
    new as a whole, the others in what lies behind the end of the one before; the last may be
    shorter.
    """
    found, before = [], 0
    for first in range(0, length, stride):
        end = min(first + window, length)
        found.append((first, end, end - before))
        before = end
        if end == length:
            break
    return found
