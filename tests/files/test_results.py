"""What a results file says of the run behind it, and what reading one does not need."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import transformers

import ic.files
from ic.files import results
from ic.files.results import read_json, write_results


def test_a_results_file_says_how_it_came_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IC_COMMIT", "0123456789ab")
    monkeypatch.setattr(sys, "argv", ["ic", "fit", "name=two words"])
    write_results(tmp_path / "results.json", {"seed": 3}, [{"loss": 1.5, "n": 2}])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["command"] == "python -m ic fit 'name=two words'"
    assert written["commit"] == "0123456789ab"
    assert written["versions"]["torch"] == torch.__version__
    assert written["versions"]["lightning"] == lightning.__version__
    assert written["versions"]["transformers"] == transformers.__version__
    assert written["versions"]["cuda"] == torch.version.cuda
    assert (written["config"], written["rows"]) == ({"seed": 3}, [{"loss": 1.5, "n": 2}])
    assert read_json(tmp_path / "results.json") == written
    assert read_json(tmp_path / "absent.json") == {}


def test_a_published_file_names_no_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "plan.json"
    given = [f"measured.output={output}", "data.files=[books/a.txt,/corpora/b.txt]"]
    monkeypatch.setattr(sys, "argv", ["ic", "plan", *given])
    config = {"output": str(output), "files": ["books/a.txt", "/corpora/b.txt"], "steps": {4: 2}}
    rows = [{"folder": "/kept/as/it/is"}]
    write_results(tmp_path / "own.json", config, rows)
    write_results(tmp_path / "public.json", config, rows, public=True)
    own, public = (
        json.loads((tmp_path / name).read_text()) for name in ("own.json", "public.json")
    )
    assert own["command"] == f"python -m ic plan {shlex.join(given)}"
    assert own["config"]["output"] == str(output)
    assert shlex.split(public["command"]) == [
        *("python", "-m", "ic", "plan"),
        *("measured.output=plan.json", "data.files=[books/a.txt,b.txt]"),
    ]
    assert public["config"] == {
        "output": "plan.json",
        "files": ["books/a.txt", "b.txt"],
        "steps": {"4": 2},
    }
    assert public["rows"] == rows


def test_files_need_neither_torch_nor_lightning() -> None:
    """Help and configuration import this floor, and a user waits for them."""
    modules = [f"ic.files.{path.stem}" for path in Path(ic.files.__path__[0]).glob("*.py")]
    assert "ic.files.results" in modules
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "lightning", "transformers"}.isdisjoint(done.stdout.split())


def test_an_installed_package_does_not_take_another_repositorys_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an environment that lies in the user's own repository."""
    monkeypatch.delenv("IC_COMMIT", raising=False)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    empty = ["commit", "-q", "--allow-empty", "-m", "theirs"]
    subprocess.run(["git", "-C", str(tmp_path), *author, *empty], check=True)
    package = tmp_path / ".venv/ic"
    for depth, found in ((package, "unknown"), (tmp_path / "ic", None)):
        monkeypatch.setattr(results, "__file__", str(depth / "files/results.py"))
        (depth / "files").mkdir(parents=True)
        assert (results.commit() == "unknown") == (found == "unknown")
