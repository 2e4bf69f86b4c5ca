"""Help and errors come at once: nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ic.cli import find_verbs

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "lightning", "transformers", "numpy", "matplotlib", "pyarrow", "datasets")
# Runs each command line of argv[1], a JSON list, and prints what it had imported by then.
PROBE = f"""
import contextlib, io, json, sys
from ic.cli import main
for args in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as exit_:
            code = exit_.code
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([args, code, loaded, len(out.getvalue()), err.getvalue()]))
"""


def probe(folder: Path, calls: list[list[str]]) -> list[tuple[list[str], int, list[str], int, str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(calls)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_help_and_configurations_import_nothing_heavy(tmp_path: Path) -> None:
    calls = [[], ["--help"], *([verb, "--help"] for verb in find_verbs())]
    calls += [["fit", "experiment=dpo_32k", "--print_config"], ["plan", "--print_config"]]
    for args, code, loaded, shown, _ in probe(tmp_path, calls):
        assert (code, loaded) == (0, []), args
        assert shown > 100, args
    assert list(tmp_path.iterdir()) == []


def test_a_reader_may_stop_in_the_middle(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ic", "fit", "--help"]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_errors_import_nothing_heavy(tmp_path: Path) -> None:
    calls = {
        "unknown verb": ["fitt"],
        "did you mean trainer.max_steps": ["fit", "trainer.max_stepz=1"],
        "did you mean mla_tiny": ["fit", "experiment=mla_tin"],
        "optimizer.lr=-1.0: must be above 0": ["fit", "optimizer.lr=-1"],
        "qk_rope_head_dim=7: must be even": ["fit", "model.qk_rope_head_dim=7"],
        "the model has 1000 positions": ["fit", "model.max_position_embeddings=1000"],
        "evaluation.lengths=[1]": ["fit", "-m", "evaluation.lengths=[512],[1]"],
        "logger.mlflow.uri: no address is given": ["fit", "logger=mlflow"],
    }
    found = probe(tmp_path, list(calls.values()))
    for complaint, (args, code, loaded, _, err) in zip(calls, found, strict=True):
        assert (code, loaded) == (2, []), args
        assert complaint in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
