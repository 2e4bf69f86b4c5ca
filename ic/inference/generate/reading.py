"""How much of a long prompt is read, on standard error, while there is no answer yet."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# A CPU reads shorter prompts in seconds, even with a model of a billion parameters.
_LONG_TOKENS = 4096
# Seconds between two lines where there is no terminal.
_EVERY_S = 10.0


class Reading:
    """A bar on a terminal, and a line now and then elsewhere; nothing for a short prompt.

    Args:
        num_tokens: of the prompt.
        piece_tokens: those that are read in one pass; what takes several is long.
    """

    def __init__(self, num_tokens: int, piece_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._said_s: float | None = None
        self._bar: Progress | None = None
        if num_tokens > min(piece_tokens, _LONG_TOKENS):
            self._begin()

    def show(self, num_read: int) -> None:
        """So many tokens are read."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=num_read)
        elif self._said_s is not None and time.monotonic() - self._said_s >= _EVERY_S:
            self._say(num_read)

    def close(self) -> None:
        """The prompt is read, or given up; may be called again."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._said_s = None

    def _begin(self) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            self._say(0)
            return
        self._bar = Progress(
            TextColumn("reading the prompt"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._bar.add_task("", total=self._num_tokens)
        self._bar.start()

    def _say(self, num_read: int) -> None:
        self._said_s = time.monotonic()
        text = f"reading the prompt: {num_read:,} of {self._num_tokens:,} tokens"
        print(text, file=sys.stderr, flush=True)
