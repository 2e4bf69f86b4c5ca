"""A reader of standard output that goes away, as `head` does: the verb ends quietly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ic.cli

ROOT = Path(__file__).resolve().parents[1]
# A verb of its own would load PyTorch: what it does to its output is all that counts here.
PRINTS = {
    "as it goes": "for _ in range(100_000): print('text', flush=True)",
    "at the end": "print('text')",
    "with rich": "import rich.console; rich.console.Console().print('text')",
    "to no reader, and is refused": "print('text'); raise ValueError('no')",
}


@pytest.mark.parametrize("how", PRINTS)
def test_a_closed_pipe_ends_a_verb_quietly(how: str) -> None:
    body = PRINTS[how]
    program = f"import ic.cli\ndef run(args):\n  {body}\n  return 0\n"
    program += "ic.cli._run = run\nic.cli.main([])"
    done, error = _unread([sys.executable, "-c", program])
    assert done == ic.cli.CLOSED_PIPE_EXIT_CODE
    assert error == ("ic: no\n" if "refused" in how else "")


def test_help_that_nobody_reads() -> None:
    assert _unread([sys.executable, "-m", "ic", "--help"]) == (141, "")


def test_another_pipe_is_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """What broke inside a verb, with a process of its own, is not hidden."""

    def run(args: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(ic.cli, "_run", run)
    with pytest.raises(BrokenPipeError):
        ic.cli.main([])


def _unread(command: list[str]) -> tuple[int, str]:
    """Run a command whose standard output nobody reads -> exit code, standard error."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
            env=buffered,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr
