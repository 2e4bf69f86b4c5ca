"""`python -m ic doctor`, or some of its checks, on a machine of the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.ansible.lab import ROOT
from tests.ansible.machines import Machine

CHECKS = """
import importlib, json, sys
from dataclasses import asdict
from ic.doctor.check import examine
checks = []
for name in sys.argv[1:]:
    module, function = name.split(".")
    checks.append(getattr(importlib.import_module(f"ic.doctor.{module}"), function))
print(json.dumps([asdict(finding) for finding in examine(checks)]))
"""


def shared_python() -> dict[Path, str]:
    """What a machine must see of this host, so that the Python of the tests runs there."""
    folders = {Path(sys.base_prefix), Path(sys.prefix), ROOT}
    folders |= {Path(entry) for entry in sys.path if Path(entry).is_dir()}
    inner = {folder for folder in folders if any(other in folder.parents for other in folders)}
    kept = [folder for folder in folders - inner if folder != Path("/usr")]
    return dict.fromkeys(sorted(kept), "ro")


def examined(machine: Machine, *checks: str) -> dict[str, dict[str, Any]]:
    """Findings by what they are about.

    Args:
        checks: as "monitoring.monitoring"; none for the whole verb.
    """
    python = ("env", "-C", str(ROOT), "PYTHONDONTWRITEBYTECODE=1", sys.executable)
    if checks:
        said = machine.call(*python, "-c", CHECKS, *checks)
    else:
        options = ("json=true", "output_dir=/root/runs")
        said = machine.call(*python, "-m", "ic", "doctor", *options, check=False)
    findings = json.loads(said[said.index("[") :])
    return {finding["what"]: finding for finding in findings}
