"""Every example is accepted by Helm, by Kubernetes 1.29 to 1.35 and by the schemas of the others."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.charts import (
    EXAMPLES,
    INFRA,
    ROOT,
    SERVING,
    TRAINING,
    documents,
    example,
    helm,
    one,
    rendered,
)

pytestmark = pytest.mark.chart
VALIDATE = Path(__file__).with_name("validate.py")


def validate(*files: Path, crds: str | None = None) -> subprocess.CompletedProcess[str]:
    where = ["--crds", crds] if crds else []
    command = [INFRA / "python", VALIDATE, *where, *files]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_lint(path: Path) -> None:
    found = helm("lint", "--strict", path.parents[1], "-f", path)
    assert found.returncode == 0, found.stdout


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("manifests")
    for path in EXAMPLES:
        (folder / path.name).write_text(rendered(path))
    return sorted(folder.iterdir())


def test_every_object_is_valid(manifests: list[Path]) -> None:
    found = validate(*manifests)
    assert found.returncode == 0, found.stdout + found.stderr
    last = found.stdout.splitlines()[-1]
    assert last.endswith(", 0 faults")
    assert int(last.split()[0]) > 60


def test_with_the_definitions_themselves(manifests: list[Path]) -> None:
    crds = os.environ.get("CRDS")
    if not crds:
        pytest.skip("CRDS names no folder of CustomResourceDefinitions")
    found = validate(*manifests, crds=crds)
    assert found.returncode == 0, found.stdout + found.stderr


# (example, what stands in its manifests, what is put in its place, what is found)
FAULTS = [
    ("one-gpu", "readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true", "readOnlyRootFileSystem"),
    ("one-gpu", "maxSurge: 0", "maxSurge: [0]", "maxSurge"),
    ("one-gpu", "targetLabel: version", "targetLabels: version", "targetLabels"),
    ("canary", "weight: 95", "weight: -95", "-95 is less than the minimum"),
    ("canary", "backendRefs:", "backends:", "backends"),
    ("inference-pool", "number: 8000", "number: 80000", "80000 is greater than the maximum"),
    ("scale-to-zero", "maxReplicaCount: 4", "maxReplicas: 4", "maxReplicas"),
    ("scale-to-zero", 'threshold: "32"', "threshold: 32", "32 is not of type 'string'"),
    ("scale-to-zero", "readiness: 900s", "readyness: 900s", "readyness"),
    ("two-nodes", "onJobFailureReasons:", "onFailureReasons:", "onFailureReasons"),
    ("two-nodes", "podFailurePolicy:", "podFailurePolicies:", "Kubernetes 1.29"),
    ("two-nodes", "podMetricsEndpoints:", "endpoints:", "endpoints"),
]  # fmt: skip


def test_a_fault_is_found(tmp_path: Path) -> None:
    files = []
    for index, (name, right, wrong, _) in enumerate(FAULTS):
        objects = rendered(example(name)).split("\n---\n")
        wanted = next(each for each in objects if right in each)
        files.append(tmp_path / f"{index}.yaml")
        files[-1].write_text(wanted.replace(right, wrong, 1))
    found = validate(*files)
    assert found.returncode == 1
    for index, (_, _, wrong, told) in enumerate(FAULTS):
        lines = [line for line in found.stdout.splitlines() if line.startswith(f"{index}.yaml:")]
        assert any(told in line for line in lines), (wrong, lines)


@pytest.mark.parametrize("chart", [SERVING, TRAINING], ids=lambda path: path.name)
def test_a_package_is_whole(chart: Path, tmp_path: Path) -> None:
    """What `helm package` makes renders the same as the folder: its links are followed."""
    found = helm("package", chart, "--destination", tmp_path)
    assert found.returncode == 0, found.stderr
    archive = next(tmp_path.glob("*.tgz"))
    path = next(each for each in EXAMPLES if each.parents[1] == chart)
    packed = helm("template", "demo", archive, "--namespace", "models", "-f", path)
    assert packed.stdout == rendered(path)


def test_rules_and_dashboards_are_those_of_deploy_monitoring() -> None:
    found = documents("one-gpu")
    monitoring = ROOT / "deploy" / "monitoring"
    rules = {path.stem: yaml.safe_load(path.read_text()) for path in monitoring.glob("rules/*.yml")}
    assert len(rules) >= 2
    for name, content in rules.items():
        assert one(found, "PrometheusRule", f"demo-infinite-context-{name}")["spec"] == content
    dashboards = {path.stem: path.read_text() for path in monitoring.glob("dashboards/*.json")}
    assert len(dashboards) >= 2
    for name, text in dashboards.items():
        config = one(found, "ConfigMap", f"demo-infinite-context-dashboard-{name}")
        assert json.loads(config["data"][f"{name}.json"]) == json.loads(text)
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
