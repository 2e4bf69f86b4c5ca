"""make a corpus of long documents out of books, source trees and RFCs (data=text)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ic.datamodules.corpus.options import PrepareCorpusOptions as Config

if TYPE_CHECKING:
    from rich.console import Console

    from ic.datamodules.corpus.prepare import Counts

_HISTOGRAM_WIDTH = 40


def run(config: Config) -> int:
    """Write the corpus, its counts and a picture of its lengths."""
    from rich.console import Console
    from rich.progress import track

    from ic.datamodules.corpus.histogram import draw_lengths
    from ic.datamodules.corpus.prepare import prepare_corpus, write_counts

    console = Console()

    def progress(readings: list[Any]) -> Iterator[Any]:
        print(f"reading {len(readings):,} files and directories", flush=True)
        shown = track(readings, "reading", console=console, disable=not console.is_terminal)
        yield from shown
        print("cutting what stands in many documents, writing", flush=True)

    counts = prepare_corpus(config, progress)
    write_counts(config, counts)
    number = sum(counts.kept.values())
    title = f"{config.train_file.name}: {number:,} document{'' if number == 1 else 's'}"
    draw_lengths(counts.lengths, config.lengths_file, title=title)
    _print_counts(console, counts)

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    line(f"train with data=text 'data.train_files=[{config.train_file}]'")
    if counts.authors["heldout"]:
        line(f"held out: {config.heldout_file}")
    else:
        line("held out: nothing; there is but one author, or held_out=0")
    line(f"lengths: {config.lengths_file}")
    return 0


def _print_counts(console: Console, counts: Counts) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ic.datamodules.corpus.histogram import histogram

    table = Table(title="what was kept", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("part", "kind", "documents", "MB", "authors"):
        table.add_column(head, justify="left" if head in ("part", "kind") else "right")
    for (part, kind), documents in sorted(counts.kept.items(), reverse=True):
        size = f"{counts.num_bytes[part, kind] / 1e6:,.1f}"
        table.add_row(part, kind, f"{documents:,}", size, f"{len(counts.authors[part]):,}")
    console.print(table)
    rows = histogram(counts.lengths)
    most = max(documents for _, _, documents, _ in rows)
    lengths = Table(title="lengths in bytes", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("from", "documents", "MB", ""):
        lengths.add_column(head, justify="right" if head else "left")
    for low, _, documents, nbytes in rows:
        bar = "█" * max(documents > 0, round(_HISTOGRAM_WIDTH * documents / most))
        lengths.add_row(f"{low:,}", f"{documents:,}", f"{nbytes / 1e6:,.1f}", bar)
    console.print(lengths)
    for why, count in counts.left_out.most_common():
        console.print(f"left out: {count:,} {why}", highlight=False, soft_wrap=True)
    if counts.cut_bytes:
        console.print(f"boilerplate cut: {counts.cut_bytes:,} bytes", highlight=False)
