"""What the training chart renders, and whether a run ends and goes on as it expects."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ansible.machines import free_ports
from tests.deploy.charts import ROOT, Document, documents, of_kind, one

pytestmark = pytest.mark.chart
MOST_TRIES = 6000  # at 50 ms


def job_of(name: str, *settings: str) -> Document:
    """The spec of a Job, whether JobSet's or its own."""
    found = documents(name, *settings)
    if of_kind(found, "Job"):
        return one(found, "Job")["spec"]
    (node,) = one(found, "JobSet")["spec"]["replicatedJobs"]
    return node["template"]["spec"]


def container(job: Document) -> Document:
    (found,) = job["template"]["spec"]["containers"]
    return found


def job_ends(job: Document, code: int, *, disrupted: bool = False) -> tuple[str, str]:
    """What Kubernetes' Job controller makes of a pod that failed -> reason and message.

    After pkg/controller/job/pod_failure_policy.go, v1.31: the first rule that matches counts.
    """
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        on = rule.get("onExitCodes")
        if on and code in on["values"]:
            assert on["operator"] == "In"
            what = f"Container {on['containerName']} for pod models/demo-0 failed with exit code {code}"
        elif disrupted and rule.get("onPodConditions") == [
            {"type": "DisruptionTarget", "status": "True"}
        ]:
            what = "Pod models/demo-0 has condition DisruptionTarget"
        else:
            continue
        if rule["action"] == "Ignore":
            return "Ignore", ""
        return "PodFailurePolicy", f"{what} matching {rule['action']} rule at index {index}"
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def set_does(code: int, *, disrupted: bool = False) -> str:
    """What JobSet's controller does after a pod failed: the first rule that matches."""
    reason, message = job_ends(job_of("two-nodes"), code, disrupted=disrupted)
    for rule in one(documents("two-nodes"), "JobSet")["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = (
            rule.get(f"onJobFailure{each}", []) for each in ("Reasons", "MessagePatterns")
        )
        if (not reasons or reason in reasons) and (
            not patterns or any(re.search(each, message) for each in patterns)
        ):
            return str(rule["action"])
    return "none"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),  # bad input
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),  # stopped by SIGUSR1, saved
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),  # SIGTERM, saved
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # preempted before it had saved
        (137, False, "RestartJobSet"),  # out of memory
        (1, False, "RestartJobSet"),  # a rank that was lost, a crash
        (12, False, "RestartJobSet"),
        (22, False, "RestartJobSet"),
    ],
)
def test_exit_codes(code: int, disrupted: bool, action: str) -> None:
    assert set_does(code, disrupted=disrupted) == action


def test_a_single_job_requeues_itself() -> None:
    job = job_of("one-node")
    assert job_ends(job, 2)[0] == "PodFailurePolicy"
    for code in (75, 143):
        assert job_ends(job, code)[0] == "Ignore"
    assert job_ends(job, 137, disrupted=True)[0] == "Ignore"
    assert (job["backoffLimit"], job["podReplacementPolicy"]) == (20, "Failed")


def test_every_failure_of_a_node_ends_the_job() -> None:
    job, policy = (
        job_of("two-nodes"),
        one(documents("two-nodes"), "JobSet")["spec"]["failurePolicy"],
    )
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    assert policy["maxRestarts"] == 20
    for rule in policy["rules"]:  # as JobSet's documentation of the field asks
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def variables(job: Document, index: int) -> dict[str, str]:
    """The environment of the pod of an index."""
    found = {}
    for each in container(job)["env"]:
        if "value" in each:
            found[each["name"]] = each["value"]
        else:
            path = each["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            found[each["name"]] = str(index)
    return found


def test_the_ranks_meet_at_a_name_that_there_is() -> None:
    """JobSet names a pod SET-REPLICATEDJOB-JOB-POD and gives it a name in the set's subdomain."""
    found = documents("two-nodes")
    jobset = one(found, "JobSet")
    (node,) = jobset["spec"]["replicatedJobs"]
    first = f"{jobset['metadata']['name']}-{node['name']}-0-0"
    where = variables(job_of("two-nodes"), 0)["MASTER_ADDR"]
    assert where == f"{first}.{jobset['spec']['network']['subdomain']}"
    single = documents("one-node")
    service, job = one(single, "Service"), one(single, "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    where = variables(job["spec"], 0)["MASTER_ADDR"]
    assert where == f"{job['metadata']['name']}-0.{service['metadata']['name']}"


def test_every_rank_is_read() -> None:
    found = documents("two-nodes")
    ports = {
        each["name"]: each["containerPort"] for each in container(job_of("two-nodes"))["ports"]
    }
    read = [each["port"] for each in one(found, "PodMonitor")["spec"]["podMetricsEndpoints"]]
    assert [ports[name] for name in read] == list(range(9400, 9408))
    allowed = one(found, "NetworkPolicy")["spec"]["ingress"][1]["ports"]
    assert [each["port"] for each in allowed] == list(range(9400, 9408))
    assert (
        "callbacks.prometheus={host: '0.0.0.0', port: 9400}"
        in container(job_of("two-nodes"))["args"]
    )


@contextmanager
def pods(folder: Path, job: Document) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each pod, with its command and its environment, on this machine."""
    (port,) = free_ports(1)
    (folder / "runs").mkdir(exist_ok=True)
    found = []
    try:
        for index in range(job["completions"]):
            server = container(job)
            assert "output_dir=/runs" in server["args"]
            args = [each.replace("=/runs", f"={folder / 'runs'}") for each in server["args"]]
            there = variables(job, index)
            here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
            found.append(
                subprocess.Popen(
                    [sys.executable, *server["command"][1:], *args],
                    cwd=folder,
                    env={
                        **os.environ,
                        **there,
                        **here,
                        "HOME": str(folder),
                        "OMP_NUM_THREADS": "1",
                    },
                    stdout=(folder / f"log-{index}").open("a"),
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def reached(run: Path) -> int:
    """The last step in the run's metrics, -1 without one."""
    found = [-1]
    for path in run.rglob("metrics.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        found += [int(row["step"]) for row in rows if (row["step"] or "").isdecimal()]
    return max(found)


def saved(run: Path) -> int:
    """The step of the newest checkpoint, -1 without one."""
    steps = [re.fullmatch(r"step=(\d+)", path.name) for path in run.rglob("step=*")]
    return max((int(step[1]) for step in steps if step), default=-1)


def until_it_trains(
    run: Path, beyond: int, processes: list[subprocess.Popen[str]], folder: Path
) -> None:
    for _ in range(MOST_TRIES):
        for index, process in enumerate(processes):
            assert process.poll() is None, (folder / f"log-{index}").read_text()
        if reached(run) > beyond:
            return
        time.sleep(0.05)
    raise AssertionError((folder / "log-0").read_text())


def test_a_run_of_two_nodes_is_evicted_and_goes_on(tmp_path: Path) -> None:
    """Two pods as two processes; one is told to end, as by a drain, and the set is started again."""
    overrides = [
        "experiment=mla_tiny",
        "data.num_workers=0",
        "trainer.log_every_n_steps=1",
        "trainer.max_time=null",
        "trainer.max_steps=100000",
        "logger.tensorboard=false",
    ]
    listed = ",".join(f'"{each}"' for each in overrides)
    off = "monitoring.podMonitor.enabled=false"
    job = job_of("two-nodes", f"overrides=[{listed}]", "gpusPerNode=0", off)
    run, step = tmp_path / "runs" / "mla_tiny" / "demo", 0
    for evicted in (1, 0):
        with pods(tmp_path, job) as both:
            until_it_trains(run, step, both, tmp_path)
            both[evicted].send_signal(signal.SIGTERM)
            codes = [process.wait() for process in both]
        told = (tmp_path / "log-0").read_text()
        assert codes == [143, 0], told
        assert set_does(codes[0]) == "RestartJobSetAndIgnoreMaxRestarts"
        assert saved(run) > step, told
        step = saved(run)
    assert told.count("loading PyTorch") == 2
    steps = [int(each) for each in re.findall(r"^step (\d+)/", told, re.M)]
    assert steps == sorted(set(steps)), steps  # no step was taken anew
