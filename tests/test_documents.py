"""Documents say what is: tables are fresh, commands compose, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ic.cli import find_verb
from ic.config.compose import compose_config
from ic.config.flags import split_flags
from ic.verbs.tables import DOCUMENTS as WITH_TABLES
from ic.verbs.tables import refresh

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
    name, *rest = shlex.split(command)[3:]
    verb = find_verb(name)
    flags, overrides = split_flags(rest)
    if "multirun" in flags:
        overrides = [o.partition(",")[0] for o in overrides]
    compose_config(verb.name, verb.module.Config, overrides)


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
