"""Documents say what is: tables are fresh, commands compose, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ic.cli import CONF, VERBS
from ic.overrides import compose_config, split_flags
from ic.tables import DOCUMENTS as WITH_TABLES
from ic.tables import refresh

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", WITH_TABLES)
def test_tables_are_fresh(document: str) -> None:
    text = (ROOT / document).read_text()
    assert refresh(text) == text, "run make tables"


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table 'speed'"):
        refresh("<!-- table: speed -->\n<!-- end -->")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def commands() -> list[str]:
    blocks = re.findall(r"```\w*\n(.*?)```", README, flags=re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m ic ")]


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str) -> None:
    verb, *rest = shlex.split(command)[3:]
    if verb == "benchmark":  # has arguments of its own, tested in test_cli
        return
    assert verb in VERBS
    flags, overrides = split_flags(rest)
    if "multirun" in flags:
        overrides = [o.partition(",")[0] for o in overrides]
    compose_config(CONF, verb, overrides)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for document in DOCUMENTS:
        named = re.findall(r"`make (\w+)`|^make (\w+)", document.read_text(), flags=re.M)
        for target in (quoted or first for quoted, first in named):
            assert target in targets, f"{document.name}: make {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for target in re.findall(
        r"`((?:docs|ic|tests|conf|callbacks|datamodules)/[\w./-]+\.(?:py|md|json|yaml))`", text
    ):
        assert (ROOT / target).exists(), target
