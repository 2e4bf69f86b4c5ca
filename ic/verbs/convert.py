"""a Llama, Qwen or Mistral becomes a model with Multi-head Latent Attention"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic.checkpoint.export_folder import check_output
from ic.checkpoint.source import find_source
from ic.config.typed_values import quoted
from ic.conversion.options import PARITY
from ic.conversion.options import ConvertOptions as Config
from ic.conversion.parity.options import ParityConfig, ParityOptions
from ic.inference.options import LoadOptions

if TYPE_CHECKING:
    from ic.conversion.convert import Converted
    from ic.conversion.layout import Layout

OWN_TEXT = (
    "The text is that which the conversion was measured on: give parity.text=[FILES] for text that "
    "it has not seen."
)


def check(config: Config) -> None:
    """Refuse a source that is none and an output that may not be taken.

    Raises:
        CheckpointError: naming which.
    """
    check_output(find_source(config.source).path, Path(config.output), config.overwrite)


def run(config: Config) -> int:
    """Convert the model layer by layer and write its folder."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ic.conversion.convert import convert, prepare
    from ic.conversion.parity.report import HEAD, headline
    from ic.conversion.parity.run import measure_parity
    from ic.display.table import print_table
    from ic.inference.loading import announce

    prepared = prepare(config)
    announce(prepared.source)
    for line in _widths(prepared.layout):
        print(line, file=sys.stderr)
    columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("layers", total=prepared.layout.geometry.layers)
        converted = convert(
            prepared, config, lambda done, total: progress.update(task, completed=done, total=total)
        )
    console, output = Console(), Path(config.output)
    for line in _summary(converted, output):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    parity = config.parity_config()
    if parity is None:
        return 0
    same = config.parity is not None and not config.parity.text and bool(parity.text)
    try:
        results = measure_parity(parity, notes=(OWN_TEXT,) if same else ())
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{output} is whole, its report is not; go on with {_command(parity)}")
        raise
    print_table(HEAD, headline(results["rows"]), title="parity", console=console)
    for sentence in (*results["notes"], *results["words"]):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"report: {output / PARITY}", highlight=False, soft_wrap=True)
    return 0


def _widths(layout: Layout) -> list[str]:
    """What is to be known, before minutes are spent, of widths that the GPU kernels do not take."""
    from ic.kernels.widths import nearest_widths, refusal

    value_dim = layout.geometry.head_dim
    why_not = refusal(layout.nope_dim, layout.rope_dim, value_dim, layout.rank)
    if why_not is None:
        return []
    near = nearest_widths(layout.nope_dim, layout.rope_dim, value_dim, layout.rank)
    pairs = ", ".join(f"rank={rank} rope_dim={rope}" for rank, rope in near)
    return [
        f"The result runs with attention=torch alone: {why_not}"
        + (f". The nearest widths are {pairs}" if near and not layout.keeps_keys else "")
    ]


def _command(parity: ParityConfig) -> str:
    """The command that measures the same, and takes over what has been measured."""
    usual = {**asdict(ParityOptions()), **asdict(LoadOptions())}
    given = [
        f"{name}={_written(value)}"
        for name, value in asdict(parity).items()
        if name not in usual or value != usual[name]
    ]
    return f"python -m ic parity {shlex.join(given)}"


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(each)}' for key, each in value.items())}}}"
    return quoted(value) if isinstance(value, str) else str(value)


def _summary(converted: Converted, output: Path) -> list[str]:
    """What was made, what its cache takes before and after, and which layers lost most."""
    layout, layers = converted.layout, converted.layers
    before, after = layout.geometry.cache_numbers, layout.cache_numbers
    per_token = 2 * layout.geometry.layers  # bytes in bf16 of one number of each layer
    lines = [
        f"{'exact' if layout.is_exact else 'compressed'} form: rank {layout.rank}, rotary key "
        f"{layout.rope_dim}, {layout.nope_dim} dimensions per head without rotation",
        f"cache in bf16: {before * per_token:,} bytes per token before, {after * per_token:,} "
        f"after ({after / before:.0%})",
    ]
    if not layout.is_exact:
        worst = max(layers, key=lambda layer: layer["output_error"])
        mean = sum(layer["output_error"] for layer in layers) / len(layers)
        lines.append(
            f"error of the attention's output: {mean:.1%} on average over the layers, most in "
            f"layer {worst['layer']} with {worst['output_error']:.1%}"
        )
    size = sum(file.stat().st_size for file in converted.files)
    lines.append(f"{size / 1e6:,.1f} MB in {converted.seconds:.0f} s: {output}")
    return lines
