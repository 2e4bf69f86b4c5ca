"""What a damaged shard, a stumbling file system and a forged file do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from ic.checkpoint.checksums import CHECKSUMS
from ic.checkpoint.commit import check_file_system, commit_folder, sync_folder
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.folder import load_model
from ic.checkpoint.source import find_source
from ic.checkpoint.storage import MODEL, ShardReader, ShardWriter, read_tensors
from ic.files import retry_io

TENSORS = {"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.int64)}}


class StumblingFileSystem(FileSystem):
    """Fails to open a shard as often as it is told."""

    def __init__(self, code: int, times: int) -> None:
        self.code, self.times, self.opened = code, times, 0

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if str(path).endswith(".distcp"):
            self.opened += 1
            if self.opened <= self.times:
                raise OSError(self.code, os.strerror(self.code))
        with super().create_stream(path, mode) as stream:
            yield stream


def save(folder: Path, file_system: FileSystem | None = None) -> None:
    partial = folder.with_name("partial")
    writer = ShardWriter(partial, folder, lambda at: (at / "rest").touch() or None)
    if file_system is not None:
        writer.fs = file_system
    dcp.save(TENSORS, storage_writer=writer, no_dist=True)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_io, "FIRST_WAIT_S", 0)
    monkeypatch.setattr(retry_io, "JITTER_S", 0)


def check(folder: Path) -> None:
    loaded = read_tensors(ShardReader(folder), MODEL)
    assert loaded.keys() == {"a", "b"}
    assert all(loaded[name].equal(tensor) for name, tensor in TENSORS["model"].items())


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "step=1")
    check(tmp_path / "step=1")
    assert (tmp_path / "step=1" / "rest").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step=1"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_transient_fault_is_retried(code: int, tmp_path: Path) -> None:
    file_system = StumblingFileSystem(code, times=2)
    save(tmp_path / "step=1", file_system)
    assert file_system.opened == 3
    check(tmp_path / "step=1")
    reader = ShardReader(tmp_path / "step=1")
    reader.fs = StumblingFileSystem(code, times=2)
    assert read_tensors(reader, MODEL).keys() == {"a", "b"}
    assert reader.fs.opened == 3


@pytest.mark.parametrize(("code", "opened"), [(errno.EIO, 5), (errno.ENOSPC, 1), (errno.EROFS, 1)])
def test_lasting_fault(code: int, opened: int, tmp_path: Path) -> None:
    file_system = StumblingFileSystem(code, times=99)
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path / "step=1", file_system)
    assert os.strerror(code) in str(caught.value.failures[0][0])
    assert file_system.opened == opened
    assert not (tmp_path / "step=1").exists()


class BrokenFileSystem(FileSystem):
    """Fails as a library does, with or without an error of the operating system below."""

    def __init__(self, cause: OSError | None) -> None:
        self.cause = cause

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        raise RuntimeError("the writer gave up") from self.cause
        yield


@pytest.mark.parametrize(
    ("cause", "said"),
    [(None, "the writer gave up"), (OSError(errno.EROFS, "Read-only"), "[Errno 30] Read-only")],
)
def test_what_failed_is_said(cause: OSError | None, said: str, tmp_path: Path) -> None:
    """The operating system's word, if it had one."""
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path / "step=1", BrokenFileSystem(cause))
    assert str(caught.value.failures[0][0]) == said


@pytest.fixture
def checkpoint(four: Path, tmp_path: Path) -> Path:
    return shutil.copytree(four / "runs/debug/four/checkpoints/step=2", tmp_path / "step=2")


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:  # one bit in the middle
        at = len(data) // 2
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("__3_0.distcp", "missing", "the shard {file} is missing"),
        ("__3_0.distcp", "truncated", "{file} is truncated or damaged: it holds"),
        ("__3_0.distcp", "flipped", "{file} is truncated or damaged: it differs"),
        ("__3_0.distcp.sha256", "missing", "__3_0.distcp is truncated or damaged"),
        (".metadata", "truncated", "{file} is truncated or damaged: it differs"),
        ("config.json", "missing", "it holds no config.json"),
    ],
)
def test_damaged(checkpoint: Path, name: str, how: str, message: str, tmp_path: Path) -> None:
    file = checkpoint / name
    damage(file, how)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    assert message.format(file=file) in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(find_source(checkpoint), tmp_path / "out")
    assert message.format(file=file) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step=2"]


def test_more_layers_than_the_configuration(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(
        CheckpointError, match=r"no place for, the first is model\.layers\.1\.input"
    ):
        load_model(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.input.* no such tensor by the co"
    ):
        export_checkpoint(find_source(checkpoint), tmp_path / "out")


class Forged:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "forged",
    [
        Forged(os.mkdir, "owned"),
        Forged(eval, "1"),
        Forged(torch.ones, 1),
        Forged(torch.hub.set_dir, "owned"),  # of a module whose name begins as an allowed one's
        Forged(torch.serialization.load, "owned"),
    ],
)
def test_metadata_runs_no_code(
    checkpoint: Path, forged: Forged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(forged))
    (checkpoint / CHECKSUMS).unlink()  # a forger would have written his own
    with pytest.raises(CheckpointError, match="is missing or damaged: it asks for"):
        load_model(checkpoint)
    assert not (tmp_path / "owned").exists()


def test_commit_keeps_what_it_cannot_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, partial = tmp_path / "step=1", tmp_path / "step=1.partial-7"
    for folder, text in ((target, "old"), (partial, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    rename = Path.rename

    def refuse(self: Path, to: Any) -> Path:
        if self == partial:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="not supported"):
            commit_folder(partial, target)
    assert (target / "file").read_text() == "old"
    commit_folder(partial, target)
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["step=1"]


def test_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_file_system(tmp_path / "runs") is None
    assert list((tmp_path / "runs").iterdir()) == []

    def refuse(self: Path, to: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    problem = check_file_system(tmp_path / "runs")
    assert problem is not None
    assert "Operation not permitted" in problem
    assert list((tmp_path / "runs").iterdir()) == []


def test_every_file_and_the_list_of_names_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    flushed: list[str] = []
    fsync = os.fsync

    def traced(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", traced)
    sync_folder(tmp_path)
    assert sorted(flushed) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b")]
