"""What killed processes left is gone at the next start, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ic.files.leftovers import clear_leftovers
from ic.files.run_folder import RunFolder
from tests.conftest import SHORT


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_removes_half_written_files_and_folders_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    kept = [
        run.config,
        run.metrics,
        run.checkpoint(10) / "config.json",
        run.checkpoints / "notes.partial-draft",
        run.path / ".notes.tmp",
        run.evaluation(10) / "passkey/.results.json.12.tmp",  # `evaluate` may be writing it
    ]
    left = [
        run.path / ".config.yaml.123.tmp",
        run.csv / ".metrics.csv.4567.tmp",
        run.checkpoints / "step=20.partial-99/model.safetensors",
        run.checkpoints / "step=10.partial-old-99/config.json",
        run.checkpoints / "step=30.partial-7",  # a plain file
    ]
    for file in (*kept, *left):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    run.last.symlink_to("step=10")
    (run.checkpoints / "last.partial-99").symlink_to("step=10")
    clear_leftovers(run)
    found = {path for path in tmp_path.rglob("*") if path.is_file() and "last" not in path.parts}
    assert found == set(kept)
    assert os.readlink(run.last) == "step=10"


def test_what_stepped_aside_comes_back(tmp_path: Path) -> None:
    """The process died between the two renames of a checkpoint that replaces another."""
    run = RunFolder(tmp_path)
    aside = run.checkpoints / "step=20.partial-old-99"
    aside.mkdir(parents=True)
    (aside / "config.json").touch()
    (run.checkpoints / "step=20.partial-99").mkdir()
    run.last.symlink_to("step=20")
    clear_leftovers(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last", "step=20"]
    assert (run.last / "config.json").is_file()


def test_no_run_yet(tmp_path: Path) -> None:
    clear_leftovers(RunFolder(tmp_path))
    assert names(tmp_path) == set()


def test_fit_starts_beside_them(ic: Callable[..., int], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs/debug/default")
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "step=1.partial-77").write_text("a plain file")
    (run.path / ".results.json.77.tmp").touch()
    options = ("callbacks.passkey=null", "callbacks.memory=null", "trainer.max_steps=1")
    assert ic(*SHORT, *options) == 0
    assert not [name for name in names(run.path) if "77" in name or name == ".lock"]
    assert run.last.resolve().name == "step=1"
