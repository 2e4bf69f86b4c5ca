"""Measures cell by cell: each is in the results file at once, and is not measured again."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ic.datamodules.tokenizers import build_tokenizer
from ic.errors import RunFailedError
from ic.files.results import commit, device, read_json, write_results
from ic.inference.loading import Loaded, open_source
from ic.inference.options import InferenceOptions, LoadOptions
from ic.model import MLAForCausalLM
from ic.studies.serving.bounds import Bounds, measure_bounds
from ic.studies.serving.options import ServingBenchmarkOptions
from ic.studies.serving.prompts import Prompts, read_text
from ic.studies.serving.report import draw, print_rows, said
from ic.studies.serving.server_side import ServerSide
from ic.studies.serving.sides import EngineSide, GenerateSide, Side
from ic.studies.serving.timing import summarise

# Options that say which cells are measured, and where they go; others are those of every cell.
_OF_CELLS = ("batches", "contexts", "output")


def benchmark_serving(options: ServingBenchmarkOptions) -> int:
    """Measure every cell that the results file lacks -> 0.

    Raises:
        ValueError: no such model or server, prompts that cannot be made, a results file of other
            options, another machine or another commit, or no cell that fits.
        RunFailedError: the server failed at some cells; the others are measured.
    """
    output = Path(options.output)
    rows = _measured(output, options)
    done = {(row["batch"], row["context_tokens"]) for row in rows}
    cells = [(b, c) for c in options.contexts for b in options.batches if (b, c) not in done]
    console = Console()
    failed: list[str] = []
    if cells:
        side, prompts, bounds = _open(options)
        try:
            for batch, context in cells:
                row: dict[str, Any] = {"batch": batch, "context_tokens": context}
                with console.status(f"{said(row)} tokens, {len(rows)} cells measured"):
                    try:
                        row |= _measure(side, prompts, bounds, options, batch, context)
                    except RunFailedError as error:
                        row["error"] = str(error)
                        failed.append(said(row))
                rows = sorted([*rows, row], key=lambda x: (x["context_tokens"], x["batch"]))
                write_results(output, asdict(options), rows)
                console.print(_line(row), highlight=False, soft_wrap=True)
        finally:
            side.close()
    print_rows(rows, console)
    picture = output.with_suffix(".png")
    draw(rows, picture)
    measured = {(row["batch"], row["context_tokens"]) for row in rows if "error" not in row}
    files = f"{output}, {picture}" if measured else str(output)
    console.print(f"results: {files}", soft_wrap=True, highlight=False)
    if failed:
        raise RunFailedError(
            f"{len(failed)} of {len(cells)} cells failed ({'; '.join(failed)}): see error in "
            f"{output}. The same command measures them again"
        )
    if measured.isdisjoint((b, c) for c in options.contexts for b in options.batches):
        reasons = "; ".join(f"{said(row)}: {row['error']}" for row in rows if "error" in row)
        raise ValueError(f"no cell fits, and none was measured: {reasons}")
    return 0


def _measured(output: Path, options: ServingBenchmarkOptions) -> list[dict[str, Any]]:
    """Rows of the results file, if it is of the same measurement."""
    found = read_json(output)
    rows = [row for row in found["rows"] if "error" not in row] if found else []
    if not rows:
        return []
    here = {"commit": commit(), "device": device()}
    wanted = {k: v for k, v in asdict(options).items() if k not in _OF_CELLS}
    there = {key: found.get(key) for key in here}
    there |= {key: found.get("config", {}).get(key) for key in wanted}
    for key, value in {**here, **wanted}.items():
        if there[key] != value:
            raise ValueError(
                f"{output} was measured with {key}={there[key]}, and this is {key}={value}: give "
                "another output, or delete the file"
            )
    return rows


def _open(options: ServingBenchmarkOptions) -> tuple[Side, Prompts, Bounds | None]:
    if options.url is not None:
        assert options.vocab_size is not None
        text = None
        if options.prompt_file is not None:
            assert options.tokenizer is not None
            text = read_text(options.prompt_file, build_tokenizer(options.tokenizer))
        prompts = Prompts(options, options.vocab_size, text)
        return ServerSide(options), prompts, None
    loaded = _load(options)
    text = None if options.prompt_file is None else read_text(options.prompt_file, loaded.tokenizer)
    rows = loaded.model.config.get_text_config().vocab_size
    vocab_size = min(options.vocab_size or loaded.tokenizer.vocab_size, rows)
    prompts = Prompts(options, vocab_size, text)
    ours = isinstance(loaded.model, MLAForCausalLM)
    bounds = measure_bounds(loaded.model) if ours else None
    if options.loop == "generate":
        return GenerateSide(loaded), prompts, bounds
    return EngineSide(loaded, options.engine), prompts, bounds


def _load(options: ServingBenchmarkOptions) -> Loaded:
    assert options.checkpoint is not None
    shared = {each.name: getattr(options, each.name) for each in fields(LoadOptions)}
    opened = open_source(InferenceOptions(checkpoint=options.checkpoint, **shared))
    if min(options.contexts) > opened.positions:
        raise ValueError(
            f"contexts={options.contexts}: the model has {opened.positions} positions, and none of "
            "them fits; give shorter ones"
        )
    return opened.load()


def _measure(
    side: Side,
    prompts: Prompts,
    bounds: Bounds | None,
    options: ServingBenchmarkOptions,
    batch: int,
    context: int,
) -> dict[str, Any]:
    """The row of a cell, or why there is none."""
    on_gpu = bounds is not None
    repeats = []
    try:
        for repeat in range(-options.warmup, options.repeats):
            if on_gpu and repeat == 0:
                torch.cuda.reset_peak_memory_stats()
            times = side.answer(prompts.draw(batch, context, repeat), options.output_tokens)
            if repeat >= 0:
                repeats.append(times)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    except ValueError as error:  # longer than the cache, the positions or what the server takes
        return {"error": str(error)}
    row = summarise(repeats)
    if bounds is None:
        return row
    rate = row["decode_tokens_per_s"]
    bound = bounds.decode_tokens_per_s(batch, context - options.output_tokens / 2)
    mfu = bounds.prefill_mfu(context - options.output_tokens, row["prefill_tokens_per_s"])
    return row | {
        "copy_tb_per_s": round(bounds.copy_bytes_per_s / 1e12, 3),
        "bound_tokens_per_s": round(bound, 1),
        "share_of_bound": None if rate is None else round(rate / bound, 4),
        "prefill_mfu": None if mfu is None else round(mfu, 4),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _line(row: dict[str, Any]) -> str:
    """What is shown of a cell as soon as it is measured."""
    if "error" in row:
        return f"{said(row)}: not measured: {row['error']}"
    return (
        f"{said(row)}: first token after {row['time_to_first_token_p50_s']:.3g} s, then "
        f"{1e3 * row['time_per_output_token_p50_s']:.3g} ms per token (medians)"
    )
