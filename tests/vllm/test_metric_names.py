"""The rules and dashboards ask for metrics that this vLLM has."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.monitoring.files import expressions

pytestmark = pytest.mark.vllm


def test_every_name_that_is_asked_for_is_in_its_source() -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    told = set(re.findall(r'name="vllm:(\w+)"', source))
    asked = {name for each in expressions() for name in re.findall(r"\(ic\|vllm\):(\w+)", each)}
    assert len(asked) > 10
    # prometheus_client appends these to counters and histograms.
    assert {re.sub(r"_(total|bucket)$", "", name) for name in asked} <= told
    # By these labels dashboards, rules and scalers find an engine.
    assert 'labelnames = ["model_name", "engine"]' in source
