"""regenerate the documents' tables and pictures from docs/results

So no figure in a document is typed by hand. What stands in `DOCUMENTS` between `<!-- table: NAME
-->` and `<!-- end -->` is rewritten, and so are the pictures and diagrams of `docs/images` and what
`plan` takes from measured runs (`ic/planning/measurements.json`); a test fails when one is stale.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ic.config.reference import configuration_reference
from ic.errors import UsageError
from ic.evaluation.registry import suite_names
from ic.files.atomic_write import replacing
from ic.planning.measurements import MEASUREMENTS, Measurements
from ic.studies.tables.deepseek import compression_table, design_table, paper_table
from ic.studies.tables.diagrams import DIAGRAMS
from ic.studies.tables.headline import headline_table
from ic.studies.tables.machine import (
    cache_table,
    plan_table,
    preference_table,
    scaling_table,
    training_table,
)
from ic.studies.tables.pictures import PICTURES
from ic.studies.tables.published import RESULTS, ROOT
from ic.studies.tables.retrieval import (
    ablation_table,
    alignment_table,
    needle_sweep_table,
    suite_table,
)
from ic.studies.tables.sparse_attention import sparse_attention_table, sparse_decode_table

TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(suite_table, name) for name in suite_names()},
    "headline": headline_table,
    "training": training_table,
    "cache": cache_table,
    "compression": compression_table,
    "design": design_table,
    "paper": paper_table,
    "plan": plan_table,
    "preference": preference_table,
    "scaling": scaling_table,
    "ablation": ablation_table,
    "alignment": alignment_table,
    "sparse_attention": sparse_attention_table,
    "sparse_decode": sparse_decode_table,
    "needle_sweep": needle_sweep_table,
    "configuration": lambda: configuration_reference(_verbs()),
}
DOCUMENTS = (
    "README.md",
    "docs/ablation.md",
    "docs/alignment.md",
    "docs/configuration.md",
    "docs/deepseek_v3.md",
    "docs/parallel.md",
    "docs/planning.md",
    "docs/results.md",
    "docs/sparse_attention.md",
)


def _verbs() -> dict[str, type]:
    """Each verb's dataclass."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    return {name: importlib.import_module(f"ic.verbs.{name}").Config for name in names}


def refresh(text: str) -> str:
    """A document with every marked table made anew.

    Raises:
        ValueError: a marker names no table.
    """

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


@dataclass
class Config:
    """Nothing to choose."""


def run(config: Config) -> int:
    if not RESULTS.is_dir():
        raise UsageError(f"tables rewrites the documents of a checkout, and {ROOT} is none")
    for document in (ROOT / name for name in DOCUMENTS):
        text = refresh(document.read_text())
        with replacing(document) as partial:
            partial.write_text(text)
    for picture in PICTURES:
        picture.draw()
    for name, draw in DIAGRAMS.items():
        with replacing(ROOT / "docs" / "images" / name) as partial:
            partial.write_text(draw())
    with replacing(MEASUREMENTS) as partial:
        partial.write_text(Measurements.of_results(RESULTS).as_json())
    return 0
