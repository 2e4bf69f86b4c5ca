"""What a check of this machine found, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

Status = Literal["ok", "warn", "fail"]
_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: the thing checked.
        status: `ok`; `warn` for what slows or limits; `fail` for what will break a run.
        found: what is there.
        fix: what to do about it; empty if ok.
    """

    what: str
    status: Status
    found: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]


def examine(checks: list[Check]) -> list[Finding]:
    """Run every check; one that itself falls over is a failure, not the end."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            what = check.__name__.replace("_", " ")
            findings.append(
                Finding(what, "fail", f"{type(error).__name__}: {error}", "report this as a bug")
            )
    return findings


def show(findings: list[Finding], *, as_json: bool) -> None:
    """A table, or JSON for a program."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    table = Table(title="doctor")
    for column in ("", "what", "found", "fix"):
        table.add_column(column, overflow="fold")
    for each in findings:
        style = _STYLE[each.status]
        table.add_row(f"[{style}]{each.status}[/]", each.what, each.found, each.fix)
    Console().print(table)
