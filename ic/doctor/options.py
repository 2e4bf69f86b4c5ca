"""What `doctor` is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DoctorOptions:
    """The verb `doctor`.

    Attributes:
        output_dir: where runs will be written.
        json: print findings for a program.
    """

    output_dir: str = "runs"
    json: bool = False
