"""A conversation on the terminal: turns in the model's chat template.

The whole conversation is the prompt of each turn. What the turns have in common is in the cache.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ic.errors import UsageError
from ic.inference.engine.request import Request
from ic.inference.generate.answers import Answers, answer
from ic.inference.generate.options import GenerateOptions
from ic.inference.generate.prompts import PromptMaker

_ASK = "> "
_HELP = "/reset begins anew, /quit ends (so does Ctrl-D), Ctrl-C stops an answer"


def converse(options: GenerateOptions, maker: PromptMaker, answers: Answers) -> None:
    """Read turns and write replies until the user quits."""
    with suppress(ImportError):  # where it exists, `input` then edits lines and recalls them
        import readline  # noqa: F401
    print(_HELP, flush=True)
    messages, number = maker.begin(), 0
    while True:
        try:
            line = input(_ASK).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            messages = maker.begin()
            print("(a new conversation)", flush=True)
        elif line.startswith("/") and " " not in line:
            print(f"unknown command {line}: {_HELP}", flush=True)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                ids = maker.of_messages(asked, "chat=true")
                request = Request(str(number), ids, options.sampling(number))
                answers.check(request)
            except ValueError as error:
                print(f"{error} /reset begins anew.", flush=True)
                continue
            number += 1
            messages = [*asked, {"role": "assistant", "content": _write(answers, request, options)}]


def check_terminal() -> None:
    """Raises:
    UsageError: nobody can type.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "chat=true without a prompt is a conversation on a terminal, and standard input is "
            "none: give prompt=TEXT, or prompt=- to read one message from it"
        )


def _write(answers: Answers, request: Request, options: GenerateOptions) -> str:
    """Show an answer as it comes, until it ends or Ctrl-C -> what was shown."""
    shown = ""
    pieces = answer(answers, request, options)
    with _interrupted() as is_interrupted:
        for text in pieces:
            print(text, end="", flush=True)
            shown += text
            if is_interrupted():
                print(" (stopped)", end="")
                break
        pieces.close()  # type: ignore[attr-defined]  # frees what the answer holds
    print(flush=True)
    return shown


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: a pass of the model is not broken off in the middle. A second one
    is an interrupt as ever.
    """
    pressed = False
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: FrameType | None) -> Any:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
