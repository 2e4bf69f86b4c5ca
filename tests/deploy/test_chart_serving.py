"""What the serving chart renders, and whether our real server answers it as it says."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ansible.machines import free_ports
from tests.deploy.charts import ROOT, Document, documents, of_kind, one
from tests.serving.served import save_model

pytestmark = pytest.mark.chart
TOKEN = "0123456789abcdef0123456789abcdef"


def container(document: Document) -> Document:
    (found,) = document["spec"]["template"]["spec"]["containers"]
    return found


def test_a_deployment_for_each_version() -> None:
    found = documents("canary")
    names = {"demo-infinite-context-canary", "demo-infinite-context-stable"}
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        assert {each["metadata"]["name"] for each in of_kind(found, kind)} == names
    (rule,) = one(found, "HTTPRoute")["spec"]["rules"]
    assert {each["name"]: each["weight"] for each in rule["backendRefs"]} == {
        "demo-infinite-context-canary": 5,
        "demo-infinite-context-stable": 95,
    }
    assert {each["port"] for each in rule["backendRefs"]} == {8000}
    stable = one(found, "Deployment", "demo-infinite-context-stable")
    canary = one(found, "Deployment", "demo-infinite-context-canary")
    assert (stable["spec"]["replicas"], canary["spec"]["replicas"]) == (3, 1)
    assert "source=/models/mla_1b_healed" in container(canary)["args"]
    # Clients ask for one name, whichever version answers.
    assert [each for each in container(stable)["args"] if each.startswith("model_name=")] == [
        each for each in container(canary)["args"] if each.startswith("model_name=")
    ]
    for document in (stable, canary):
        labels = document["spec"]["template"]["metadata"]["labels"]
        chosen = document["spec"]["selector"]["matchLabels"]
        assert chosen.items() <= labels.items()
        other = (canary if document is stable else stable)["spec"]["selector"]["matchLabels"]
        assert not other.items() <= labels.items()


def test_pools_are_what_the_route_leads_to() -> None:
    found = documents("inference-pool")
    (rule,) = one(found, "HTTPRoute")["spec"]["rules"]
    for backend in rule["backendRefs"]:
        assert (backend["group"], backend["kind"]) == (
            "inference.networking.k8s.io",
            "InferencePool",
        )
        pool = one(found, "InferencePool", backend["name"])
        assert pool["spec"]["endpointPickerRef"]["name"] == f"{backend['name']}-epp"
        version = backend["name"].removeprefix("demo-")
        pods = one(found, "Deployment", f"demo-infinite-context-{version}")["spec"]["template"]
        assert pool["spec"]["selector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()


def test_data_parallel_ranks_have_their_gpus() -> None:
    deployment = one(documents("data-parallel"), "Deployment")
    assert "replicas" not in deployment["spec"]  # KEDA's
    server = container(deployment)
    for kind in ("requests", "limits"):
        assert server["resources"][kind]["nvidia.com/gpu"] == "4"
    assert "vllm_arguments=['--data-parallel-size=2','--tensor-parallel-size=2']" in server["args"]
    (volume,) = of_kind(documents("data-parallel"), "PersistentVolume")
    assert volume["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert volume["spec"]["local"] == {"path": "/srv/models"}
    claim = one(documents("data-parallel"), "PersistentVolumeClaim")
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"] == {"namespace": "models", "name": claim["metadata"]["name"]}


def test_vllm_takes_the_arguments_as_they_are_quoted(tmp_path: Path) -> None:
    """`serve dry_run=true` shows vLLM's command, after Hydra has read our list."""
    settings = (
        'defaults.vllmArguments=["--max-model-len","8192","--hf-overrides={\\"a\\": [1, 2]}"]'
    )
    server = container(one(documents("data-parallel", settings), "Deployment"))
    folder = save_model(tmp_path / "mla_1b")
    (tmp_path / "token").write_text(TOKEN)
    args = [
        each.replace("/models/mla_1b", str(folder)).replace(
            "/run/secrets/infinite-context/token", str(tmp_path / "token")
        )
        for each in server["args"]
    ]
    command = [sys.executable, *server["command"][1:], *args, "dry_run=true"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split(" --max-model-len ")[1] == "8192 '--hf-overrides={\"a\": [1, 2]}'\n"
    assert "--host=0.0.0.0 --port=8000" in shown.stdout
    assert "--data-parallel-size=2 --tensor-parallel-size=2" in shown.stdout


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "IC_SERVE_TOKEN"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def started(folder: Path, server: Document) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The container's own command, on a model and a port of this machine."""
    save_model(folder / "mla_tiny")
    (folder / "token").write_text(f"{TOKEN}\n")
    # Not one that connections take: who asks again and again would be connected to himself.
    (port,) = free_ports(1)
    here = {
        "/models": str(folder),
        "/run/secrets/infinite-context/token": str(folder / "token"),
        "port=8000": f"port={port}",
    }
    args = server["args"]
    for there, local in here.items():
        assert any(there in each for each in args)
        args = [each.replace(there, local) for each in args]
    variables = {each["name"]: each["value"] for each in server["env"] if each["name"] != "HOME"}
    process = subprocess.Popen(
        [sys.executable, *server["command"][1:], *args],
        cwd=folder,
        env={**environment(), **variables, "OMP_NUM_THREADS": "1"},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def asked(port: int, path: str, token: str | None = None, timeout_s: float = 300) -> int:
    """The status of a GET as the kubelet sends it: to the address, with its name and no token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    headers = {"Host": f"10.1.2.3:{port}", "User-Agent": "kube-probe/1.35"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_probes_ask_what_our_server_answers(tmp_path: Path) -> None:
    settings = 'versions.stable.arguments=["engine.cache_tokens=4096"]'
    server = container(one(documents("cpu-engine", settings), "Deployment"))
    paths = {
        server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {"/health"}
    assert server["startupProbe"]["httpGet"]["port"] == server["ports"][0]["name"]
    assert f"port={server['ports'][0]['containerPort']}" in server["args"]
    with started(tmp_path, server) as (process, port):
        # As soon as a connection is taken: it waits for the model, and so does the probe.
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                status = asked(port, "/health")
                break
            except ConnectionRefusedError:
                continue
        assert status == 200
        assert "serving mla_tiny at" in (tmp_path / "log").read_text()
        # Prometheus sends the token of the secret, and gets nothing without it.
        assert asked(port, "/metrics") == 401
        assert asked(port, "/metrics", TOKEN) == 200
        readiness_while_it_ends(process, port)


def readiness_while_it_ends(process: subprocess.Popen[str], port: int) -> None:
    """With an answer in work, the server ends slowly; a gateway learns of it at once."""
    body = b'{"prompt": "a", "max_tokens": 400, "ignore_eos": true, "stream": true}'
    stream = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    stream.request("POST", "/v1/completions", body, headers)
    answer = stream.getresponse()
    assert answer.status == 200
    answer.readline()
    process.send_signal(signal.SIGTERM)
    rest: list[bytes] = []
    reader = threading.Thread(target=lambda: rest.append(answer.read()))
    reader.start()
    statuses = []
    while process.poll() is None:
        try:
            statuses.append(asked(port, "/health"))
        except OSError:
            break
    reader.join()
    assert process.wait() == 0
    assert rest[0].rstrip().endswith(b"data: [DONE]")
    assert 503 in statuses
    assert statuses == sorted(statuses)  # 503 stays


def test_a_pod_has_time_to_end() -> None:
    server = one(documents("cpu-engine"), "Deployment")["spec"]["template"]["spec"]
    (found,) = server["containers"]
    sleep = int(found["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = next(int(each.partition("=")[2]) for each in found["args"] if "drain_s" in each)
    assert server["terminationGracePeriodSeconds"] >= sleep + drain + 10
    assert drain == 60
