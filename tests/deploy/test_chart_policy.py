"""Pods stay within Kubernetes' restricted standard, and beyond it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.charts import EXAMPLES, documents, of_kind, pods
from tests.deploy.restricted import violations

pytestmark = pytest.mark.chart


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_restricted(name: str) -> None:
    found = documents(name)
    assert list(pods(found))
    for owner, pod in pods(found):
        assert list(violations(pod)) == [], owner
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
    for account in of_kind(found, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not of_kind(found, "Secret")
    assert not [each["kind"] for each in found if "Role" in each["kind"]]


def container(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda spec: change(spec["containers"][0])


# What breaks each control of the standard, and how it is told.
BREAKS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
    (lambda spec: spec.update(hostPID=True), "hostPID"),
    (lambda spec: spec["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath"),
    (lambda spec: spec["securityContext"].pop("seccompProfile"), "seccompProfile"),
    (lambda spec: spec["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
    (lambda spec: spec["securityContext"].update(runAsUser=0), "runAsUser 0"),
    (lambda spec: spec["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]), "kernel.msgmax"),
    (lambda spec: spec["securityContext"].update(seLinuxOptions={"type": "spc_t"}), "seLinuxOptions"),
    (lambda spec: spec["securityContext"].update(appArmorProfile={"type": "Unconfined"}), "appArmorProfile"),
    (container(lambda c: c["securityContext"].update(privileged=True)), "privileged"),
    (container(lambda c: c["securityContext"].update(procMount="Unmasked")), "procMount"),
    (container(lambda c: c["securityContext"].pop("allowPrivilegeEscalation")), "allowPrivilegeEscalation"),
    (container(lambda c: c["securityContext"].pop("capabilities")), "not dropped"),
    (container(lambda c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])), "SYS_ADMIN"),
    (container(lambda c: c["securityContext"].update(seccompProfile={"type": "Unconfined"})), "Unconfined"),
    (container(lambda c: c["ports"][0].update(hostPort=80)), "hostPort"),
    (container(lambda c: c["livenessProbe"]["httpGet"].update(host="example.com")), "another host"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), BREAKS, ids=[told for _, told in BREAKS])
def test_a_breach_is_found(change: Callable[[dict[str, Any]], Any], told: str) -> None:
    pod = copy.deepcopy(next(pods(documents("one-gpu")))[1])
    change(pod["spec"])
    assert any(told in each for each in violations(pod))
