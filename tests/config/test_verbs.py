"""What a verb is: a file, a YAML of its name, and an example that composes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ic.cli import find_verb, find_verbs
from ic.config.compose import compose_config
from ic.config.flags import split_flags
from ic.config.groups import CONF
from ic.inference.options import LoadOptions

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
PACKAGE = Path(__file__).resolve().parents[2] / "ic"


@pytest.mark.parametrize("name", find_verbs())
def test_every_verb_is_whole(name: str) -> None:
    verb = find_verbs()[name]
    assert verb.summary
    assert "\n" not in verb.summary
    assert is_dataclass(verb.module.Config)
    assert verb.module.Config.__doc__
    assert callable(verb.module.run)


def test_verbs_that_load_a_model_share_one_class() -> None:
    shared = {each.name for each in fields(LoadOptions)}
    loading = {
        name: verb.module.Config
        for name, verb in find_verbs().items()
        if shared <= {each.name for each in fields(verb.module.Config)}
    }
    assert {"evaluate", "generate", "parity"} <= set(loading)
    assert [name for name, kind in loading.items() if not issubclass(kind, LoadOptions)] == []


@pytest.mark.parametrize("name", find_verbs())
def test_its_example_composes(name: str) -> None:
    verb = find_verbs()[name]
    words = shlex.split(verb.example)
    assert words[:3] == ["python", "-m", "ic"]
    found, rest = find_verb(words[3:])
    assert found.name == name
    given = split_flags(rest, verb.positional)[1]
    _, text = compose_config(name, verb.module.Config, given, check=False)
    composed = OmegaConf.create(text)
    for key in (override.partition("=")[0] for override in given):
        assert (CONF / key).is_dir() or OmegaConf.select(composed, key) is not None, key


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict", "plan"])
def test_help_lists_every_group_with_its_options(ic: Run, capsys: Capture, name: str) -> None:
    assert ic(name, "--help") == 0
    shown = capsys.readouterr().out.partition("groups (")[2].partition("flags:")[0]
    listed = dict(line.split(None, 1) for line in shown.splitlines()[1:] if line)
    assert listed["model/adapter"] == "lora"
    assert listed["logger"] == "default, mlflow, none, wandb, wandb_mlflow"
    # `local` is the user's own, and may not be there; `cost` belongs to the verb of its name.
    folders = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}
    assert set(listed) - {"local"} == folders - {"local", "cost"}


def test_roots_belong_to_verbs() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(find_verbs())


@pytest.mark.slow
def test_a_new_verb_is_a_file_and_a_yaml(tmp_path: Path) -> None:
    """Planted beside the others, nothing else touched."""
    package = tmp_path / "ic"
    for folder, source in ((package, PACKAGE), (package / "verbs", PACKAGE / "verbs")):
        folder.mkdir()
        for path in source.iterdir():
            if path.name not in ("verbs", "conf", "__pycache__"):
                (folder / path.name).symlink_to(path)
    (package / "conf").mkdir()
    for path in CONF.iterdir():
        (package / "conf" / path.name).symlink_to(path)
    (package / "verbs" / "greet.py").write_text(
        '"""say hello"""\n'
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Config:\n"
        "    who: str = 'world'\n"
        "def run(config: Config) -> int:\n"
        "    print('hello', config.who)\n"
        "    return 3\n"
    )
    (package / "conf" / "greet.yaml").write_text(
        "# python -m ic greet who=you\ndefaults: [greet_schema, _self_]\n"
    )

    def ic(*args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-m", "ic", *args],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    assert "  greet " in ic().stdout
    assert "say hello" in ic().stdout
    shown = ic("greet", "--help").stdout
    assert "example: python -m ic greet who=you\n" in shown
    assert shown.endswith("who: world\n# Every key in full: docs/configuration.md\n")
    ran = ic("greet", "who=you")
    assert (ran.stdout, ran.returncode) == ("hello you\n", 3)
    wrong = ic("greet", "whom=you")
    assert wrong.stderr == "ic: unknown key 'whom'; did you mean who?\n"
    assert wrong.returncode == 2
