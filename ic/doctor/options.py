"""What `doctor` is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DoctorOptions:
    """The verb `doctor`.

    Attributes:
        output_dir: where runs will be written.
        run: a run's folder; what SLURM leaves a job to end is compared with the longest step that
            it measured.
        json: print findings for a program.
    """

    output_dir: str = "runs"
    run: str | None = None
    json: bool = False
