"""Values that cannot be meant are refused in a line, and nothing is rendered."""

from __future__ import annotations

import re

import pytest

from tests.deploy.charts import example, helm

pytestmark = pytest.mark.chart

# (example, values set beside it, what the message says)
SERVING = [
    ("canary", ["versions.canary.weight=10"], "the weights of versions sum to 105 (canary=10, stable=95)"),
    ("canary", ["versions.canary.weight=-5"], "minimum: got -5, want 0"),
    ("canary", ["versions.canary.weight=101"], "maximum: got 101, want 100"),
    ("canary", ["versions.canary.replicas=-1"], "minimum: got -1, want 0"),
    ("canary", ["versions.canary.wieght=5"], "additional properties 'wieght' not allowed"),
    ("canary", ["gatewy={}"], "additional properties 'gatewy' not allowed"),
    ("canary", ['versions.Canary={"source": "x", "weight": 0}'], "does not match pattern"),
    ("canary", ["gateway.parents=[]"], "gateway.parents: name the Gateway"),
    ("canary", ["versions.canary.volume.claim=\"\""], "versions.canary.volume.claim is empty"),
    ("canary", ['versions.canary.source=""'], "versions.canary.source is empty"),
    ("canary", ['versions.canary.source="/models/x"'], "does not match pattern"),
    ("canary", ['versions.canary.source="../x"'], "versions.canary.source=../x leaves the volume"),
    ("canary", ['image.digest="sha256:abc"'], "does not match pattern"),
    ("one-gpu", ['token.secret=""'], "token.secret is empty: the server listens to other machines"),
    ("one-gpu", ['modelName=""'], "modelName is empty"),
    ("one-gpu", ["versions=null"], "versions is empty"),
    ("one-gpu", ["inferencePool.enabled=true"], "inferencePool.enabled=true needs gateway.enabled=true"),
    ("one-gpu", ["defaults.resources.requests.memory=16"], "got number, want string"),
    ("one-gpu", ['defaults.resources.limits.memory="lots"'], "'lots' does not match pattern"),
    ("one-gpu", ['versions.stable.resources={"requests": {"cpu": "-4"}}'], "'-4' does not match pattern"),
    ("one-gpu", ['defaults.sharedMemory="8GB"'], "'8GB' does not match pattern"),
    ("one-gpu", ['defaults.scratch="20 Gi"'], "'20 Gi' does not match pattern"),
    ("cpu-engine", ['versions.stable.volume.download.size=""'], "'' does not match pattern"),
    ("data-parallel", ['defaults.volume.node.size="1ki"'], "'1ki' does not match pattern"),
    ("one-gpu", ["disruptionBudget.maxUnavailable=-1"], "minimum: got -1, want 0"),
    ("one-gpu", ['disruptionBudget.maxUnavailable="half"'], "'half' does not match pattern"),
    ("one-gpu", ['defaults.backend="sglang"'], "value must be one of 'vllm', 'engine'"),
    ("one-gpu", ["defaults.parallel.data=0"], "minimum: got 0, want 1"),
    ("one-gpu", ["defaults.autoscaling.minReplicas=0"], "minReplicas=0 needs scaler keda"),
    ("cpu-engine", ["defaults.parallel.data=2"], "backend engine runs on one GPU"),
    ("cpu-engine", ['versions.stable.vllmArguments=["--seed=1"]'], "vllmArguments are for backend vllm"),
    ("cpu-engine", ['versions.stable.volume.download.sha256=""'], "volume.download needs url and sha256"),
    ("cpu-engine", ['versions.stable.volume.download.sha256="12"'], "does not match pattern"),
    ("cpu-engine", ["versions.stable.autoscaling.minReplicas=9"], "minReplicas=9 is above maxReplicas=6"),
    ("data-parallel", ['defaults.autoscaling.prometheus.address=""'], "autoscaling.prometheus.address is empty"),
    ("data-parallel", ["defaults.autoscaling.cacheUsage=80"], "maximum: got 80, want 1"),
    ("data-parallel", ["defaults.volume.node.names=[]"], "volume.node needs path (absolute) and names"),
    ("scale-to-zero", ['defaults.autoscaling.wake.by="none"'], "nothing would start one"),
    ("scale-to-zero", ['defaults.autoscaling.wake.by="query"'], "autoscaling.wake.query is empty"),
    ("scale-to-zero", ["gateway.hostnames=[]"], "the route leads to the add-on's interceptor"),
    ("scale-to-zero", ["inferencePool.enabled=true"], "choose one"),
    ("inference-pool", ['versions.canary.backend="engine"'], "endpoint picker reads vLLM's metrics"),
]  # fmt: skip
TRAINING = [
    ("one-node", ['volumes.runs.claim=""'], "volumes.runs.claim is empty"),
    ("one-node", ["overrides=[]"], "overrides is empty"),
    ("one-node", ['overrides=["run_id=x"]'], "run_id is given by the chart"),
    ("one-node", ["nodes=2"], "kind=Job with nodes=2: a Job does not start its pods anew together"),
    ("two-nodes", ["nodes=0"], "minimum: got 0, want 1"),
    ("two-nodes", ["maxRestarts=-1"], "minimum: got -1, want 0"),
    ("two-nodes", ['resources.limits.memory="lots"'], "'lots' does not match pattern"),
    ("two-nodes", ['resources.requests={"cpu": "four"}'], "'four' does not match pattern"),
    ("two-nodes", ['sharedMemory="64GB"'], "'64GB' does not match pattern"),
    ("two-nodes", ['scratch="-50Gi"'], "'-50Gi' does not match pattern"),
    ("two-nodes", ["gpus=8"], "additional properties 'gpus' not allowed"),
    ("two-nodes", ['kind="MPIJob"'], "value must be one of 'JobSet', 'Job'"),
]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [*SERVING, *TRAINING],
    ids=[f"{name}-{settings[0]}" for name, settings, _ in [*SERVING, *TRAINING]],
)
def test_refused(name: str, settings: list[str], told: str) -> None:
    path = example(name)
    more = [part for each in settings for part in ("--set-json", each)]
    found = helm("template", "demo", path.parents[1], "-f", path, *more)
    assert found.returncode == 1
    assert found.stdout == ""
    flat = re.sub(r"\s+", " ", found.stderr)
    assert told in flat, found.stderr


@pytest.mark.parametrize(
    "quantity", ["0", "4", "500m", "1.5", "16Gi", "2e9", "1E3", "3P", ".5Ei", "7."]
)
def test_quantities_of_kubernetes_are_taken(quantity: str) -> None:
    for name in ("one-gpu", "two-nodes"):
        path = example(name)
        prefix = "defaults." if name == "one-gpu" else ""
        keys = ("resources.limits.memory", "resources.requests.cpu", "sharedMemory", "scratch")
        more = [part for key in keys for part in ("--set-string", f"{prefix}{key}={quantity}")]
        found = helm("template", "demo", path.parents[1], "-f", path, *more)
        assert found.returncode == 0, found.stderr
        limit = rf'limits:(?:\n +\S+: .*)*?\n +memory: "?{re.escape(quantity)}"?\n'
        assert re.search(limit, found.stdout), found.stdout


def test_nothing_but_the_weights_is_missing_of_a_version() -> None:
    path = example("one-gpu")
    more = ["--set-json", 'versions.other={"source": "x"}']
    found = helm("template", "demo", path.parents[1], "-f", path, *more)
    assert "missing property 'weight'" in found.stderr
