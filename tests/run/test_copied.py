"""A run that was copied without links goes on, and a checkpoint may have any name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SHORT

Run = Callable[..., int]
RUN = (
    *SHORT,
    "callbacks.passkey=null",
    "callbacks.memory=null",
    "trainer.max_steps=3",
    "trainer.val_check_interval=2",
    "overwrite=false",
)
LONGER = ("trainer.max_steps=4", "allow_config_change=true")


def links(run: Path) -> dict[str, str | None]:
    return {
        path.name: os.readlink(path) if path.is_symlink() else None
        for path in (run / "checkpoints").iterdir()
    }


@pytest.mark.slow
def test_a_copy_without_links(ic: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ic(*RUN) == 0
    run, copies = tmp_path / "runs/debug/default", tmp_path / "copies"
    whole = {"step=2": None, "step=3": None, "best": "step=2", "last": "step=3"}
    assert links(run) == whole
    shutil.copytree(run, copies / "debug/default")  # follows links
    shutil.copytree(run, copies / "debug/bare")
    shutil.copytree(run, copies / "debug/mixed")
    given = (*RUN, *LONGER, "output_dir=copies")

    copy = copies / "debug/default"
    assert set(links(copy).values()) == {None}
    assert ic(*given, "ckpt_path=last") == 0
    assert links(copy) in (
        {"step=2": None, "step=4": None, "best": "step=2", "last": "step=4"},
        {"step=4": None, "best": "step=4", "last": "step=4"},
    )

    # Only the copies are there, as when the links' targets were pruned; and another name is given.
    bare = copies / "debug/bare/checkpoints"
    shutil.rmtree(bare / "step=2")
    shutil.rmtree(bare / "step=3")
    shutil.copytree(bare / "last", bare / "kept for later")
    assert ic(*given, "run_id=bare", f"ckpt_path={bare}/kept for later") == 0
    assert "step 4/4" in capsys.readouterr().out
    assert links(bare.parent)["last"] == "step=4"

    mixed = copies / "debug/mixed/checkpoints"
    (mixed / "last/config.json").write_text("{}")
    assert ic(*given, "run_id=mixed", "ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert f"{mixed}/last is a folder, and differs from {mixed}/step=3" in error
    assert (mixed / "last").is_dir()
    assert (mixed / "step=3").is_dir()
    (mixed / "last/config.json").write_bytes((mixed / "step=3/config.json").read_bytes())
    assert ic(*given, "run_id=mixed", "overwrite=true") == 0
    assert links(mixed.parent)["last"] == "step=4"
