"""Help, version and completion: every key has a meaning, and none of it waits for PyTorch."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from ic.cli import find_verbs
from ic.config.data import DATA_SCHEMAS
from ic.config.meaning import keys_of, meanings, options_in
from ic.evaluation.registry import suite_config, suite_names

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def all_options() -> Iterator[type]:
    """Every options class that some verb takes, once."""
    waiting = [
        *(verb.module.Config for verb in find_verbs().values()),
        *DATA_SCHEMAS.values(),
        *(suite_config(name) for name in suite_names()),
    ]
    seen: set[type] = set()
    while waiting:
        kind = waiting.pop()
        if kind not in seen:
            seen.add(kind)
            yield kind
            waiting += [part for hint in get_type_hints(kind).values() for part in options_in(hint)]


@pytest.mark.parametrize("kind", sorted(all_options(), key=str), ids=lambda kind: kind.__name__)
def test_every_field_has_a_meaning(kind: type) -> None:
    known = meanings(kind)
    missing = [each.name for each in fields(kind) if not known.get(each.name)]
    assert not missing, f"{kind.__module__}: say under Attributes: what {missing} mean"


def test_meanings_are_the_docstrings_words() -> None:
    shown = {key.name: key for key in keys_of(find_verbs()["fit"].module.Config)}
    assert shown["optimizer.warmup_steps"].meaning == "linear warm-up."
    assert shown["model.norm"].meaning == shown["model.rope"].meaning
    assert shown["model.init_from"].meaning.endswith("that `ic.checkpoint.source` knows.")
    assert shown["callbacks.watchdog"].meaning == "Barriers that name who is missing."
    assert shown["model.init_from"].kind == "text or null"
    assert shown["optimizer.betas"].default == "[0.9, 0.95]"


def test_help_explains_every_key_in_lines_that_fit(
    ic: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert ic("fit", "logger=wandb", "data=text", "--help") == 0
    text = capsys.readouterr().out.partition("configuration:\n")[2]
    lines = text.splitlines()
    bare = [
        line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if re.match(r" *[\w/]+:", line) and "#" not in line and not after.strip().startswith("#")
    ]
    assert [line.split(":")[0].strip() for line in bare] == ["rope_type", "rope_theta"]
    assert "  train_files" in text
    assert max(map(len, lines)) <= 80
    config = yaml.safe_load(text)  # the meanings are comments
    assert config["logger"]["wandb"]["mode"] == "offline"


def test_help_explains_the_options_of_a_suite(ic: Run, capsys: Capture) -> None:
    assert ic("evaluate", "suite=niah", "--help") == 0
    text = capsys.readouterr().out
    assert re.search(r"^    haystack: null +# the text to hide needles in$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_meaning_is_cut_inside_brackets(ic: Run, capsys: Capture, width: int) -> None:
    for verb in find_verbs():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(width))
            assert ic(verb, "--help") == 0
        text = capsys.readouterr().out
        assert text.endswith("# Every key in full: docs/configuration.md\n")
        for line in text.partition("configuration:\n")[2].splitlines():
            meaning = line.partition("# ")[2]
            for pair in ("()", "[]", "{}"):
                assert meaning.count(pair[0]) == meaning.count(pair[1]), line
            assert meaning.count("`") % 2 == 0, line
            assert not meaning.endswith((",", ":")), line


def test_version(ic: Run, capsys: Capture) -> None:
    for args in (("--version",), ("fit", "--version")):
        assert ic(*args) == 0
        out = capsys.readouterr().out
        assert out.startswith("InfiniteContext 0.")
        assert f"torch {importlib.metadata.version('torch')}" in out


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("completion") / "ic.bash"
    command = [sys.executable, "-m", "ic", "--completion", "bash"]
    with script.open("wb") as file:
        subprocess.run(command, stdout=file, check=True, cwd=Path(__file__).parents[2])
    return script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ic", "abla"], ["ablation"]),
        (["ic", "fit", "optimizer.l"], ["optimizer.lr="]),
        (["ic", "fit", "data.train_f"], ["data.train_files="]),
        # So bash divides `experiment=mla_t`.
        (["ic", "fit", "experiment", "=", "mla_t"], ["mla_tiny"]),
        (["ic", "make-preferences", "num_d"], ["num_distractors="]),
        (["ic", "evaluate", "--print"], ["--print_config"]),
        (["ic", "evaluate", "optimizer.l"], []),
        (["ic", "benchmark", "pref"], ["preference"]),
        (["ic", "benchmark", "preference", "warm"], ["warmup="]),
        (["ic", "benchmark", "warm"], []),
    ],
)
def test_bash_completes(bash_script: Path, words: list[str], expected: list[str]) -> None:
    line = " ".join(words).replace(" = ", "=")
    script = (
        f"source {bash_script}; COMP_LINE='{line}'; COMP_POINT={len(line)}; "
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _ic 2>/dev/null; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.slow
def test_completion_for_other_shells(ic: Run, capsys: Capture) -> None:
    for shell in ("zsh", "fish"):
        assert ic(f"--completion={shell}") == 0
        out = capsys.readouterr().out
        assert "experiment=mla_tiny" in out
        assert "optimizer.lr=" in out
    assert ic("--completion", "csh") == 2
    assert "choose one of bash, zsh, fish" in capsys.readouterr().err


def test_a_verb_speaks_before_it_imports_pytorch() -> None:
    """The import takes seconds; here it ends the process instead."""
    script = """
import sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "lightning", "transformers"):
            sys.exit("importing")
sys.meta_path.insert(0, Torch())
from ic.cli import main
main(["fit", "experiment=mla_tiny", "output_dir=here"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"fit in .*/here/mla_tiny/default: loading PyTorch \.\.\.", first)
    assert second == "importing"
