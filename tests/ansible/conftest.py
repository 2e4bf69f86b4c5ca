from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ansible.lab import TOOLS, Lab
from tests.ansible.machines import reason_not_to_run, root_file_system

LOG = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Lab]:
    """Boots machines and runs playbooks on them; skips where machines cannot be made."""
    if (reason := reason_not_to_run()) is not None:
        pytest.skip(f"no machines: {reason}")
    if not (TOOLS / "ansible-playbook").exists():
        pytest.skip(f"no {TOOLS}/ansible-playbook: make infra-env")
    try:
        root_file_system()
    except RuntimeError as error:
        pytest.skip(f"no machines: {error}")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    pytestconfig.stash[LOG] = lab.log
    try:
        yield lab
    finally:
        lab.stop()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if log := config.stash.get(LOG, None):
        terminalreporter.section("machines and plays")
        for line in log:
            terminalreporter.write_line(line)
