"""The project's own sbatch files on a real SLURM: requeue, node failure, sweep, accounting."""

from __future__ import annotations

import csv
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from ic.doctor import slurm
from ic.files.json_lines import read_rows
from tests.conftest import SHORT
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
# The curriculum changes its length on the way, so the resumed part depends on its state.
RUN = (
    *SHORT[1:],
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=20",
    "callbacks.checkpoint.every_n_steps=5",
    "callbacks.context_length.check_every_n_steps=10",
    "callbacks.context_length.threshold=0.0001",
    "callbacks.memory=null",
    "overwrite=false",
)


class Jobs:
    """Submits the repository's scripts and reads what they leave in one folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        cluster.environment |= {"IC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def submit(self, script: str, *overrides: str, options: tuple[str, ...] = ()) -> str:
        return self.cluster.call(
            "sbatch",
            "--parsable",
            "--gres=gpu:1",
            "--cpus-per-task=1",
            f"--output={self.folder}/%x-%j.log",
            *options,
            f"slurm/{script}.sbatch",
            *overrides,
            cwd=ROOT,
        )

    def pretrain(self, *overrides: str) -> str:
        options = ("--nodes=2", "--ntasks-per-node=1")
        return self.submit(
            "train_pretrain", *RUN, f"output_dir={self.folder}", *overrides, options=options
        )

    def run(self, run_id: str) -> Path:
        return self.folder / "debug" / run_id

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}.log"))

    def wait_for(self, job: str, state: str) -> None:
        def reached() -> bool:
            now = self.cluster.state(job)
            assert now in (state, "PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), (
                f"{now}\n{self.log(job)}"
            )
            return now == state

        self.cluster.until(reached)

    def release(self, job: str) -> None:
        """A requeued job waits two minutes; let it begin sooner.

        Not in the second of its requeue: slurmd would refuse it, because it revokes a job's
        credentials up to the present second ("Job credential revoked").
        """
        self.cluster.until(lambda: self.cluster.reason(job) == "BeginTime", job)
        self.cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def accounts(self, job: str) -> list[str]:
        """sacct's states of each start of a job that has come to its end, the last one last."""
        states: list[str] = []

        def settled() -> bool:  # slurmdbd hears of the end after squeue does
            rows = self.cluster.call("sacct", "-nXDP", "-j", job, "--format=State").splitlines()
            states[:] = [row.split()[0] for row in rows]
            return bool(states) and not {"PENDING", "RUNNING"} & set(states)

        self.cluster.until(settled)
        return states


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> dict[int, tuple[str, str]]:
    job = jobs.pretrain("run_id=undisturbed")
    jobs.wait_for(job, "COMPLETED")
    assert jobs.accounts(job) == ["COMPLETED"]
    assert "continuing from" not in jobs.log(job)
    losses = losses_of(jobs.run("undisturbed"))
    assert sorted(losses) == list(range(STEPS))
    assert {length for _, length in losses.values()} == {"128.0", "256.0"}
    return losses


def losses_of(run: Path) -> dict[int, tuple[str, str]]:
    rows = list(csv.DictReader((run / "csv" / "metrics.csv").open()))
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {
        int(row["step"]): (row["train/loss"], row["train/context_length"])
        for row in rows
        if row["train/loss"]
    }


def checkpoint_at(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step={step}").is_dir()


def is_logged(run: Path, step: int) -> bool:
    """Whether a file that is being written has a line of the step."""
    rows = csv.DictReader((run / "csv" / "metrics.csv").read_text().splitlines())
    return any(row.get("step") == str(step) for row in rows)


def test_a_signal_to_one_rank_requeues_and_resumes_exactly(
    jobs: Jobs, undisturbed: dict[int, tuple[str, str]]
) -> None:
    job = jobs.pretrain("logger=wandb")  # without run_id: the job's number is the run's
    run = jobs.run(job)
    after = random.choice((5, 10))
    jobs.cluster.until(lambda: checkpoint_at(run, after), job)
    (rank,) = jobs.cluster.tasks(job, SLURM_PROCID="1")
    os.kill(rank.pid, signal.SIGUSR1)
    jobs.release(job)
    stopped = int(os.readlink(run / "checkpoints/last").removeprefix("step="))
    assert after < stopped < STEPS
    assert not list((run / "checkpoints").glob("*partial*"))
    jobs.wait_for(job, "COMPLETED")

    log = jobs.log(job)
    assert log.count(f"requeueing job {job}") == 1
    assert f"continuing from {run / 'checkpoints' / f'step={stopped}'}" in log
    assert "restart 0, run_id" in log
    assert "restart 1, run_id" in log
    assert losses_of(run) == undisturbed
    assert jobs.accounts(job) == ["REQUEUED", "COMPLETED"]

    # One run of W&B's, with every step once and the ids of the job.
    kept = read_rows(run / "tracking/wandb/spool.jsonl")
    steps = [m["step"] for m in kept if m["kind"] == "metrics" and "train/loss" in m["values"]]
    assert steps == list(range(STEPS))
    tags = [m["values"] for m in kept if m["kind"] == "tags" and "slurm.job_id" in m["values"]]
    assert [each["slurm.job_id"] for each in tags] == [str(job)] * 2
    assert tags[1]["slurm.restarts"] == "1"


def test_a_node_that_fails_is_survived(jobs: Jobs, undisturbed: dict[int, tuple[str, str]]) -> None:
    job = jobs.pretrain("run_id=node-failure")
    run = jobs.run("node-failure")
    # Lightning logs a step after the checkpoint of that step: wait for the step behind it.
    jobs.cluster.until(lambda: checkpoint_at(run, 10) and is_logged(run, 10), job)
    nodes = jobs.cluster.call("squeue", "-h", "-j", job, "-o", "%N")
    last = jobs.cluster.call("scontrol", "show", "hostnames", nodes).split()[-1]
    jobs.cluster.fail(last, job)
    jobs.release(job)
    periodic = int(os.readlink(run / "checkpoints/last").removeprefix("step="))
    assert periodic % 5 == 0
    jobs.wait_for(job, "COMPLETED")
    assert f"continuing from {run / 'checkpoints' / f'step={periodic}'}" in jobs.log(job)
    assert "requeueing job" not in jobs.log(job)
    assert losses_of(run) == undisturbed
    assert jobs.accounts(job)[-1] == "COMPLETED"
    assert len(jobs.accounts(job)) == 2


def test_an_evaluation_is_requeued_by_its_shell(
    jobs: Jobs, undisturbed: dict[int, tuple[str, str]]
) -> None:
    checkpoint = jobs.run("undisturbed") / "checkpoints" / "last"
    job = jobs.submit(
        "eval_passkey",
        f"checkpoint={checkpoint}",
        f"output={jobs.folder}/passkey",
        "evaluation.lengths=[256]",
        "evaluation.depths=[0.5]",
        "evaluation.samples=1",
        "evaluation.control_samples=0",
    )
    jobs.cluster.until(lambda: jobs.cluster.tasks(job), job)
    jobs.cluster.call("scancel", "-s", "USR1", "--batch", job)
    jobs.release(job)
    jobs.wait_for(job, "COMPLETED")
    assert jobs.accounts(job) == ["REQUEUED", "COMPLETED"]
    assert (jobs.folder / "passkey/heatmap.png").is_file()
    assert len((jobs.folder / "passkey/samples.jsonl").read_text().splitlines()) == 2


def test_alignment_jobs_run_the_experiment_asked_for(jobs: Jobs) -> None:
    submitted = {
        name: jobs.submit(
            f"train_{name}",
            f"experiment={name}_tiny",
            f"output_dir={jobs.folder}",
            "trainer.max_steps=1",
        )
        for name in ("sft", "dpo")
    }
    for name, job in submitted.items():
        jobs.wait_for(job, "COMPLETED")
        last = jobs.folder / f"{name}_tiny" / job / "checkpoints" / "last"
        assert os.readlink(last) == "step=1"


def test_doctor_examines_the_cluster(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", jobs.cluster.environment["SLURM_CONF"])
    found = {each.what: each for each in slurm.controller()}
    assert {each.status for each in found.values()} == {"ok"}, found
    assert set(found) == {"slurmctld", "JobRequeue", "KillWait", "partition gpu", "munge"}
    assert found["partition gpu"].found == "UP, 3 nodes, at most UNLIMITED"
    assert found["KillWait"].found == "5 s"


def test_an_array_sweeps(jobs: Jobs) -> None:
    sweep = jobs.folder / "sweep.txt"
    sweep.write_text("# two rates\noptimizer.lr=1e-3\n\noptimizer.lr=2e-3 seed=1\n")
    array = jobs.submit(
        "sweep",
        str(sweep),
        *RUN,
        f"output_dir={jobs.folder}",
        "trainer.max_steps=3",
        "callbacks.passkey=null",
        options=("--array=1-3",),
    )
    for task in (1, 2):
        jobs.wait_for(f"{array}_{task}", "COMPLETED")
        text = (jobs.run(f"{array}-{task}") / "config.yaml").read_text()
        assert f"  lr: {('0.001', '0.002')[task - 1]}\n" in text
        assert f"\nseed: {task - 1}\n" in text
    jobs.wait_for(f"{array}_3", "FAILED")
    jobs.accounts(array)
    rows = jobs.cluster.call("sacct", "-nXP", "-j", array, "--format=JobID,State,ExitCode")
    assert rows.splitlines() == [
        f"{array}_1|COMPLETED|0:0",
        f"{array}_2|COMPLETED|0:0",
        f"{array}_3|FAILED|2:0",
    ]
