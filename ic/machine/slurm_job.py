"""What SLURM says about the job this process runs in: placement, end, restarts, requeue.

Lightning's `SLURMEnvironment` finds ranks and the master from the same variables; here stand the
things it does not read. Works with SLURM 22.05 and later.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from dataclasses import dataclass

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

COMMAND_TIMEOUT_S = 30


class SlurmError(ValueError):
    """A SLURM command that failed, or a job laid out in a way that cannot be used."""


@dataclass(frozen=True)
class SlurmJob:
    """The job around this process.

    Attributes:
        job_id: what `scontrol` takes; of an array, the element's own number.
        num_nodes: nodes of the step.
        tasks_per_node: processes on each of them, one a GPU.
        restart_count: how often SLURM has started the job again.
    """

    job_id: str
    num_nodes: int
    tasks_per_node: int
    restart_count: int

    @classmethod
    def current(cls) -> SlurmJob | None:
        """The job, or None outside of SLURM, in an interactive shell and below torchrun.

        Raises:
            SlurmError: nodes with different numbers of tasks, or several tasks of which `srun`
                started none.
        """
        env = os.environ
        if "SLURM_JOB_ID" not in env or not SLURMEnvironment.detect():
            return None
        if TorchElasticEnvironment.detect():
            return None  # it gives each process its rank, whatever the job's tasks are
        tasks = int(env.get("SLURM_NTASKS") or "1")
        if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in env:
            raise SlurmError(
                f"job {env['SLURM_JOB_ID']} has {tasks} tasks, but srun did not start this "
                "process, so the others would never come: write `srun python -m ic ...` (or use "
                "slurm/launch.sh), or submit with --ntasks=1"
            )
        layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
        uniform = re.fullmatch(r"(\d+)(?:\(x\d+\))?", layout)
        if uniform is None:
            raise SlurmError(
                f"SLURM gave the nodes different numbers of tasks ({layout}); submit with "
                "--nodes=N --ntasks-per-node=M, M the number of GPUs of a node"
            )
        return cls(
            job_id=env["SLURM_JOB_ID"],
            num_nodes=int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES", "1")),
            tasks_per_node=int(uniform[1]),
            restart_count=int(env.get("SLURM_RESTART_COUNT", "0")),
        )

    def environment(self) -> SLURMEnvironment:
        """Lightning's view of the job, with its own requeue off: there is one handler, ours."""
        # Lightning insists on this variable, which SLURM sets only for --ntasks-per-node.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(self.tasks_per_node))
        return SLURMEnvironment(auto_requeue=False)

    def end_time(self) -> float | None:
        """When the time limit ends the job, seconds since the epoch; None without a limit.

        Raises:
            SlurmError: `squeue` is not there or does not answer.
        """
        shown = _call("squeue", "-h", "-j", self.job_id, "-o", "%e")
        try:
            return datetime.datetime.fromisoformat(shown).timestamp()
        except ValueError:  # N/A, NONE, Unknown
            return None

    def requeue(self) -> None:
        """Put the job back into the queue; SLURM then ends its processes.

        Raises:
            SlurmError: SLURM refuses, for example because the job was submitted with --no-requeue.
        """
        _call("scontrol", "requeue", self.job_id)


def _call(*command: str) -> str:
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env=environment,
        )
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"{' '.join(command)}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(command)}: {error}") from error
    return done.stdout.strip()
