"""How checks ask: a command, a unit of systemd, an address."""

from __future__ import annotations

import shutil
import subprocess
import urllib.error
import urllib.request

from ic.doctor.check import Finding

TIMEOUT_S = 30
# Addresses of this machine are not asked through a proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; one that is not there or gives no answer in 30 s has failed with that."""
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {TIMEOUT_S} s")
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"no {command[0]} here")


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The first line of what a command said, of its errors if there are any."""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[0] if lines else f"code {done.returncode}"


def unit(name: str) -> dict[str, str] | None:
    """`ActiveState`, `SubState` and `Environment` of a unit of systemd; None if there is none."""
    if shutil.which("systemctl") is None:
        return None
    properties = ("LoadState", "ActiveState", "SubState", "Environment")
    asked = [f"--property={each}" for each in properties]
    done = call("systemctl", "show", name, *asked)
    state = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return state if state.get("LoadState") == "loaded" else None


def get(url: str) -> str:
    """What an address answers.

    Raises:
        OSError: nobody answers there, or not with success.
    """
    with _OPENER.open(url, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode(errors="replace"))


def not_here(what: str, playbook: str) -> Finding:
    """A part that this machine does not have, which is no fault."""
    return Finding(what, "ok", f"not set up here; ansible/{playbook} does it")


def stopped(what: str, name: str, state: dict[str, str], playbook: str) -> Finding | None:
    """A finding if the unit does not run."""
    if state["ActiveState"] == "active":
        return None
    return Finding(
        what,
        "fail",
        f"{name} is {state['ActiveState']} ({state['SubState']})",
        f"journalctl -u {name} says why; ansible/{playbook} starts it",
    )


def exporter(what: str, name: str, url: str, metric: str, playbook: str) -> Finding:
    """Whether an exporter's unit runs and the address offers a metric that it must have."""
    state = unit(name)
    if state is None:
        return not_here(what, playbook)
    if finding := stopped(what, name, state, playbook):
        return finding
    try:
        offered = get(url)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return Finding(
            what,
            "fail",
            f"{name} runs, but {url} does not answer: {reason}",
            f"compare the address with that of the unit; ansible/{playbook} sets it",
        )
    if metric not in offered:
        return Finding(
            what,
            "fail",
            f"{url} offers no {metric}",
            f"journalctl -u {name} says why; ansible/{playbook} sets it up anew",
        )
    return Finding(what, "ok", f"answers at {url}")
