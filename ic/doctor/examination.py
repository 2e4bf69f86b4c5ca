"""All checks of `python -m ic doctor`."""

from __future__ import annotations

from functools import partial, update_wrapper
from pathlib import Path

from ic.doctor import (
    containers,
    filesystem,
    gpu,
    gpu_services,
    machine,
    monitoring,
    slurm,
    slurm_node,
    versions,
)
from ic.doctor.check import Check, examine, show
from ic.doctor.options import DoctorOptions
from ic.doctor.step_time import longest_step
from ic.files.run_folder import RunFolder


def checks(config: DoctorOptions) -> list[Check]:
    """
    Raises:
        ValueError: `run` is no folder of a run that has measured its steps.
    """
    output = partial(filesystem.output_directory, Path(config.output_dir))
    update_wrapper(output, filesystem.output_directory)
    step_s = None if config.run is None else longest_step(RunFolder(config.run))
    controller = partial(slurm.controller, step_s)
    update_wrapper(controller, slurm.controller)
    return [
        versions.python_version,
        versions.package_versions,
        gpu.driver,
        gpu.gpus,
        gpu.nccl,
        gpu_services.gpu_services,
        output,
        machine.shared_memory,
        machine.limits,
        machine.clock,
        controller,
        slurm_node.node,
        containers.docker,
        containers.k3s,
        monitoring.monitoring,
    ]


def doctor(config: DoctorOptions) -> int:
    """Examine this machine -> 0, or 1 if something will break a run."""
    findings = examine(checks(config))
    show(findings, as_json=config.json)
    return 1 if any(finding.status == "fail" for finding in findings) else 0
