"""check versions, GPUs, NCCL, file system and SLURM, and say what to fix"""

from __future__ import annotations

from ic.doctor.options import DoctorOptions as Config


def run(config: Config) -> int:
    from ic.doctor.examination import doctor

    return doctor(config)
