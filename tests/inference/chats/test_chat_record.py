"""The batches of conversations on disk: going on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.record import ChatRecord
from ic.inference.chats.writer import ChatWriter
from ic.model.byte_tokenizer import ByteTokenizer
from tests.inference.chats.writers import DRAWN, OPTIONS, Capture, Run, chats, letters, llama


def test_an_interrupted_run_goes_on_to_the_same_file(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ("make_chats", f"checkpoint={writer}", "count=10", *DRAWN)
    assert ic(*command, "output=whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == 10
    batch = ChatWriter.batch
    numbers: list[int] = []

    def interrupted(self: ChatWriter, number: int, *rest: Any) -> Any:
        numbers.append(number)
        if numbers == [0, 1, 2]:
            raise KeyboardInterrupt
        return batch(self, number, *rest)

    monkeypatch.setattr(ChatWriter, "batch", interrupted)
    assert ic(*command, "output=part.jsonl") == 130
    assert not (tmp_path / "part.jsonl").exists()
    with (tmp_path / "part.jsonl.batches").open("a") as lines:
        lines.write('{"batch": 2, "chats": [[{"ro')  # killed while it wrote
    assert ic(*command, "output=part.jsonl") == 0
    assert numbers[:4] == [0, 1, 2, 2]
    assert (tmp_path / "part.jsonl").read_bytes() == whole
    read = (tmp_path / "part.jsonl.batches").read_bytes()
    assert read == (tmp_path / "whole.jsonl.batches").read_bytes()
    monkeypatch.undo()
    capsys.readouterr()


def test_a_run_that_was_killed_within_its_first_batch_goes_on(
    ic: Run, writer: Path, tmp_path: Path
) -> None:
    command = ("make_chats", f"checkpoint={writer}", "count=3", *DRAWN)
    assert ic(*command, "output=whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl.batches").read_bytes()
    settings = whole.index(b"\n") + 1
    for cut in (settings // 2, settings - 1, settings, settings + 20):
        (tmp_path / "part.jsonl.batches").write_bytes(whole[:cut])
        (tmp_path / "part.jsonl").unlink(missing_ok=True)
        for _ in range(2):
            assert ic(*command, "output=part.jsonl") == 0
        assert (tmp_path / "part.jsonl.batches").read_bytes() == whole


def test_a_complete_file_is_kept_and_may_be_lengthened(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", *DRAWN)
    assert ic(*command, "count=4") == 0
    four = chats(tmp_path / "c.jsonl")
    capsys.readouterr()
    assert ic(*command, "count=4") == 0
    assert "4 conversations, 4 were there: c.jsonl" in capsys.readouterr().out
    assert chats(tmp_path / "c.jsonl") == four
    assert ic(*command, "count=8") == 0
    assert chats(tmp_path / "c.jsonl")[:4] == four
    assert len(chats(tmp_path / "c.jsonl")) == 8
    for more, said in (
        (["count=2"], "c.jsonl holds 8 conversations, more than count=2"),
        (["count=8", "seed=1", "turns=2"], "turns=1 (now 2), seed=0 (now 1)"),
    ):
        assert ic(*command, *more) == 2
        assert said in capsys.readouterr().err
    kept = (tmp_path / "c.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text("\n".join([*kept[:-1], '{"messages": []}']) + "\n")
    assert ic(*command, "count=8") == 2
    assert "c.jsonl was changed after it was made" in capsys.readouterr().err
    (tmp_path / "c.jsonl.batches").unlink()
    assert ic(*command, "count=8") == 2
    assert "no c.jsonl.batches beside it" in capsys.readouterr().err
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[-1]) == {"messages": []}


def test_how_many_are_asked_for_changes_none_of_them(ic: Run, writer: Path, tmp_path: Path) -> None:
    """A file of one, lengthened, is the file of all."""
    command = ("make_chats", f"checkpoint={writer}", *DRAWN)
    assert ic(*command, "output=whole.jsonl", "count=7") == 0
    for count in (1, 7):
        assert ic(*command, "output=part.jsonl", f"count={count}") == 0
        assert len(chats(tmp_path / "part.jsonl")) == count
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_weights_or_another_tokenizer_at_the_same_path_are_refused(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Before PyTorch is loaded; a copy of the same weights goes on."""
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", *DRAWN)
    assert ic(*command, "count=2", "tokenizer=tokenizer") == 0
    shutil.copytree(writer, tmp_path / "copy")
    shutil.rmtree(writer)
    shutil.copytree(tmp_path / "copy", writer, copy_function=shutil.copyfile)
    again = (*command, "count=4", f"tokenizer={tmp_path}/copy/../tokenizer")
    assert ic(*again) == 0
    monkeypatch.setattr("ic.inference.chats.make.open_source", None)
    template = tmp_path / "tokenizer/chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept + "{# other #}")
    capsys.readouterr()
    assert ic(*again) == 2
    assert "other settings: tokenizer_identity=" in capsys.readouterr().err.splitlines()[-1]
    template.write_text(kept)
    torch.manual_seed(7)
    letters(llama(), 2.0).save_pretrained(writer)
    assert ic(*again) == 2
    assert "other settings: identity=" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_record_is_refused_by_its_line(
    ic: Run, writer: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", "count=3", *DRAWN)
    assert ic(*command) == 0
    record, output = tmp_path / "c.jsonl.batches", tmp_path / "c.jsonl"
    first, batch, *rest = record.read_text().splitlines()
    row = json.loads(batch)
    damaged = [
        (["[1]", batch], "c.jsonl.batches, line 1: holds no settings"),
        (['{"batch": 0}', batch], "c.jsonl.batches, line 1: holds no settings"),
        ([first, "[1]"], "c.jsonl.batches, line 2: holds no batch"),
        ([first, batch, first], "c.jsonl.batches, line 3: holds no batch"),
    ]
    for other in ({"chats": [[]]}, {"chats": [["a"]]}, {"begun": None}, {"dropped": {"a": "b"}}):
        line = json.dumps({**row, **other})
        damaged.append(([first, line], "c.jsonl.batches, line 2: holds no batch"))
    for lines, said in damaged:
        record.write_text("\n".join(lines) + "\n")
        capsys.readouterr()
        assert ic(*command) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    record.write_text("\n".join([first, batch, *rest]) + "\n")
    output.write_text("3\n")
    assert ic(*command) == 2
    assert "c.jsonl, line 1: holds no conversation" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written_is_refused_at_once(
    ic: Run, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("ic.inference.chats.make.open_source", None)  # nothing is loaded
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl.batches").mkdir()
    for output in ("file/c.jsonl", "a.jsonl", "b.jsonl", "/proc/c.jsonl"):
        assert ic("make_chats", f"checkpoint={writer}", f"output={output}", *OPTIONS) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"output={output}: cannot be written" in last
    options = MakeChatsOptions(checkpoint=str(writer), output=str(tmp_path / "new/deep/c.jsonl"))
    ChatRecord(options)
    assert list((tmp_path / "new/deep").iterdir()) == []


def test_the_record_of_a_batch_that_was_never_written_binds_nothing(
    writer: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "c.jsonl")
    ChatRecord(MakeChatsOptions(checkpoint=str(writer), output=output, seed=1))
    again = ChatRecord(MakeChatsOptions(checkpoint=str(writer), output=output, seed=2))
    assert (again.begun, again.num_batches, again.is_complete) == (0, 0, False)
