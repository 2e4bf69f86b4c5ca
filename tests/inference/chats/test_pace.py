"""What is told while conversations are written: how many there are, and how long the rest takes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from ic.inference.chats.options import MakeChatsOptions
from ic.inference.chats.pace import Pace
from ic.inference.chats.record import ChatRecord
from tests.inference.chats.writers import DRAWN, Capture, Run

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_the_time_left_is_that_of_whole_batches(writer: Path, tmp_path: Path) -> None:
    options = MakeChatsOptions(
        checkpoint=str(writer), output=str(tmp_path / "c.jsonl"), count=3000, batch_size=1024
    )
    record, now = ChatRecord(options), 100.0
    # Of an earlier run, on a machine that may have been another.
    record.add([CHAT] * 453, 1024, Counter({"unfinished answer": 571}))
    pace = Pace(record, options.count, lambda: now)
    there = "453 of 3000 conversations, 1024 begun, 571 dropped"
    now += 50
    assert str(pace) == there
    now += 50
    record.add([], 1024, Counter({"unfinished answer": 1024}))
    pace.batch_done()
    assert str(pace) == "453 of 3000 conversations, 2048 begun, 1595 dropped"
    now += 60
    record.add([CHAT] * 1000, 1024, Counter({"empty answer": 20, "empty question": 4}))
    pace.batch_done()
    there = "1453 of 3000 conversations, 3072 begun, 1619 dropped"
    # 1547 more at 500 a batch: four batches of 80 s.
    assert str(pace) == f"{there}, about 0:05:20 left"
    now += 15
    assert str(pace) == f"{there}, about 0:05:05 left"
    now += 1000
    assert str(pace) == f"{there}, about 0:00:00 left"
    record.add([CHAT] * 1600, 1600, Counter())
    assert str(pace) == "3000 of 3000 conversations, 4672 begun, 1619 dropped"


@pytest.mark.parametrize("terminal", [False, True])
def test_it_is_told_with_the_tokens_of_the_batch_at_hand(
    ic: Run, writer: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, terminal: bool
) -> None:
    monkeypatch.setattr("ic.inference.chats.make._EVERY_S", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    command = ("make_chats", f"checkpoint={writer}", "output=c.jsonl", "count=20", *DRAWN)
    assert ic(*command) == 0
    out = re.sub(r"\x1b\[[0-9;?]*\w", "", capsys.readouterr().out)
    if terminal:
        pattern = r"20 of 20 conversations, \d+ begun, \d+ dropped +━+ 100%"
        assert re.search(pattern, out)
        assert "tokens of the answers, 16 at most" in out
        return
    lines = out.splitlines()
    assert "0 of 20 conversations; 1 tokens of the questions, 12 at most" in lines
    pattern = (
        r"\d+ of 20 conversations, (\d+) begun, (\d+) dropped, about \d:\d\d:\d\d left; "
        r"\d+ tokens of the (question|answer)s, 1[26] at most"
    )
    told = [found for line in lines if (found := re.fullmatch(pattern, line))]
    assert len(told) > 10
    assert all(int(found[1]) % 3 == 0 and int(found[2]) < int(found[1]) for found in told)
