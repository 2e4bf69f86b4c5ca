"""write needle pairs for preference training (data=preference)"""

from __future__ import annotations

from pathlib import Path

from ic.datamodules.needle_pairs_options import MakePreferencesOptions as Config


def run(config: Config) -> int:
    """Write needle pairs for `data=preference`."""
    from rich.console import Console
    from rich.progress import track

    from ic.datamodules.needle_pairs import needle_pairs, write_pairs
    from ic.datamodules.tokenizers import build_tokenizer

    console = Console()
    rows = track(
        needle_pairs(config, build_tokenizer(config.tokenizer)),
        "pairs",
        config.num_pairs,
        console=console,
        disable=not console.is_terminal,
    )
    count = write_pairs(iter(rows), Path(config.output))
    console.print(f"{count} pairs: {config.output}", soft_wrap=True, highlight=False)
    return 0
