"""Sweeps: every job is checked before the first, has a folder of its own and a row in the table."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import yaml
from rich.console import Console

import ic.verbs.fit
from ic.config.compose import compose_config
from ic.config.flags import split_flags
from ic.config.run import RunConfig
from ic.config.sweep import run_id_suffix
from ic.files.run_folder import RunFolder
from ic.studies.sweep import PlannedJob, passing_signals_on, plan_jobs, sweep_row, sweep_table
from tests.conftest import SHORT

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
FIT: ModuleType = ic.verbs.fit


def planned(*args: str) -> list[PlannedJob]:
    """The jobs that `fit -m ...` would run."""
    return plan_jobs("fit", FIT, split_flags([*args, "-m"])[1])


def configured(job: PlannedJob) -> RunConfig:
    """What the job's own process makes of its arguments."""
    return compose_config("fit", RunConfig, split_flags(job.arguments)[1])[0]


@pytest.mark.slow
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
        (
            "model.init_from=runs/a/step=1,'b,c',null",
            lambda c: c.model.init_from,
            ["runs/a/step=1", "b,c", None],
        ),
        ("model.init_from=choice(a,'b=2, c')", lambda c: c.model.init_from, ["a", "b=2, c"]),
        ("model.adapter.r=1,2 model/adapter=lora", lambda c: c.model.adapter.r, [1, 2]),
    ],
)
def test_values_reach_the_jobs(
    override: str, read: Callable[[RunConfig], Any], expected: list[Any]
) -> None:
    fixed = ("data.seed=3", "evaluation.depths=[0.1,0.9]", "callbacks.passkey=null")
    args = override.split(" ") if "model/adapter" in override else [override]
    fixed = fixed[1:] if override.startswith("data=") else fixed
    jobs = planned(*fixed, *args)
    configs = [configured(job) for job in jobs]
    assert [read(config) for config in configs] == expected
    assert all(config.evaluation.depths == [0.1, 0.9] for config in configs)
    folders = [config.folder.path for config in configs]
    assert folders == [job.run.path for job in jobs if job.run]
    assert len(set(folders)) == len(expected)


@pytest.mark.slow
def test_a_folder_is_named_for_the_swept_keys_alone() -> None:
    """In every order of keys and values: a requeued job looks for its own checkpoint."""
    fixed = ("data.context_length=256", "evaluation.lengths=[512]", "overwrite=true")
    one = [configured(job).run_id for job in planned(*fixed, "optimizer.lr=1e-3,2e-3", "seed=1,2")]
    assert one == [
        "default,lr=1e-3,seed=1",
        "default,lr=1e-3,seed=2",
        "default,lr=2e-3,seed=1",
        "default,lr=2e-3,seed=2",
    ]
    other = [configured(job).run_id for job in planned("seed=2,1", "optimizer.lr=2e-3,1e-3")]
    assert sorted(other) == one


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        ({"optimizer.lr": "1e-3"}, "lr=1e-3"),
        ({"evaluation.lengths": "[512, 1024]"}, "lengths=512-1024"),
        ({"evaluation.samples_by_length": "{512: 1}"}, "samples_by_length=512-1"),
        ({"model/adapter": "lora", "model": "mla_tiny"}, "adapter=lora,model=mla_tiny"),
        ({"a.every": "1", "b.every": "2"}, "a.every=1,b.every=2"),
        ({"model.init_from": "'~/größe x;y'"}, "init_from=-größe-x-y"),
        ({"data.train_files": "[]"}, "train_files=none"),
        (
            {"data.train_files": "[/a/very/long/way/to/the/same/corpus.jsonl]"},
            "train_files=o-the-same-corpus.jsonl-c601e2fc",
        ),
    ],
)
def test_names_are_safe_and_short(swept: dict[str, str], expected: str) -> None:
    suffix = run_id_suffix(swept)
    assert suffix == expected
    RunConfig(data=configured(planned("seed=1,2")[0]).data, run_id=f"default,{suffix}")


def test_many_keys_make_no_long_name() -> None:
    swept = {f"part.a_key_of_some_length_{n}": "x" * 30 for n in range(9)}
    one, other = run_id_suffix(swept), run_id_suffix({**swept, "part.a_key_of_some_length_8": "y"})
    assert len(one) == len(other) == 120
    assert one != other


def test_values_that_are_written_alike_have_folders_of_their_own() -> None:
    jobs = planned("model.init_from=a/b,a-b")
    assert len({configured(job).run_id for job in jobs}) == 2
    with pytest.raises(ValueError, match="is given twice; give each value once"):
        planned("seed=1,2,1")


def test_experiments_name_their_folders_themselves() -> None:
    jobs = planned("experiment=mla_tiny,mla_small")
    assert [job.run.path.parts[-2:] for job in jobs if job.run] == [
        ("mla_tiny", "default"),
        ("mla_small", "default"),
    ]
    jobs = planned("experiment=mla_tiny,mla_small", "name=both")
    assert [job.run.path.parts[-2:] for job in jobs if job.run] == [
        ("both", "default,experiment=mla_tiny"),
        ("both", "default,experiment=mla_small"),
    ]


@pytest.mark.slow
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
        ("seed=1,,2", "seed=1,,2: an empty value between commas"),
        ("seed=range(1", "seed=range(1: "),
        ("seed=interval(1,2)", "Can only enumerate CHOICE and RANGE sweeps"),
    ],
)
def test_a_wrong_key_or_value_is_refused_before_the_first_job(
    ic: Run, capsys: Capture, tmp_path: Path, override: str, complaint: str
) -> None:
    assert ic("fit", "-m", "run_id=a,b", override) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_values_that_do_not_go_together_are_refused_before_the_first_job(
    ic: Run, capsys: Capture
) -> None:
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
    assert "job 1" not in captured.err


def test_torchrun_is_refused(ic: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert ic("fit", "-m", "seed=1,2") == 2
    assert "--multirun under torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_job_does_not_keep_the_next(
    ic: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Real processes, with a list, a table and W&B beside what is swept."""
    pytest.importorskip("wandb")
    fixed = (
        "logger=wandb",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "callbacks.passkey=null",
        "callbacks.memory=null",
        "evaluation.depths=[0.5]",
        "evaluation.samples_by_length={512: 1}",
    )
    assert ic(*SHORT, *fixed, "-m", "model.init_from=nowhere,null", "optimizer.lr=1e-3") == 2
    captured = capfd.readouterr()
    assert "no checkpoint folder nowhere" in captured.err
    run = tmp_path / "runs/debug/default,init_from=null"
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 1e-3
    assert (run / "tracking/wandb/spool.jsonl").is_file()
    (file,) = (tmp_path / "runs/debug").glob("sweep-*.json")
    failed, finished = json.loads(file.read_text())["rows"]
    assert failed["swept"] == {"model.init_from": "nowhere"}
    assert (failed["ended"], failed["train_loss"]) == ("exit code 2", None)
    assert finished["ended"] == "finished"
    assert finished["folder"] == str(run)
    assert 5 < finished["train_loss"] < 8
    assert 5 < finished["val_loss"] < 8
    assert f"{finished['val_loss']:.4f}" in captured.out


def test_the_row_of_a_job(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "default,lr=1")
    run.csv.mkdir(parents=True)
    run.metrics.write_text("step,train/loss,val/loss\n0,3.5,\n1,2.25,\n1,,2.5\n")
    passkey = [("control", 4, 1), (0.0, 4, 4), (1.0, 4, 2)]
    run.results.write_text(
        json.dumps(
            {
                "status": "finished",
                "rows": [
                    {"what": "passkey", "depth": depth, "n": n, "correct": correct}
                    for depth, n, correct in passkey
                ],
            }
        )
    )
    rows = [
        sweep_row(PlannedJob({"optimizer.lr": "1"}, [], run, 0)),
        sweep_row(PlannedJob({"optimizer.lr": "2"}, [], RunFolder(tmp_path / "other"))),
    ]
    assert rows == [
        {
            "swept": {"optimizer.lr": "1"},
            "ended": "finished",
            "train_loss": 2.25,
            "val_loss": 2.5,
            "passkey_accuracy": 0.75,
            "folder": str(run.path),
        },
        {
            "swept": {"optimizer.lr": "2"},
            "ended": "not begun",
            "train_loss": None,
            "val_loss": None,
            "passkey_accuracy": None,
            "folder": str(tmp_path / "other"),
        },
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(sweep_table(rows, tmp_path))
    heads, _, first, second = console.file.getvalue().splitlines()[-5:-1]  # type: ignore[attr-defined]
    assert heads.split() == ["lr", "ended", "loss", "val", "loss", "passkey", "folder"]
    assert first.split() == ["1", "finished", "2.2500", "2.5000", "0.7500", "default,lr=1"]
    assert second.split() == ["2", "not", "begun", "-", "-", "-", "other"]


def test_a_signal_reaches_the_job_and_ends_the_sweep() -> None:
    """A job that saves on a signal and exits with a code of its own is waited for."""
    job = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
os.kill(os.getppid(), signal.SIGUSR1)
while True:
    signal.pause()
"""
    with passing_signals_on() as run:
        assert run([sys.executable, "-c", "raise SystemExit(3)"]) == (3, False)
        killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        assert run([sys.executable, "-c", killed]) == (137, False)
        assert run([sys.executable, "-c", job]) == (75, True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ((), "the same command and ckpt_path=auto"),
        (("ckpt_path=last",), "the same command and ckpt_path=auto in place of its ckpt_path="),
        (("overwrite=true",), "the same command without overwrite= and ckpt_path=auto"),
    ],
)
def test_a_sweep_that_is_stopped_says_how_it_goes_on(
    ic: Run, tmp_path: Path, capfd: Capture, given: tuple[str, ...], how: str
) -> None:
    """Not with `last`, which the jobs that have not begun do not have."""

    def stop(alarm: int, frame: FrameType | None) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # no job runs yet
        else:
            os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        assert ic(*SHORT, *given, "-m", "seed=0,1") != 0
    finally:
        signal.signal(signal.SIGALRM, previous)
    captured = capfd.readouterr()
    assert f"sweep: continue with {how}: a job goes on from its last" in captured.err
    assert "job 2 of 2" not in captured.err
    assert "not begun" in captured.out
