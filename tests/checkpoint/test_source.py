"""What a path stands for, and what is said of one that stands for nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.source import find_source


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that saved at steps 50 and 1500; the last is 1500, the best 50."""
    folder = tmp_path / "runs/mla_tiny/default"
    for step in (50, 1500):
        checkpoint(folder / f"checkpoints/step={step}")
    (folder / "checkpoints/last").symlink_to("step=1500")
    (folder / "checkpoints/best").symlink_to("step=50")
    return folder


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ("", 1500),
        ("checkpoints", 1500),
        ("checkpoints/last", 1500),
        ("checkpoints/best", 50),
        ("checkpoints/step=50", 50),
    ],
)
def test_a_run(run: Path, given: str, step: int) -> None:
    source = find_source(run / given)
    assert source.path == source.folder == run / f"checkpoints/step={step}"
    assert source.name == f"mla_tiny, step {step:,}"


def test_a_relative_path_stays_relative(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[2])
    last = Path("runs/mla_tiny/default/checkpoints/step=1500")
    assert find_source("runs/mla_tiny/default").path == last
    assert find_source("runs/mla_tiny/default").name == "mla_tiny, step 1,500"


def test_a_folder_is_shown_by_its_name(tmp_path: Path) -> None:
    assert find_source(checkpoint(tmp_path / "export/v1.5")).name == "v1.5"


def test_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "small-q8_0.gguf"
    file.touch()
    for given in (file, tmp_path):
        source = find_source(given)
        assert source.path == file
        assert source.is_gguf
        assert source.name == "small-q8_0"
        assert source.folder == tmp_path / "small-q8_0"  # each file's results apart
    checkpoint(tmp_path / "folder")
    (tmp_path / "folder/other.gguf").touch()
    assert not find_source(tmp_path / "folder").is_gguf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/mla_tinny/default", "no checkpoint folder {}: did you mean {tmp}/runs/mla_tiny? "),
        ("runs/mla_tiny/defualt", "did you mean {tmp}/runs/mla_tiny/default? "),
        ("elsewhere", "no checkpoint folder {}: give a checkpoint folder, a run's folder, an exp"),
        ("runs/mla_tiny", "{} is not a checkpoint: it holds the runs default; give one of them, s"),
        ("runs/mla_tiny/default/checkpoints/step=50/config.json", "is a file, .* give its folder "),
        ("note.txt", "{} is a file, and not a .gguf file; give a checkpoint folder, a run's"),
        ("gone", "{} is a link to nowhere, which is not there"),
        ("empty", "{} is not a checkpoint: it is an empty folder; give a checkpoint folder, a"),
        ("begun", "it is a run that has saved no checkpoint yet"),
        ("unlinked", "a run without a checkpoint `last`: {}/checkpoints holds the steps 5, 10;"),
        ("quantised", "{} holds 2 GGUF files: q4.gguf, q8.gguf; give one of them"),
        ("many", "no config.json, but 0, 1, 2, 3, 4, 5 and 3 more; give a checkpoint folder"),
    ],
)
def test_what_stands_for_nothing(run: Path, tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "note.txt").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    for step in (5, 10):
        checkpoint(tmp_path / f"unlinked/checkpoints/step={step}")
    for name in ("quantised/q4.gguf", "quantised/q8.gguf", *(f"many/{i}" for i in range(9))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    path = tmp_path / given
    wanted = re.escape(message.format(path, tmp=tmp_path)).replace(r"\.\*", ".*")
    with pytest.raises(CheckpointError, match=wanted) as caught:
        find_source(path)
    assert "\n" not in str(caught.value)
