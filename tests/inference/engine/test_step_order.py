"""What the host does in a step, and in which order: the device is never left without work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ic.inference.engine.runner import Runner
from ic.inference.engine.sampler import Sent
from tests.inference.engine.serving import SIZES, Make, ask, draw_prompt, engine_of


def test_passes_are_launched_before_the_step_before_is_awaited(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    spy(Runner, "decode")
    spy(Runner, "read")
    spy(Sent, "wait")
    engine = engine_of(make_model(**SIZES))
    for tokens in (17, 20, 23):
        engine.add(ask(f"{tokens}", draw_prompt(tokens), 4))
    steps = []
    while engine.has_work:
        seen.clear()
        engine.step()
        steps.append(tuple(seen))
    # One prompt is read in a step; a step says what the step before drew: from a decode pass, from
    # the end of a prompt, or from both.
    assert steps == [
        ("read",),
        ("decode", "read", "wait"),
        ("decode", "read", "wait", "wait"),
        ("decode", "wait", "wait"),
        ("decode", "wait"),
        ("decode", "wait"),
        ("wait",),
    ]
