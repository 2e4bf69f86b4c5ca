"""What a comparison leaves: a results file, a page of words and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ic.errors import UsageError
from ic.evaluation.comparison.compare import Comparison, Side
from ic.evaluation.comparison.perplexity_picture import draw_change
from ic.evaluation.comparison.perplexity_words import PERPLEXITY_HEADS, perplexity_lines
from ic.evaluation.comparison.picture import draw
from ic.evaluation.comparison.words import HEADS, lines, notes, sentences
from ic.files.atomic_write import replacing, write_json
from ic.files.results import describe_run, read_json
from ic.files.run_folder import ComparisonFolder


def names_of(first: Path, second: Path) -> tuple[str, str]:
    """Short names of two folders: the parts of their paths that differ."""
    sides = [list(path.absolute().parts) for path in (first, second)]
    for end in (0, -1):
        while all(len(side) > 1 for side in sides) and sides[0][end] == sides[1][end]:
            for side in sides:
                del side[end]
    a, b = ("-".join(side) for side in sides)
    return a, b


def check_folder(folder: ComparisonFolder, first: Side, second: Side) -> None:
    """Refuse a folder that holds anything else than an earlier comparison of the same two.

    Raises:
        UsageError: it does.
    """
    if folder.path.is_file():
        raise UsageError(f"output={folder.path}: is a file; give a folder")
    if not folder.path.is_dir() or not any(folder.path.iterdir()):
        return
    try:
        held = read_json(folder.results)
    except json.JSONDecodeError:
        held = {}
    if not held:
        raise UsageError(
            f"output={folder.path}: holds other files than a comparison's; choose an empty folder"
        )
    if held.get("sides") != _sides(first, second):
        raise UsageError(
            f"output={folder.path}: holds another comparison, of {_named(held, 'A')} and "
            f"{_named(held, 'B')}; choose another output="
        )


def write_report(
    comparison: Comparison,
    first: Side,
    second: Side,
    folder: ComparisonFolder,
    config: dict[str, Any],
    names: tuple[str, str],
) -> None:
    """Write the three files, each whole."""
    if comparison.groups:
        draw(comparison, folder.picture, first=names[0], second=names[1])
    if comparison.curves:
        draw_change(comparison.curves, folder.perplexity, first=names[0], second=names[1])
    with replacing(folder.document) as partial:
        partial.write_text(_document(comparison, first, second, names), encoding="utf-8")
    write_json(
        folder.results,
        {
            **describe_run(config, public=True),
            "sides": _sides(first, second),
            "only_first": list(comparison.only_first),
            "only_second": list(comparison.only_second),
            "without_score": comparison.without_score,
            "left_out": dict(comparison.left_out),
            "rows": [
                *(group.columns for group in comparison.groups),
                *(row for curve in comparison.curves for row in curve.columns),
            ],
            "words": sentences(comparison),
        },
    )


def _document(comparison: Comparison, first: Side, second: Side, names: tuple[str, str]) -> str:
    shown = []
    if comparison.groups:
        shown += [_table(HEADS, lines(comparison)), "![scores and differences](comparison.png)"]
    if comparison.curves:
        shown.append(_table(PERPLEXITY_HEADS, perplexity_lines(comparison.curves)))
        shown.append("![perplexity of B against A by position](perplexity.png)")
    legend = "\n".join(
        f"- {name}: {short}, "
        + ", ".join(f"{suite} in `{answers.folder}`" for suite, answers in side.items())
        for name, short, side in (("A", names[0], first), ("B", names[1], second))
    )
    words = "\n".join(f"- {sentence}" for sentence in sentences(comparison))
    title = f"# {names[0]} (A) and {names[1]} (B)"
    return "\n\n".join([title, legend, words, *shown, *notes(comparison)]) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    ruled = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _sides(first: Side, second: Side) -> dict[str, Any]:
    return {
        name: {
            suite: {"folder": _below_here(answers.folder), "model": answers.model}
            for suite, answers in side.items()
        }
        for name, side in (("A", first), ("B", second))
    }


def _below_here(folder: Path) -> str:
    """One spelling of a folder; relative where it can be, so that a report can be published."""
    whole, here = folder.resolve(), Path.cwd().resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def _named(held: Mapping[str, Any], name: str) -> str:
    suites = held.get("sides", {}).get(name, {}).values()
    return " and ".join(suite["folder"] for suite in suites) or "something else"
