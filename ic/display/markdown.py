"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(
    heads: Sequence[str], lines: Iterable[Sequence[str]], *, left: int, text: Sequence[str] = ()
) -> list[str]:
    """Lines of a table whose first `left` columns, and those headed as in `text`, are set left, the
    others right.
    """
    sides = ["---" if n < left or head in text else "--:" for n, head in enumerate(heads)]
    return [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(sides)}|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
