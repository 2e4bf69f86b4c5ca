"""Out of memory, what needs no GPU: the file, the message, that nothing raises, one observer a
process.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import torch

from ic.callbacks import oom_snapshot


def test_snapshot_says_where_it_is_and_how_to_open_it(tmp_path, caplog):
    path = tmp_path / "memory/oom_snapshot.pickle"
    assert oom_snapshot.write_oom_snapshot(path, "GPU 0", dump=lambda p: Path(p).write_bytes(b"x"))
    assert path.read_bytes() == b"x"
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.ERROR
    assert str(path) in caplog.text
    assert "memory_viz" in caplog.text


def test_snapshot_that_fails_half_way_leaves_nothing_and_does_not_raise(tmp_path, caplog):
    def dump(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "oom_snapshot.pickle"
    assert not oom_snapshot.write_oom_snapshot(path, "GPU 0", dump=dump)
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_one_observer_a_process_follows_the_current_run(tmp_path, monkeypatch, caplog):
    attached: list[Any] = []
    histories: list[Any] = []
    monkeypatch.setattr(oom_snapshot, "_observer", oom_snapshot._Observer())
    monkeypatch.setattr(
        torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda *a, **k: histories.append(k)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot")
    )
    for name in ("first", "second"):
        assert oom_snapshot.watch_out_of_memory(tmp_path / name, history_entries=100)
    assert len(attached) == 1
    assert histories[0]["max_entries"] == 100
    attached[0](0, 2**30, 2**34, 2**20)
    oom_snapshot.stop_watching()
    attached[0](0, 2**30, 2**34, 2**20)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("second", b"snapshot")
    ]
    assert caplog.text.count("out of memory") == 1
    assert "GPU 0: 1.00 GiB requested, 0.00 GiB of 16.00 GiB free" in caplog.text
    assert histories[-1] == {"enabled": None}


def test_without_the_hook_the_caller_is_told(tmp_path, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_attach_out_of_memory_observer", raising=False)
    assert not oom_snapshot.watch_out_of_memory(tmp_path / "x", history_entries=0)
