"""What deploy/monitoring holds, read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yml"))
TESTS = sorted((MONITORING / "tests").glob("*.yml"))
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules() -> list[dict[str, Any]]:
    """Alerts and recordings."""
    return [rule for path in RULES for group in load(path)["groups"] for rule in group["rules"]]


ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in rules() if "alert" in rule}


@dataclass(frozen=True)
class Query:
    """One line of a panel."""

    dashboard: str
    panel: str
    expr: str
    legend: str
    instant: bool


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Of all dashboards, without the rows that part them."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def queries() -> list[Query]:
    return [
        Query(name, panel["title"], each["expr"], each["legendFormat"], each["instant"])
        for name, panel in panels()
        for each in panel["targets"]
    ]


def expressions() -> list[str]:
    """Whatever is asked of Prometheus, by a rule, a panel or a dashboard's variable."""
    variables = [
        variable["query"]["query"]
        for path in DASHBOARDS
        for variable in json.loads(path.read_text())["templating"]["list"]
        if variable["type"] == "query"
    ]
    return [rule["expr"] for rule in rules()] + [each.expr for each in queries()] + variables
