"""All checks of `python -m ic doctor`."""

from __future__ import annotations

from functools import partial, update_wrapper
from pathlib import Path

from ic.doctor import filesystem, gpu, machine, slurm, versions
from ic.doctor.check import Check, examine, show
from ic.doctor.options import DoctorOptions


def checks(config: DoctorOptions) -> list[Check]:
    output = partial(filesystem.output_directory, Path(config.output_dir))
    update_wrapper(output, filesystem.output_directory)
    return [
        versions.python_version,
        versions.package_versions,
        gpu.driver,
        gpu.gpus,
        gpu.nccl,
        output,
        machine.shared_memory,
        machine.limits,
        machine.clock,
        slurm.controller,
    ]


def doctor(config: DoctorOptions) -> int:
    """Examine this machine -> 0, or 1 if something will break a run."""
    findings = examine(checks(config))
    show(findings, as_json=config.json)
    return 1 if any(finding.status == "fail" for finding in findings) else 0
