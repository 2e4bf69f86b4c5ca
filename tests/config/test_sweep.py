"""Sweeps: every value is checked before the first job, and each job has a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ic.config.compose import sweep
from ic.config.flags import split_flags
from ic.config.run import RunConfig

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[RunConfig]]:
    """The configurations with which `fit -m ...` would train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ic"])

    def run(*args: str) -> list[RunConfig]:
        def complain(error: Any) -> int:
            raise error

        seen: list[RunConfig] = []
        sweep("fit", RunConfig, split_flags([*args, "-m"])[1], seen.append, complain)
        return seen

    return run


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        (
            "evaluation.lengths=[512],[1024,2048]",
            lambda c: c.evaluation.lengths,
            [[512], [1024, 2048]],
        ),
        ("optimizer.lr=choice(0.1,0.2)", lambda c: c.optimizer.lr, [0.1, 0.2]),
        ("seed=range(1,4)", lambda c: c.seed, [1, 2, 3]),
        (
            "evaluation.samples_by_length={512:1},{1024:2}",
            lambda c: c.evaluation.samples_by_length,
            [{512: 1}, {1024: 2}],
        ),
        ("data=passkey,sft", lambda c: c.data.name, ["passkey", "sft"]),
    ],
)
def test_values_reach_the_jobs(
    jobs: Callable[..., list[RunConfig]],
    override: str,
    read: Callable[[RunConfig], Any],
    expected: list[Any],
) -> None:
    seen = jobs(override)
    assert [read(config) for config in seen] == expected
    assert len({config.folder.path for config in seen}) == len(expected)


def test_a_jobs_folder_does_not_depend_on_the_order(jobs: Callable[..., list[RunConfig]]) -> None:
    """A requeued job looks for its own checkpoint."""
    one = {config.optimizer.lr: config.run_id for config in jobs("optimizer.lr=0.1,0.2")}
    other = {config.optimizer.lr: config.run_id for config in jobs("optimizer.lr=0.2,0.1,0.3")}
    assert one.items() <= other.items()
    assert one[0.1] == "default,optimizer.lr=0.1"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("evaluation.lengthz=[512],[1024]", "did you mean evaluation.lengths"),
        ("optimizer.lrr=choice(0.1,0.2)", "did you mean optimizer.lr"),
        ("seedd=range(1,3)", "did you mean seed"),
        ("evaluation.samples_by_lengthz={512:1},{1024:2}", "evaluation.samples_by_length"),
        ("evaluation.lengths=[512],[1]", "evaluation.lengths=[1]: at least one, each at least"),
        ("optimizer.lr=choice(0.1,-2)", "optimizer.lr=-2.0: must be above 0"),
        ("seed=range(-1,2)", "seed=-1: must be at least 0"),
        ("evaluation.samples_by_length={512:1},{512:0}", "counts must be at least 1"),
    ],
)
def test_a_wrong_key_or_value_is_refused_before_the_first_job(
    ic: Run, capsys: Capture, tmp_path: Path, override: str, complaint: str
) -> None:
    assert ic("fit", "-m", "run_id=a,b", override) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # nor did Hydra begin


def test_values_that_do_not_go_together_end_the_sweep_in_one_line(ic: Run, capsys: Capture) -> None:
    """Each is right beside the first of the others; the last pair is not."""
    pairs = (
        "data.context_length=2048,8192",
        "data.tokens_per_batch=8192,4096",
        "name=x",
        "evaluation.lengths=[512]",
        "model.max_position_embeddings=1048577",
    )
    assert ic("plan", "-m", *pairs, "--json") == 2
    captured = capsys.readouterr()
    assert "data.tokens_per_batch=4096: must hold one sequence" in captured.err
    assert "Traceback" not in captured.err
