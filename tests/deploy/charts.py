"""Renders our charts with the Helm of .venv-infra."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / os.environ.get("INFRA", ".venv-infra") / "bin"
KUBERNETES = ROOT / "deploy" / "kubernetes"
SERVING = KUBERNETES / "infinite-context"
TRAINING = KUBERNETES / "infinite-context-training"
EXAMPLES = sorted(
    path for chart in (SERVING, TRAINING) for path in (chart / "examples").glob("*.yaml")
)
Document = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(INFRA / "helm"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@cache
def rendered(example: Path, *settings: str) -> str:
    """The manifests of an example, with further values (`key=value`, as of --set-json)."""
    more = [part for each in settings for part in ("--set-json", each)]
    found = helm(
        "template", "demo", example.parents[1], "--namespace", "models", "-f", example, *more
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def example(name: str) -> Path:
    return next(path for path in EXAMPLES if path.stem == name)


def documents(name: str, *settings: str) -> list[Document]:
    return [each for each in yaml.safe_load_all(rendered(example(name), *settings)) if each]


def of_kind(found: list[Document], kind: str) -> list[Document]:
    return [each for each in found if each["kind"] == kind]


def one(found: list[Document], kind: str, name: str | None = None) -> Document:
    """The only object of a kind, or the one of a name."""
    matching = [
        each for each in of_kind(found, kind) if name is None or each["metadata"]["name"] == name
    ]
    assert len(matching) == 1, [each["metadata"]["name"] for each in of_kind(found, kind)]
    return matching[0]


def pods(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod that some object makes, with the object's name."""
    for each in found:
        name = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in ("Deployment", "Job"):
            yield name, each["spec"]["template"]
        elif each["kind"] == "JobSet":
            for job in each["spec"]["replicatedJobs"]:
                yield name, job["template"]["spec"]["template"]
