"""write a checkpoint as Hugging Face safetensors, without a GPU"""

from __future__ import annotations

from pathlib import Path

from ic.checkpoint.export_folder import check_output
from ic.checkpoint.options import ExportOptions as Config
from ic.checkpoint.source import find_source


def check(config: Config) -> None:
    """Refuse a source that is none and an output that may not be taken.

    Raises:
        CheckpointError: naming which.
    """
    check_output(find_source(config.checkpoint).path, Path(config.output), config.overwrite)


def run(config: Config) -> int:
    """Write a checkpoint as Hugging Face safetensors."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from ic.checkpoint.export import export_checkpoint
    from ic.datamodules.tokenizers import build_tokenizer
    from ic.inference.loading import announce

    source = find_source(config.checkpoint)
    announce(source)
    tokenizer = None if config.tokenizer is None else build_tokenizer(config.tokenizer)
    columns = (TextColumn("export"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("export", total=None, visible=False)
        files = export_checkpoint(
            source,
            Path(config.output),
            tokenizer=tokenizer,
            dtype=config.dtype,
            max_shard_size=config.max_shard_size,
            overwrite=config.overwrite,
            licence=config.licence,
            on_bytes=lambda done, total: progress.update(
                task, completed=done, total=total, visible=True
            ),
        )
    size = sum(file.stat().st_size for file in files)
    Console().print(
        f"{len(files)} safetensors file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB: "
        f"{config.output}",
        soft_wrap=True,
        highlight=False,
    )
    return 0
