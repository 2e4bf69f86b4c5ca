"""What the training chart renders, and what it makes of our exit codes."""

from __future__ import annotations

import re

import pytest

from tests.deploy.charts import Document, documents, of_kind, one

pytestmark = pytest.mark.chart


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
