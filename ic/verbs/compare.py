"""two models on the same samples: which is better where, by how much, how sure"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ic.errors import check_once

POSITIONAL = ("first", "second")


@dataclass
class Config:
    """The verb `compare`: two models, A and B, that were evaluated on the same samples.

    Attributes:
        first: A: a folder that `evaluate` wrote, of one suite or of several, or a run's folder, of
            which the last step that was evaluated counts.
        second: B, as `first`.
        suites: the suites to compare; an empty list is all that both were measured on, and those
            of them that cannot be compared are named and left out.
        output: folder of the report; by default `runs/compare/<A>_vs_<B>`.
        seed: of the resampling.
        resamples: of the bootstrap of each line; also the most exchanges of two scores that are
            tried for its probability.
    """

    first: str = "???"
    second: str = "???"
    suites: list[str] = field(default_factory=list)
    output: str | None = None
    seed: int = 0
    resamples: int = 9999

    def __post_init__(self) -> None:
        check_once("suites", self.suites)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if not 100 <= self.resamples <= 1_000_000:
            raise ValueError(f"resamples={self.resamples}: must be from 100 to 1,000,000")


def run(config: Config) -> int:
    """Compare; print sentences and a table, write a report."""
    from rich.console import Console

    from ic.display.table import print_table
    from ic.evaluation.comparison.answers import find_answers
    from ic.evaluation.comparison.compare import compare, in_common
    from ic.evaluation.comparison.perplexity_words import PERPLEXITY_HEADS, perplexity_lines
    from ic.evaluation.comparison.report import check_folder, names_of, write_report
    from ic.evaluation.comparison.words import HEADS, lines, notes, sentences
    from ic.files.run_folder import ComparisonFolder

    paths = Path(config.first), Path(config.second)
    sides = find_answers(paths[0]), find_answers(paths[1])
    first, second = in_common(*sides, config.suites)
    names = names_of(*paths)
    folder = ComparisonFolder(config.output or Path("runs/compare") / "_vs_".join(names))
    check_folder(folder, first, second)
    comparison = compare(*sides, asked=config.suites, seed=config.seed, resamples=config.resamples)
    write_report(comparison, first, second, folder, asdict(config), names)

    console = Console()
    for name, path in (("A", config.first), ("B", config.second)):
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    if comparison.groups:
        print_table(HEADS, lines(comparison), title="paired by sample", fixed=2, console=console)
    if comparison.curves:
        losses = perplexity_lines(comparison.curves)
        title = "perplexity, paired by document"
        print_table(PERPLEXITY_HEADS, losses, title=title, fixed=3, console=console)
    for sentence in (*sentences(comparison), *notes(comparison)):
        console.print(sentence, highlight=False)
    console.print(f"report: {folder.document}", highlight=False, soft_wrap=True)
    return 0
