"""The restricted standard for pods, as Kubernetes states it.

https://kubernetes.io/docs/concepts/security/pod-security-standards, with all controls of the
baseline, on which it builds. Linux only: our pods name no other system.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret", "image",
}  # fmt: skip
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SECCOMP = {"RuntimeDefault", "Localhost"}


def violations(pod: dict[str, Any]) -> Iterator[str]:
    """What a namespace with `pod-security.kubernetes.io/enforce: restricted` would refuse.

    Args:
        pod: a pod's template, with metadata and spec.
    """
    spec = pod["spec"]
    whole = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"spec.{name}"
    for volume in spec.get("volumes", []):
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']}: {', '.join(kinds)}"
    for sysctl in whole.get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    if any(key.startswith("container.apparmor") for key in pod["metadata"].get("annotations", {})):
        yield "AppArmor by annotation"
    yield from _options("pod", whole)
    containers = ("initContainers", "containers", "ephemeralContainers")
    for container in (each for key in containers for each in spec.get(key, [])):
        yield from _container(container, whole)


def _options(where: str, context: dict[str, Any]) -> Iterator[str]:
    """Of a pod's or a container's security context."""
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type", "") not in SELINUX or selinux.get("user") or selinux.get("role"):
        yield f"{where}: seLinuxOptions"
    if context.get("appArmorProfile", {"type": "RuntimeDefault"})["type"] not in SECCOMP:
        yield f"{where}: appArmorProfile"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield f"{where}: hostProcess"
    if context.get("runAsUser") == 0:
        yield f"{where}: runAsUser 0"


def _container(container: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    where, context = container["name"], container.get("securityContext", {})
    yield from _options(where, context)
    if context.get("privileged"):
        yield f"{where}: privileged"
    if context.get("procMount", "Default") != "Default":
        yield f"{where}: procMount"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield f"{where}: hostPort"
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(probe, {}).get("httpGet", {}).get("host"):
            yield f"{where}: {probe} at another host"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: allowPrivilegeEscalation"
    if not context.get("runAsNonRoot", whole.get("runAsNonRoot")):
        yield f"{where}: runAsNonRoot"
    seccomp = context.get("seccompProfile", whole.get("seccompProfile", {})).get("type")
    if seccomp not in SECCOMP:
        yield f"{where}: seccompProfile {seccomp}"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield f"{where}: capabilities are not dropped"
    if added := set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{where}: capabilities {', '.join(sorted(added))}"
