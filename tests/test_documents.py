"""Documents say what is: tables are fresh, commands compose, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ic.callbacks.checkpoint import INTERRUPTED_EXIT_CODE
from ic.callbacks.requeue import TERMINATED_EXIT_CODE, TO_BE_CONTINUED_EXIT_CODE
from ic.cli import CLOSED_PIPE_EXIT_CODE, USAGE_EXIT_CODE, find_verb
from ic.config.compose import compose_config
from ic.config.flags import split_flags
from ic.config.sweep import sweep_jobs
from ic.model import MLAConfig, MLAForCausalLM
from ic.verbs.tables import DOCUMENTS as WITH_TABLES
from ic.verbs.tables import refresh
from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Whose tables name in backquotes the commands that show a line.
LISTS = [ROOT / "ROADMAP.md", ROOT / "PROGRESS.md"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *LISTS, *PAGES]
# Folders whose files commands name.
NAMED = ("slurm", "ansible", "deploy", "notebooks", ".ci", "tests")


@pytest.mark.parametrize("document", WITH_TABLES)
def test_tables_are_fresh(document: str) -> None:
    text = (ROOT / document).read_text()
    assert refresh(text) == text, "run make tables"


def test_results_name_no_path_of_the_machine_that_measured() -> None:
    named = re.compile(r"""["'=\[, ]/(?!dev/)\w+/""")
    files = sorted((ROOT / "docs/results").rglob("*.json"))
    assert len(files) > 50
    assert [path.name for path in files if named.search(path.read_text())] == []


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table 'speed'"):
        refresh("<!-- table: speed -->\n<!-- end -->")


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def commands() -> list[Any]:
    """Each command of the documents once, without its comment, and the error that follows it."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text()
        if document in LISTS:
            text = re.sub(r"`(python -m ic [^`]+)`", r"\n```\n\1\n```\n", text)
        for block in re.findall(r"^ *```\w*\n(.*?)```", text, flags=re.S | re.M):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            for line, after in zip(lines, [*lines[1:], ""], strict=True):
                command = line.split(" #")[0].strip().removeprefix("$ ")
                verb = re.match(r"python -m ic (\w+)", command)
                # A page may add a verb or a suite: tests/test_adding.py runs those.
                if verb and "..." not in command and document.name != "adding.md":
                    found[command] = (document.name, after)
    return [pytest.param(c, e, id=f"{name}: {c}") for c, (name, e) in found.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, in place of those that a document's commands begin with."""
    path = tmp_path_factory.mktemp("model")
    sizes = {**SMALL, "max_position_embeddings": 2**21}
    MLAForCausalLM(MLAConfig(**sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize(("command", "after"), commands())
def test_commands_compose(command: str, after: str, folder: Path) -> None:
    """What a document shows as refused is refused with the words that it shows."""
    verb, rest = find_verb(shlex.split(command)[3:])
    flags, overrides = split_flags(rest, verb.positional)
    if "multirun" in flags:
        overrides = sweep_jobs(overrides)[0].overrides
    # A run's folder stands for its checkpoint and configuration, and there is none here.
    if verb.name == "evaluate":
        overrides = [re.sub("^run=", "checkpoint=", o) for o in overrides]
    if hasattr(verb.module, "complete"):
        overrides = [o for o in overrides if not o.startswith(("run=", "from="))]
    begins = r"^(model\.init_from|distillation\.teacher)=.*"
    overrides = [re.sub(begins, rf"\1={folder}", o) for o in overrides]
    if "unknown key" in after:
        with pytest.raises(ValueError, match=f"^{re.escape(after.removeprefix('ic: '))}$"):
            compose_config(verb.name, verb.module.Config, overrides)
    else:
        compose_config(verb.name, verb.module.Config, overrides)


def test_files_of_commands_exist() -> None:
    """`sbatch slurm/NAME.sbatch`, `ansible-playbook ansible/NAME.yml` and their kind."""
    missing = []
    for document in DOCUMENTS:
        for block in re.findall(r"^ *```\w*\n(.*?)```", document.read_text(), flags=re.S | re.M):
            for path in re.findall(rf"(?:^|[\s=])((?:{'|'.join(NAMED)})/[\w./-]+\.\w+)", block):
                if not (ROOT / path).exists():
                    missing.append(f"{document.name}: {path}")
    assert not missing


def test_each_finished_line_names_a_command_that_is_there() -> None:
    """A verb (composed above), a target of make or tests; and no line is finished and planned."""
    progress = (ROOT / "PROGRESS.md").read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    lines = re.findall(r"^\| (?!done )(?!---)(.+) \| `([^`]+)` \|$", progress, flags=re.M)
    rows = [line for line in progress.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows) - progress.count("| done | shown by |") > 25
    for line, command in lines:
        if command.startswith("make "):
            assert command.removeprefix("make ") in targets, command
        elif command.startswith("python -m pytest "):
            for path in command.split()[3:]:
                assert (ROOT / path).exists(), command
        else:
            assert command.startswith("python -m ic "), line
    phases = re.findall(r"^## (Phase \d: .+)$", progress, flags=re.M)
    assert [phase[6] for phase in phases] == list("123456")
    assert re.findall(r"^## (.+)$", (ROOT / "ROADMAP.md").read_text(), flags=re.M) == phases


def test_every_page_is_in_the_sites_navigation() -> None:
    """Once, in `nav` of mkdocs.yml; strictly built, the site refuses a page that is not."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"- (?:[^:\n]+: )?([\w./-]+\.md)$", nav, flags=re.M)
    made = {"changelog.md", "contributing.md", "roadmap.md", "progress.md"}  # .ci/site_hooks.py
    # The hook lists the runbooks, a page for each alert.
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
    pages = [page for page in pages if not page.startswith("runbooks/")]
    assert sorted(page for page in listed if page not in made) == sorted(pages)


def test_the_index_lists_every_extra() -> None:
    """Those of users; and no page asks for one that is not there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    table = (ROOT / "docs/index.md").read_text().partition("## Install")[2].partition("##")[0]
    first = re.findall(r"^\| (`[^|]+`) \|", table, flags=re.M)
    listed = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(set(extras) - {"dev", "docs", "mutants"})
    for document in DOCUMENTS:
        asked = re.findall(r"pip install (?:-e )?'[\w.-]*\[([\w,]+)\]'", document.read_text())
        for name in ",".join(asked).split(",") if asked else ():
            assert name in {*extras, "EXTRA", "ruler"}, f"{document.name}: {name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for document in DOCUMENTS:
        named = re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", document.read_text(), flags=re.M)
        for target in (quoted or first for quoted, first in named):
            assert target in targets, f"{document.name}: make {target}"


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        page = document.parent / target if target else document
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), f"{target}#{anchor}"
    for target in re.findall(
        r"`((?:docs|ic|tests|conf|callbacks|datamodules)/[\w./-]+\.(?:py|md|json|yaml))`", text
    ):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda p: p.name)
def test_job_scripts_say_what_to_fill_in(script: Path) -> None:
    """As comments before the first command, where SLURM still reads directives."""
    head, _, _ = script.read_text().partition("\nsource ")
    for option in ("--partition=", "--account=", "--mem="):
        assert f"\n##SBATCH {option}" in head
    assert "\n# module purge" in head


def test_exit_codes_are_the_codes() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.M)}
    own = {USAGE_EXIT_CODE, INTERRUPTED_EXIT_CODE, CLOSED_PIPE_EXIT_CODE}
    own |= {TO_BE_CONTINUED_EXIT_CODE, TERMINATED_EXIT_CODE}
    assert documented == {0, 1, *own, 128 + signal.SIGKILL}
    assert INTERRUPTED_EXIT_CODE == 128 + signal.SIGINT
    assert TERMINATED_EXIT_CODE == 128 + signal.SIGTERM
