"""which version of an experiment is better in what, by how much, how sure: valid at every look"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ic.serving.ab.options import check_level

POSITIONAL = ("log",)
LOADS_PYTORCH = False


@dataclass
class Config:
    """The verb `ab analyse`: a report on the outcomes that `ab route` logged.

    Attributes:
        log: an experiment's folder, or its outcomes.jsonl.
        control: the version that others are compared with; null is the one that the log names.
        effect: a difference of shares and scores that matters, at which the intervals are
            narrowest; they are valid for any.
        effect_time: the same of times, as a share: 0.1 is a tenth longer.
        level: probability that any claim of the report is wrong, whenever and however often one
            looks.
        output: folder of the report; by default the log's.
    """

    log: str = "???"
    control: str | None = None
    effect: float = 0.05
    effect_time: float = 0.1
    level: float = 0.05
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("effect", "effect_time"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0 and at most 1")
        check_level("level", self.level)


def run(config: Config) -> int:
    """Compare; print sentences and a table, write a report."""
    from rich.console import Console

    from ic.display.table import print_table
    from ic.files.run_folder import ExperimentFolder
    from ic.serving.ab.analysis import analyse
    from ic.serving.ab.outcomes import read_log
    from ic.serving.ab.report import write_report
    from ic.serving.ab.words import HEADS, lines, notes, sentences

    path = Path(config.log)
    file = ExperimentFolder(path).outcomes if path.is_dir() else path
    log = read_log(file, config.control)
    compared = analyse(
        log, effect=config.effect, effect_time=config.effect_time, alpha=config.level
    )
    folder = ExperimentFolder(config.output or file.parent)
    write_report(log, compared, folder, asdict(config), config.level)

    console = Console()
    if compared:
        print_table(HEADS, lines(compared), title="users are the units", fixed=2, console=console)
    else:
        console.print(f"only {log.versions[0]} has outcomes so far: nothing to compare")
    for sentence in (*sentences(compared, log.versions[0]), *notes(log, compared, config.level)):
        console.print(sentence, highlight=False)
    console.print(f"report: {folder.document}", highlight=False, soft_wrap=True)
    return 0
