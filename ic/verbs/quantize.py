"""weights and cache in eight or four bits, in the form that vLLM loads"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ic.checkpoint.export_folder import check_output
from ic.checkpoint.source import find_source
from ic.conversion.parity.options import LOGITS, PARTS, ParityConfig, ParityOptions
from ic.errors import check_choice
from ic.inference.options import ACCELERATORS
from ic.quantization.options import GPTQ, PARITY, QuantizeOptions

if TYPE_CHECKING:
    from ic.quantization.quantize import Quantised


@dataclass
class Config(QuantizeOptions):
    """The verb `quantize`: a model's weights in eight or four bits, and what they cost.

    Attributes:
        accelerator: of calibration and the report: auto (a GPU if there is one), cpu or gpu.
        attention, norm, rope: backends of the report, as of `parity`.
        parity: what is measured of the source and the result, as by the verb `parity`, into the
            folder `parity` of the output. null measures nothing.
    """

    accelerator: str = "auto"
    attention: str = "torch"
    norm: str = "torch"
    rope: str = "torch"
    parity: ParityOptions | None = field(default_factory=ParityOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("accelerator", self.accelerator, ACCELERATORS)
        if "???" not in (self.source, self.output):
            self.parity_config()

    def parity_config(self) -> ParityConfig | None:
        """What is measured of source and result, if anything; without text all but logits.

        Raises:
            ValueError: options that do not fit.
        """
        if self.parity is None:
            return None
        given = {each.name: getattr(self.parity, each.name) for each in fields(ParityOptions)}
        if not given["text"] and not given["parts"]:
            given["parts"] = [part for part in PARTS if part != LOGITS]
        return ParityConfig(
            **given,
            original=self.source,
            converted=self.output,
            output=str(Path(self.output) / PARITY),
            tokenizer=self.tokenizer,
            accelerator=self.accelerator,
            attention=self.attention,
            norm=self.norm,
            rope=self.rope,
        )


def check(config: Config) -> None:
    """Refuse a source that is none and an output that may not be taken.

    Raises:
        CheckpointError: naming which.
    """
    check_output(find_source(config.source).path, Path(config.output), config.overwrite)


def run(config: Config) -> int:
    """Quantise the weights tensor by tensor and write the folder; then measure both models."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ic.conversion.calibration import open_texts, read_rows
    from ic.conversion.parity.check import check_report
    from ic.conversion.parity.progress import steps
    from ic.conversion.parity.report import HEAD, headline
    from ic.conversion.parity.run import measure_parity
    from ic.datamodules.tokenizers import load_tokenizer
    from ic.display.table import print_table
    from ic.errors import UsageError
    from ic.inference.loading import announce
    from ic.machine.devices import check_accelerator
    from ic.quantization.quantize import calibrate, prepare, quantize

    check_accelerator(config.accelerator)
    prepared = prepare(config)
    positions = prepared.config.max_position_embeddings
    parity = config.parity_config()
    rows_MT = None
    if parity is not None or config.calibration:
        tokenizer = prepared.tokenizer or load_tokenizer(prepared.source.path)
        check_report(parity, positions, tokenizer)
    if config.calibration:
        texts = open_texts(config)
        if config.calibration_tokens > positions:
            raise UsageError(
                f"calibration_tokens={config.calibration_tokens}: the model has {positions:,} "
                "positions; choose fewer"
            )
        rows_MT = read_rows(texts, tokenizer, config)
    announce(prepared.source)
    calibration = None
    if rows_MT is not None:
        passes = (config.cache == "int8") + (config.rounding == GPTQ)
        with steps("calibration", "rows", passes * len(rows_MT)) as on_row:
            calibration = calibrate(prepared, config, rows_MT, config.accelerator, on_row)
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("weights", total=None, visible=False)
        quantised = quantize(
            prepared,
            config,
            lambda done, total: progress.update(task, completed=done, total=total, visible=True),
            calibration=calibration,
        )
    console, output = Console(), Path(config.output)
    for line in _summary(quantised, config):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if parity is None:
        return 0
    results = measure_parity(parity)
    print_table(HEAD, headline(results["rows"]), title="parity", console=console)
    for sentence in (*results["notes"], *results["words"]):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"report: {output / PARITY}", highlight=False, soft_wrap=True)
    return 0


def _summary(quantised: Quantised, config: Config) -> list[str]:
    """What was made, in bytes and errors, and which layer lost most."""
    lines = [*_weights_summary(quantised, config)]
    if config.cache == "int8" and config.calibration:
        lines.append("the cache holds int8, of rows whose numbers were brought to like size")
    elif config.cache == "int8":
        lines.append("the cache holds int8; with calibration=[FILES] its rows would lose less")
    elif config.cache != "auto":
        lines.append(f"the cache holds {config.cache}")
    return [*lines, f"in {quantised.seconds:.0f} s: {config.output}"]


def _weights_summary(quantised: Quantised, config: Config) -> list[str]:
    rows, before, after = quantised.rows, quantised.bytes_before, quantised.bytes_after
    if not rows:
        return [f"{before / 1e6:,.1f} MB of weights, in the precision that they had"]
    worst = max(rows, key=lambda row: row["relative_error"])
    mean = sum(row["relative_error"] for row in rows) / len(rows)
    return [
        f"{len(rows)} linear layers in {config.scheme}: {before / 1e6:,.1f} MB of weights became "
        f"{after / 1e6:,.1f} MB ({after / before:.0%})",
        f"relative error of a layer's weight: {mean:.2%} on average, most in {worst['layer']} with "
        f"{worst['relative_error']:.2%}",
    ]
