"""A benchmark's results as a table, a JSON file and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def print_table(run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    ceilings = run["config"]["ceilings"]
    table = Table(
        title=f"{run['device']}: copy {ceilings['copy_tb_per_s']:.2f} TB/s, "
        f"bf16 product {ceilings['matmul_bf16_tflop_per_s']:.0f} TFLOP/s",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    # Within 80 columns: a case takes two lines where it must.
    for heading in ("case", "by", "us", "spread", "% copy", "TFLOP/s", "ours", "error"):
        is_text = heading in ("case", "by")
        table.add_column(
            heading, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
        )
    absent = [row for row in rows if row.get("reason", "").startswith("not installed")]
    if absent:
        names = sorted({row["by"] for row in absent})
        table.caption = f"not installed: {', '.join(names)}"
    failed = []
    for row in rows:
        if row in absent:
            continue
        if "reason" in row:
            failed.append(f"{row['kernel']}, {row['case']}, {row['by']}: {row['reason']}")
            continue
        ratio = row.get("times_ours")
        table.add_row(
            f"{row['kernel']} {row['case']}",
            row["by"],
            f"{row['median_us']:.1f}",
            f"{row['spread_us']:.1f}",
            f"{row['percent_of_copy']:.0f}",
            f"{row['tflop_per_s']:.0f}" if row["tflop_per_s"] else "-",
            f"{ratio:.2f} x" if ratio and row["by"] != "ours" else "",
            f"{row['relative_error']:.1e}",
        )
    console = Console()
    console.print(table)
    for line in failed:
        console.print(line, markup=False, highlight=False)


def markdown_table(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table of docs/kernels.md: one line a case, ours first, then each peer that was timed."""
    timed = [row for row in rows if "median_us" in row]
    peers = list(dict.fromkeys(row["by"] for row in timed if row["by"] != "ours"))
    ceilings = run["config"]["ceilings"]
    lines = [
        f"{run['device']}, PyTorch {run['versions']['torch']}, Triton {run['versions']['triton']}, "
        f"{run['date'][:10]}, commit {run['commit'][:8]}. Ceilings of the same run: copy "
        f"{ceilings['copy_tb_per_s']:.2f} TB/s, bf16 product "
        f"{ceilings['matmul_bf16_tflop_per_s']:.0f} TFLOP/s.",
        "",
        "| (batch, context), heads, latent+rope | ours, us | middle half, us | % of copy | TFLOP/s "
        "| relative error | " + " | ".join(f"{peer}, us" for peer in peers) + " |",
        "|---" * (6 + len(peers)) + "|",
    ]
    for row in (row for row in timed if row["by"] == "ours"):
        others = {other["by"]: other for other in timed if other["case"] == row["case"]}
        cells = [
            row["case"],
            f"{row['median_us']:.1f}",
            f"{row['spread_us']:.1f}",
            f"{row['percent_of_copy']:.0f}",
            f"{row['tflop_per_s']:.0f}" if row["flops"] else "-",
            f"{row['relative_error']:.1e}",
            *(f"{others[peer]['median_us']:.1f}" if peer in others else "-" for peer in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Per case, ours and the peers': how much of the ceiling that binds was reached."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "median_us" in row]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    names = list(dict.fromkeys(row["by"] for row in timed))
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(cases) + 1.6))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        mine = {row["case"]: row["percent_of_ceiling"] for row in timed if row["by"] == name}
        places = [cases.index(case) + (index - len(names) / 2 + 0.5) * height for case in mine]
        axes.barh(places, list(mine.values()), height=height, label=name)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured ceiling (memory or matrix, whichever binds)")
    axes.set_title(run["device"], fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
