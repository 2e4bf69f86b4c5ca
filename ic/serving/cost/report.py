"""What `cost` prints and writes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from ic.display.figure import new_figure, save_png
from ic.display.numbers import percent, tokens
from ic.display.table import print_table
from ic.errors import UsageError
from ic.files.atomic_write import write_json
from ic.files.results import commit
from ic.serving.cost.figures import Row, cheapest, cheapest_training, cost_rows
from ic.serving.cost.measured import read_rates
from ic.serving.cost.options import CostOptions

_KINDS = ("prefill", "decode", "answer")
# Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def report(options: CostOptions) -> int:
    """Compute, print and write -> 0.

    Raises:
        UsageError: no offer has a measurement on its GPU, or none meets the targets.
    """
    serving, training = read_rates(options.results, options.model_name)
    rows = cost_rows(options, serving, training)
    priced = [row for row in rows if "refused" not in row]
    if not priced:
        reasons = "; ".join(dict.fromkeys(f"{row['offer']}: {row['refused']}" for row in rows))
        raise UsageError(f"no offer can be priced: {reasons}")
    console = Console()
    least = options.context_tokens or 0
    _print([row for row in rows if row.get("context_tokens", 0) >= least], console)
    best, best_training = cheapest(rows, options), cheapest_training(rows, options)
    for sentence in _sentences(rows, best, best_training, options):
        console.print(sentence, highlight=False)
    output = Path(options.output)
    write_json(
        output,
        {
            "command": "python -m ic " + shlex.join(sys.argv[1:]),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": asdict(options),
            "cheapest_serving": best,
            "cheapest_training": best_training,
            "rows": rows,
        },
    )
    picture = output.with_suffix(".png")
    draw(priced, picture)
    console.print(f"results: {output}, {picture}", highlight=False, soft_wrap=True)
    if best is None and any(row["what"] == "serving" for row in priced):
        raise UsageError("no measured cell meets the targets; the tables show what was measured")
    return 0


def _print(rows: Sequence[Row], console: Console) -> None:
    served = [row for row in rows if row["what"] == "serving" and "refused" not in row]
    if served:
        heads = ["offer", "context", "batch", "prefill $/M", "decode $/M", "answer $/M"]
        heads += ["first token p95", "per token p95", "measured in"]
        lines = [
            [
                row["offer"],
                tokens(row["context_tokens"]),
                str(row["batch"]),
                *(dollars(row[f"{kind}_dollars_per_million"]) for kind in _KINDS),
                f"{row['first_token_p95_s']:.3g} s",
                f"{1e3 * row['per_token_p95_s']:.3g} ms",
                Path(row["file"]).name,
            ]
            for row in served
        ]
        print_table(
            heads, lines, title="dollars per million tokens served", fixed=3, console=console
        )
    trained = [row for row in rows if row["what"] == "training" and "refused" not in row]
    if trained:
        heads = ["offer", "model", "context", "GPUs", "$/M", "run $", "run h", "loss", "save every"]
        heads += ["measured in"]
        lines = [
            [
                row["offer"],
                row["model"],
                tokens(row["context_tokens"]),
                str(row["gpus"]),
                dollars(row["dollars_per_million"]),
                dollars(row.get("run_dollars")),
                "-" if "run_hours" not in row else f"{row['run_hours']:,.3g}",
                percent(row.get("loss_share"), 1),
                _minutes(row.get("best_checkpoint_every_s")),
                Path(row["file"]).name,
            ]
            for row in trained
        ]
        title = "dollars per million tokens trained"
        print_table(heads, lines, title=title, fixed=2, console=console)


def _sentences(
    rows: Sequence[Row], best: Row | None, best_training: Sequence[Row], options: CostOptions
) -> list[str]:
    said = []
    if best is not None:
        price = best[f"{options.by}_dollars_per_million"]
        said.append(
            f"Cheapest that meets the targets: {best['offer']}, {_at_once(best['batch'])} at "
            f"{tokens(best['context_tokens'])} tokens: {dollars(price)} per million tokens "
            f"({options.by}), measured in {best['file']}."
        )
    for row in best_training:
        run = row.get("run_dollars")
        gpus = "1 GPU" if row["gpus"] == 1 else f"{row['gpus']} GPUs"
        said.append(
            f"Cheapest training of {row['model']}: {row['offer']}, {gpus} at "
            f"{tokens(row['context_tokens'])} tokens: {dollars(row['dollars_per_million'])} per "
            "million tokens"
            + ("" if run is None else f", {dollars(run)} for the run")
            + f", measured in {row['file']}."
        )
    refused: dict[str, list[str]] = {}
    for row in rows:
        if "refused" in row:
            refused.setdefault(row["refused"], []).append(row["offer"])
    said += [
        f"Without a price: {', '.join(dict.fromkeys(offers))}: {why}."
        for why, offers in refused.items()
    ]
    said += [
        f"{name}: {offer.dollars_per_hour:g} dollars per hour ({offer.source})."
        for name, offer in options.cost.offers.items()
    ]
    return said


def _at_once(batch: int) -> str:
    return "1 request" if batch == 1 else f"{batch} requests at once"


def dollars(value: float | None) -> str:
    """`$0.0257`: three figures, and cents from a dollar on."""
    if value is None:
        return "-"
    return f"${value:,.2f}" if value >= 1 else f"${value:.3g}"


def _minutes(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.3g} min"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Dollars per million tokens over the context: served on the left, trained on the right."""
    offers = list(dict.fromkeys(row["offer"] for row in rows))
    figure = new_figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    for axes, what, key, title in (
        (left, "serving", "answer_dollars_per_million", "served: answers with their prompts"),
        (right, "training", "dollars_per_million", "trained"),
    ):
        contexts: set[int] = set()
        for offer, colour in zip(offers, _COLOURS * len(offers), strict=False):
            cheapest_at: dict[int, Any] = {}
            for row in rows:
                if (row["what"], row["offer"]) == (what, offer) and row[key] is not None:
                    context = row["context_tokens"]
                    cheapest_at[context] = min(row[key], cheapest_at.get(context, row[key]))
            if cheapest_at:
                points = sorted(cheapest_at.items())
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=offer)
                contexts |= cheapest_at.keys()
        axes.set_title(title)
        axes.set_xlabel("tokens of context")
        if contexts:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted(contexts)
            axes.set_xticks(ticks, [tokens(each) for each in ticks], rotation=60, fontsize=7)
            axes.minorticks_off()
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    left.set_ylabel("dollars per million tokens, cheapest measured")
    save_png(figure, path, dpi=120)
