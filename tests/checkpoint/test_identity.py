"""What tells the files of one model from those of another, before they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ic.checkpoint import identity
from ic.checkpoint.identity import source_identity, tokenizer_files_identity
from ic.checkpoint.source import Source


def folder_of(path: Path, **changed: bytes) -> Path:
    names = ("config.json", "model.safetensors", "tokenizer.json", "adapter/model.safetensors")
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(changed.get(name, name.encode() * 1000))
    return path


def test_each_file_of_a_model_counts_and_no_other(tmp_path: Path) -> None:
    one = source_identity(Source(folder_of(tmp_path / "one")))
    other = folder_of(tmp_path / "two")
    (other / "results.json").write_text("{}")
    (other / "trainer.pt").write_text("")
    assert source_identity(Source(other)) == one
    tokenizer = tokenizer_files_identity(other)
    for name in ("model.safetensors", "adapter/model.safetensors", "config.json", "tokenizer.json"):
        changed = folder_of(tmp_path / name.replace("/", "_"), **{name: b"other"})
        assert source_identity(Source(changed)) != one
        assert (tokenizer_files_identity(changed) == tokenizer) == (name != "tokenizer.json")


@pytest.mark.parametrize("pieces", [2, 7])
def test_a_large_file_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(identity, "_PIECES", pieces)
    monkeypatch.setattr(identity, "_PIECE_BYTES", 10)
    file = tmp_path / "a.gguf"
    found = []
    for at in (None, 0, 199, 100):
        data = bytearray(200)
        if at is not None:
            data[at] = 1
        file.write_bytes(data)
        found.append(source_identity(Source(file)))
    assert len(set(found)) == (3 if pieces == 2 else 4)
    assert (found[3] == found[0]) == (pieces == 2)
