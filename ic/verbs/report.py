"""one page of a run, to be sent: configuration, curves, heatmap, memory, throughput"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POSITIONAL = ("run",)


@dataclass
class Config:
    """The verb `report`: `report.html` of a run, which `fit` writes as it ends, made anew.

    It shows what is there, so it may be made while the run trains, and again after `evaluate`.

    Attributes:
        run: the run's folder.
        output: the file; by default `report.html` in the run's folder.
    """

    run: str = "???"
    output: str | None = None

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"output={self.output}: is a folder; give a file such as report.html")


def run(config: Config) -> int:
    """Write the page, and the curves as a picture into the run's folder."""
    from rich.console import Console

    from ic.files.run_folder import RunFolder
    from ic.run.report.page import write_report

    output = None if config.output is None else Path(config.output)
    path = write_report(RunFolder(config.run), output=output)
    Console().print(f"report: {path}", highlight=False, soft_wrap=True)
    return 0
