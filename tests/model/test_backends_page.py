"""What docs/backends.md shows runs as it stands there, and its table is what the backends say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ic.model import LatentCache, MLAConfig, MLAForCausalLM, registry
from ic.model.operators import Capabilities, load_operators
from ic.model.registry import register_backend
from tests.conftest import SHORT
from tests.model.test_rows import assert_equal_alone, draw

Make = Callable[..., MLAForCausalLM]
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "backends.md").read_text()


def shown(name: str) -> str:
    """The Python file that the page shows under this name."""
    (code,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```\n", PAGE, re.DOTALL)
    return code


def rows_of(header: str) -> list[list[str]]:
    """Cells of the table that starts with this header."""
    table = PAGE[PAGE.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


@pytest.fixture
def blockwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's backend, registered; its `calls` count how often it attends."""
    (tmp_path / "blockwise.py").write_text(shown("blockwise.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    register_backend("blockwise", "blockwise")
    module: Any = importlib.import_module("blockwise")
    attend = module.attend

    def counted(*args: Any) -> torch.Tensor:
        module.calls += 1
        out: torch.Tensor = attend(*args)
        return out

    module.calls, module.attend = 0, counted
    yield module
    del sys.modules["blockwise"]


def test_the_table_of_capabilities() -> None:
    said = {row[0]: row[1:3] for row in rows_of("capability")}
    assert list(said) == [field.name for field in fields(Capabilities)]
    for column, name in enumerate(("torch", "triton")):
        can = load_operators(name).capabilities
        for capability, cells in said.items():
            value = getattr(can, capability)
            text = {True: "yes", False: "no", None: "any"}.get(value, value)
            assert cells[column] == (text if isinstance(text, str) else str(value)), capability


@pytest.mark.parametrize("changes", [{}, {"length_temperature": "ssmax", "nope_layers": [1]}])
def test_the_example_equals_torch(
    make_model: Make, blockwise: ModuleType, changes: dict[str, Any]
) -> None:
    """Training with every gradient, prefill in pieces, decode; longer than one block of keys."""
    model = make_model(attention_backend="blockwise", **changes)
    reference, x = make_model(**changes), draw(2, 150)
    losses = [each(x, labels=x).loss for each in (model, reference)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
    caches = [LatentCache(3), LatentCache(3)]
    for piece in x.split([80, 50, 19, 1], dim=1):
        with torch.no_grad():
            got, expected = (
                each(piece, past_key_values=cache).logits
                for each, cache in zip((model, reference), caches, strict=True)
            )
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert blockwise.calls == 3 * 5


def test_the_example_takes_rows_of_unequal_length(make_model: Make, blockwise: ModuleType) -> None:
    model = make_model(attention_backend="blockwise", length_temperature="ssmax")
    assert_equal_alone(model, [1, 3])


@torch.no_grad()
def test_padded_batches_of_the_example_run_on_torch(
    make_model: Make, blockwise: ModuleType
) -> None:
    models = [make_model(attention_backend=name) for name in ("blockwise", "torch")]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    logits = [model(draw(2, 12), attention_mask=mask).logits for model in models]
    assert logits[0].equal(logits[1])
    assert blockwise.calls == 0


@pytest.mark.slow
def test_the_example_trains(ic: Callable[..., int], tmp_path: Path, blockwise: ModuleType) -> None:
    losses = []
    for name in ("torch", "blockwise"):
        folder = tmp_path / name
        options = ("trainer.max_steps=2", f"output_dir={folder}", f"model.attention={name}")
        assert ic(*SHORT, *options) == 0
        (metrics,) = folder.rglob("metrics.csv")
        header, *lines = (line.split(",") for line in metrics.read_text().splitlines())
        at = next(i for i, column in enumerate(header) if column.startswith("train/loss"))
        losses.append([float(line[at]) for line in lines if line[at]])
    assert losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert blockwise.calls > 0


def test_what_the_example_does_not_support_is_refused(
    ic: Callable[..., int], tmp_path: Path, blockwise: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("A line.\n" * 500)
    text = ("data.train_files=[a.txt]", "data.tokens_per_batch=512", "data.context_length=256")
    text += ("callbacks.context_length=null",)  # its measure is not among those of text
    for command, message in rows_of("command"):
        options = command.split()
        if "data=text" in options:
            options += text
        assert ic("fit", "experiment=mla_tiny", "debug=default", "logger=none", *options) == 2
        error = capsys.readouterr().err
        assert message in error.replace("\n", " ")


@pytest.mark.slow
def test_rows_and_the_program_run_as_shown(tmp_path: Path) -> None:
    """In processes of their own, as a user starts them."""
    for name in ("rows.py", "blockwise.py", "train_blockwise.py"):
        (tmp_path / name).write_text(shown(name))
    printed = PAGE[PAGE.index("# rows.py") :].split("```\n")[2].strip()
    command = re.search(r"```\npython (train_blockwise\.py .*)\n```", PAGE)
    assert command is not None
    options = [option for option in SHORT if option != "fit" and "experiment" not in option]
    for arguments, expected in (
        (["rows.py"], printed),
        ([*command[1].split(), *options, "--print_config"], "attention: blockwise"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_registering(monkeypatch: pytest.MonkeyPatch, make_model: Make) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    register_backend("json", "json")
    register_backend("json", "json")  # again is no error
    with pytest.raises(ValueError, match="'json' is already the backend in json; choose another"):
        register_backend("json", "pickle")
    with pytest.raises(ValueError, match="backend 'json': json has no OPERATORS"):
        make_model(attention_backend="json")
    register_backend("lost", "nowhere.at_all")
    with pytest.raises(ValueError, match="backend 'lost': nowhere.at_all cannot be imported: No"):
        make_model(norm_backend="lost")
    with pytest.raises(ValueError, match="choose one of torch, triton, json, lost"):
        MLAConfig(rope_backend="mine")
    with pytest.raises(ValueError, match="max_decode_queries=0: decode takes at least one token"):
        Capabilities(False, False, False, False, False, max_decode_queries=0)
