"""What a playbook cannot do it refuses with one message, before it has changed any machine."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.ansible.lab import ANSIBLE, Lab, Play
from tests.ansible.machines import Machine

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
PLAYBOOKS = sorted(path.name for path in ANSIBLE.glob("*.yml"))
# By playbook, the groups that it needs, and one where a further machine may be.
GROUPS = {
    "setup_docker.yml": ["docker_hosts"],
    "setup_k3s.yml": ["k3s_server"],
    "setup_monitoring.yml": ["monitoring"],
    "setup_nvidia_drivers.yml": ["gpu_nodes"],
    "setup_slurm.yml": ["slurm_controller", "slurm_accounting", "slurm_compute"],
    "site.yml": ["monitoring"],
}
FURTHER = {"setup_k3s.yml": "k3s_agents", "setup_slurm.yml": "slurm_compute"}
SECRETS = {
    "vault_slurm_munge_key": "bXVuZ2U=" * 20,
    "vault_slurm_database_password": "a_password_of_slurmdbd",
    "vault_k3s_token": "a token that is long enough",
    "vault_monitoring_grafana_password": "a password of Grafana",
}


class Gone:
    """A machine that nobody has: an address on which nothing listens."""

    def __init__(self, like: Machine) -> None:
        self.name = "gone"
        self.address = re.sub(r"\.\d+$", ".254", like.address)


def groups_of(playbook: str, first: Machine, *further: Machine) -> dict[str, list[Machine]]:
    groups = {group: [first] for group in GROUPS[playbook]}
    groups.setdefault(FURTHER.get(playbook, GROUPS[playbook][0]), []).extend(further)
    return groups


@pytest.fixture(scope="module")
def machine(lab: Lab) -> Iterator[Machine]:
    yield lab.boot("refusing")
    lab.kill("refusing")


def refused(play: Play) -> str:
    """What was said by the refusal, in one line; nothing had been changed."""
    assert play.code != 0, play.output
    assert all(host["changed"] == 0 for host in play.recap.values()), play.output
    said = re.findall(r"^\[ERROR\]: Task failed: (?:Action failed: )?(.*)$", play.output, re.M)
    assert said, play.output
    assert len(set(said)) == 1, said
    return str(said[0])


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_group_without_a_machine(lab: Lab, machine: Machine, playbook: str) -> None:
    inventory = lab.inventory({"printers": [machine]})
    said = refused(lab.play(playbook, inventory))
    first = "None of the groups gpu_nodes" if playbook == "site.yml" else None
    assert said.startswith(first or f"The group {GROUPS[playbook][0]}")
    assert f"of the inventory {inventory}" in said
    assert re.search("has (no|a) machine", said)
    assert "Nothing was changed" in said


@pytest.mark.parametrize("limit", [(), ("--limit", "gpu1")], ids=["whole", "limit"])
@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_inventory_that_is_not_there(lab: Lab, playbook: str, limit: tuple[str, ...]) -> None:
    """With --limit, Ansible would warn, do nothing and end well."""
    play = lab.play(playbook, lab.folder / "nowhere.yml", *limit)
    assert (play.code, play.recap) == (1, {}), play.output
    assert "Completely failed to parse inventory source" in play.output
    assert "nowhere.yml" in play.output


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_limit_that_nothing_matches(lab: Lab, machine: Machine, playbook: str) -> None:
    inventory = lab.inventory(groups_of(playbook, machine), secrets=SECRETS)
    play = lab.play(playbook, inventory, "--limit", "nosuch")
    assert (play.code, play.recap) == (1, {}), play.output
    assert "Could not match supplied host pattern, ignoring: nosuch" in play.output
    assert "--limit leaves us with no hosts to target" in play.output


def test_messages_of_ansible_are_those_that_its_page_explains(lab: Lab, machine: Machine) -> None:
    page = (ANSIBLE / "README.md").read_text()
    inventory = lab.inventory({"docker_hosts": [machine]}, secrets=SECRETS)
    other = lab.folder / "other password"
    other.write_text("another one")
    for path, words in (
        (None, "Attempting to decrypt but no vault secrets found"),
        (other, "Decryption failed (no vault secrets were found that could decrypt)"),
        (lab.folder / "none", f"The vault password file {lab.folder / 'none'} was not found"),
    ):
        given = () if path is None else ("--vault-password-file", str(path))
        play = lab.play("setup_docker.yml", inventory, *given, vault=False)
        assert (play.code != 0, play.recap) == (True, {}), play.output
        assert words in play.output
        assert words.replace(str(path), "PATH") in page


def test_no_controller(lab: Lab, machine: Machine) -> None:
    inventory = lab.inventory({"slurm_compute": [machine]})
    assert "The group slurm_controller" in refused(lab.play("setup_slurm.yml", inventory))


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_machine_that_does_not_answer(lab: Lab, machine: Machine, playbook: str) -> None:
    """The others are left alone, too."""
    gone = Gone(machine)
    inventory = lab.inventory(groups_of(playbook, machine, gone), secrets=SECRETS)  # type: ignore[arg-type]
    play = lab.play(playbook, inventory, "-e", "preflight_timeout=2")
    said = refused(play)
    assert f"gone ({gone.address}) does not answer as root" in said
    assert "Connection refused" in said
    if playbook == "setup_slurm.yml":  # which refuses a part of its machines
        assert "or take it out of slurm_compute in the inventory, because all" in said
        assert "--limit" not in said
    else:
        assert "or leave it out with --limit 'all:!gone'" in said
    assert "Nothing was changed, on no machine" in said


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_other_distribution(lab: Lab, machine: Machine, playbook: str) -> None:
    original = machine.read("/etc/os-release")
    machine.call("rm", "/etc/os-release")
    machine.write("/etc/os-release", original.replace("12", "11").replace("bookworm", "bullseye"))
    machine.call("cp", "/etc/debian_version", "/root/debian_version")
    machine.write("/etc/debian_version", "11.9")
    try:
        inventory = lab.inventory(groups_of(playbook, machine), secrets=SECRETS)
        said = refused(lab.play(playbook, inventory))
    finally:
        machine.write("/etc/os-release", original + "\n")
        machine.call("cp", "/root/debian_version", "/etc/debian_version")
    assert "refusing runs Debian 11" in said
    assert "Debian 12, Ubuntu 22.04, Ubuntu 24.04" in said


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_vault_without_its_password(lab: Lab, machine: Machine, playbook: str) -> None:
    inventory = lab.inventory(groups_of(playbook, machine), secrets=SECRETS)
    play = lab.play(playbook, inventory, vault=False)
    assert play.code != 0
    assert "Attempting to decrypt but no vault secrets found" in play.output
    assert not play.recap, "it began all the same"


@pytest.mark.parametrize(
    ("playbook", "missing"),
    [
        ("setup_k3s.yml", "vault_k3s_token"),
        ("setup_monitoring.yml", "vault_monitoring_grafana_password"),
    ],
)
def test_secret_that_is_not_there(lab: Lab, machine: Machine, playbook: str, missing: str) -> None:
    secrets = {name: value for name, value in SECRETS.items() if name != missing}
    inventory = lab.inventory({"k3s_server": [machine], "monitoring": [machine]}, secrets=secrets)
    assert f"Set {missing} in the vault" in refused(lab.play(playbook, inventory))


def test_option_that_is_none(lab: Lab, machine: Machine) -> None:
    inventory = lab.inventory({"gpu_nodes": [machine]}, nvidia_secure_boot="maybe")
    play = lab.play("setup_nvidia_drivers.yml", inventory)
    assert refused(play).startswith("Validation of arguments failed")
    said = " ".join(play.output.split())  # Ansible puts the reason on a line of its own
    assert "nvidia_secure_boot must be one of: refuse, sign, got: maybe" in said


def test_site_refuses_what_its_last_part_would(lab: Lab, machine: Machine) -> None:
    """Grafana's password is missing; the driver, Docker and SLURM would have come before."""
    secrets = {name: value for name, value in SECRETS.items() if "grafana" not in name}
    inventory = lab.inventory({"docker_hosts": [machine], "monitoring": [machine]}, secrets=secrets)
    said = refused(lab.play("site.yml", inventory))
    assert said.startswith("monitoring_grafana_password has fewer than 12 characters.")
