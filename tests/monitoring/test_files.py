"""Every alert is tested and has its page; every panel can be read; every metric is one that is told."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from ic.callbacks.prometheus_metrics import OF_THE_RANK, OF_THE_RUN
from ic.inference.engine.stats import EngineStats
from ic.serving.metrics import Metrics
from tests.monitoring.files import (
    ALERTS,
    DASHBOARDS,
    MONITORING,
    ROOT,
    RULES,
    TESTS,
    expressions,
    load,
    panels,
    rules,
)

ENGINE = re.compile(r"\(ic\|vllm\):(\w+)")


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_tested_and_has_a_page(name: str) -> None:
    cases = [
        case
        for path in TESTS
        for test in load(path)["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert any(case["exp_alerts"] for case in cases), "no case fires"
    assert any(not case["exp_alerts"] for case in cases), "no case keeps quiet"

    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    page = (ROOT / "docs" / "runbooks" / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    assert f"| {alert['labels']['severity']} | `deploy/monitoring/rules/" in page
    assert page.index("\n## Look\n") < page.index("\n## Do\n")
    listed = f"| [{name}](runbooks/{name}.md) | {alert['labels']['severity']} |"
    assert listed in (ROOT / "docs" / "monitoring.md").read_text()


def test_no_page_and_no_test_is_of_an_alert_that_is_gone() -> None:
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} == set(ALERTS)
    tested = {
        case["alertname"]
        for path in TESTS
        for test in load(path)["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == set(ALERTS)
    assert [path.name for path in RULES] == [path.name for path in TESTS]


def test_every_metric_is_one_that_somebody_tells() -> None:
    text = Metrics(lambda: EngineStats(0, 0, 1, 0, 0, 0, 0, 0, 0), "m").text().decode()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    names_of_engine: set[str] = set()
    for expression in expressions():
        ours = set(re.findall(r"\bic_train_\w+", expression))
        assert ours <= {*OF_THE_RUN, *OF_THE_RANK, "ic_train_info"}, expression
        assert set(re.findall(r"\b(?:training|serving):\w+", expression)) <= recorded
        names_of_engine |= set(ENGINE.findall(expression))
    assert len(names_of_engine) > 10
    for name in names_of_engine:
        told = re.search(rf"^# TYPE ic:{name.removesuffix('_bucket')} ", text, re.M)
        assert told, name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_can_be_read(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["title"].startswith("InfiniteContext: ")
    assert board["description"]
    shown = [panel for name, panel in panels() if name == path.stem]
    assert len(shown) >= 15
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({(p["title"], p["type"]) for p in shown}) == len(shown)
    for panel in shown:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        legends = [each["legendFormat"] for each in panel["targets"]]
        assert all(legends), panel["title"]
        assert len(set(legends)) == len(legends), panel["title"]
    # Nothing covers anything else, and no row of panels is wider than the page.
    boxes = [panel["gridPos"] for panel in board["panels"]]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    for one, other in pairwise(sorted(boxes, key=lambda box: (box["y"], box["x"]))):
        assert other["y"] >= one["y"] + one["h"] or other["x"] >= one["x"] + one["w"]


@pytest.mark.monitoring
@pytest.mark.parametrize(
    "command",
    [
        ["promtool", "check", "config", "prometheus.yml"],
        ["promtool", "check", "rules", "--lint-fatal", *map(str, RULES)],
        ["promtool", "test", "rules", *map(str, TESTS)],
        ["amtool", "check-config", "alertmanager.yml"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_the_tools_accept_the_files(command: list[str], programs: None) -> None:
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_all_who_scrape_servers_name_vllm_s_metrics_alike() -> None:
    """On a machine, in compose.yaml and in Kubernetes: rules and dashboards know one name."""
    (wanted,) = renamed(MONITORING / "prometheus.yml")
    assert wanted["source_labels"] == ["__name__"]
    assert re.fullmatch(wanted["regex"], "vllm_num_requests_waiting")
    assert renamed(ROOT / "deploy/docker/prometheus.yml") == [wanted]
    template = ROOT / "deploy/kubernetes/infinite-context/templates/monitoring.yaml"
    (block,) = re.findall(
        r"^      metricRelabelings:\n((?:        .*\n)+)", template.read_text(), re.M
    )
    spelled = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    (chart,) = yaml.safe_load(block)
    assert {spelled.get(key, key): value for key, value in chart.items()} == wanted


def renamed(path: Path) -> list[dict[str, Any]]:
    """What a Prometheus does to the metrics of its job `serving`."""
    (job,) = [job for job in load(path)["scrape_configs"] if job["job_name"] == "serving"]
    found: list[dict[str, Any]] = job["metric_relabel_configs"]
    return found


@pytest.mark.monitoring
@pytest.mark.parametrize("name", ALERTS)
def test_the_rules_tests_can_fail(name: str, programs: None, tmp_path: Path) -> None:
    """An alert that never fires, and one that always does, are both noticed."""
    [rules_file] = [path for path in RULES if f"alert: {name}\n" in path.read_text()]
    tests_file = MONITORING / "tests" / rules_file.name
    for path in (rules_file, tests_file):
        (tmp_path / path.parent.name).mkdir()
        (tmp_path / path.parent.name / path.name).write_text(path.read_text())
    for broken in ("vector(0) > 1", "vector(1)"):
        content = load(rules_file)
        for group in content["groups"]:
            for rule in group["rules"]:
                if rule.get("alert") == name:
                    rule["expr"] = broken
        (tmp_path / "rules" / rules_file.name).write_text(json.dumps(content))
        done = subprocess.run(
            ["promtool", "test", "rules", str(tmp_path / "tests" / tests_file.name)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, broken
        assert f"alertname: {name}, " in done.stdout + done.stderr
