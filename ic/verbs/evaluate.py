"""passkey heatmap of a checkpoint folder"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ic.errors import check_choice
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.inference.loading import DTYPE_NAMES
from ic.model.backends import Backends


@dataclass
class Config:
    """The verb `evaluate`: the passkey grid of a checkpoint folder.

    Attributes:
        checkpoint: folder with `config.json`, tokenizer and safetensors.
        output: folder for cells.jsonl, heatmap.csv and heatmap.png; default `<checkpoint>/passkey`.
        trained_length: drawn as a line in the heatmap; default from the checkpoint.
        devices, num_nodes: processes of a host, each with the whole model, and hosts; they share
            the cells. In a SLURM job both are the job's.
        context_parallel_size: 1, or the number of processes: they then share each prompt and its
            cache instead of the cells, for prompts that are too long for one.
    """

    checkpoint: str = "???"
    output: str | None = None
    evaluation: PasskeyGridConfig = field(default_factory=PasskeyGridConfig)
    trained_length: int | None = None
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    context_parallel_size: int = 1
    dtype: str = "auto"
    attention: str = "torch"
    norm: str = "torch"
    rope: str = "torch"

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        self.backends()

    def backends(self) -> Backends:
        """The switches above, checked."""
        check_choice("dtype", self.dtype, DTYPE_NAMES)
        return Backends(self.attention, self.norm, self.rope, self.dtype)


def run(config: Config) -> int:
    """The passkey grid of a checkpoint folder: cells.jsonl, heatmap.csv, heatmap.png, a table."""
    from pathlib import Path

    from rich.console import Console

    from ic.checkpoint.folder import trained_length
    from ic.evaluation.passkey.heatmap import (
        passkey_rows,
        shown_name,
        summary_table,
        write_csv,
        write_png,
    )
    from ic.evaluation.passkey.run import run_grid
    from ic.files.results import write_results
    from ic.inference.loading import load_for_inference
    from ic.machine.launch import launch_ranks
    from ic.parallel.context_parallel import ContextParallel

    sharing = config.context_parallel_size
    ranks = launch_ranks(
        config.accelerator, config.devices, config.num_nodes, exchange_tensors=sharing > 1
    )
    if sharing not in (1, ranks.world_size):
        raise ValueError(
            f"context_parallel_size={sharing} with {ranks.world_size} processes: choose 1 or "
            f"{ranks.world_size}, or change devices or num_nodes"
        )
    model, tokenizer = load_for_inference(config.checkpoint, config.accelerator, config.backends())
    if sharing > 1:
        model.model.context_parallel = ContextParallel()
    folder = Path(config.checkpoint)
    output = Path(config.output) if config.output else folder / "passkey"
    is_first = ranks.global_rank == 0
    rows = run_grid(
        model,
        tokenizer,
        config.evaluation,
        output / "cells.jsonl",
        quiet=not is_first,
        ranks=ranks if sharing == 1 else None,
        sharded=sharing > 1,
    )
    if not is_first:
        return 0
    write_csv(rows, output / "heatmap.csv")
    write_png(
        rows,
        output / "heatmap.png",
        title=f"{shown_name(folder)}: passkey retrieval on synthetic text",
        trained_length=config.trained_length or trained_length(folder),
    )
    write_results(output / "results.json", asdict(config), passkey_rows(rows))
    console = Console()
    console.print(summary_table(rows))
    console.print(f"heatmap: {output / 'heatmap.png'}", soft_wrap=True, highlight=False)
    return 0
