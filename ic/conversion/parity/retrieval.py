"""Needles: the suites passkey and niah answered by both models, compared sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ic.conversion.parity.options import NIAH, PASSKEY, SUITES, ParityConfig
from ic.conversion.parity.pair import Pair, Side
from ic.datamodules.text_files import TextFiles, detect_format, expand_folders, resolve_files
from ic.evaluation.answered import cell_fields
from ic.evaluation.comparison.answers import SuiteAnswers, answer_of
from ic.evaluation.comparison.compare import Comparison, compare
from ic.evaluation.niah.haystack import Haystack, haystack_of, noise_haystack
from ic.evaluation.niah.suite import NiahSuite
from ic.evaluation.passkey.suite import PasskeySuite
from ic.evaluation.progress import suite_progress
from ic.evaluation.report import write_report
from ic.evaluation.report_page import Measured, shown
from ic.evaluation.runner import identity_of, run_suite, settings_hash
from ic.evaluation.suite import Suite
from ic.files.results import write_results
from ic.files.run_folder import ParityFolder, SuiteFolder

Row = dict[str, Any]


@dataclass(frozen=True)
class Retrieval:
    """What came out.

    Attributes:
        rows: of each suite and side, with the side under `model`.
        comparison: of the samples that both models answered.
    """

    rows: list[Row]
    comparison: Comparison


def build_suites(
    config: ParityConfig,
    parts: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    positions: Mapping[str, int],
) -> dict[str, dict[str, Suite[Any]]]:
    """For each side the suites that are asked for, at the lengths that it has positions for.

    Args:
        parts: that are measured.
        tokenizer: of both sides.
        positions: of each side, by its name.

    Raises:
        ValueError: what a suite cannot ask these models.
    """
    haystack = _haystack(config) if NIAH in parts else None
    found: dict[str, dict[str, Suite[Any]]] = {}
    for name, most in positions.items():
        lengths = _lengths(config, most)
        suites: dict[str, Suite[Any]] = {}
        if PASSKEY in parts:
            suites[PASSKEY] = PasskeySuite(config.passkey_options(lengths))
        if haystack is not None:
            suites[NIAH] = NiahSuite(config.niah_options(lengths), haystack)
        for suite in suites.values():
            suite.check(tokenizer, most)
        found[name] = suites
    return found


def answer_suites(
    config: ParityConfig, pair: Pair, suites: dict[str, dict[str, Suite[Any]]], folder: ParityFolder
) -> Retrieval:
    """Both models answer; samples that the folder holds are not answered again.

    Each suite of a side has a folder of its own, as `evaluate` writes it, which `compare` reads.
    """
    rows: list[Row] = []
    answered: dict[str, dict[str, SuiteAnswers]] = {name: {} for name in pair.sides}
    for part in SUITES:
        for name, side in pair.sides.items():
            if part in suites[name]:
                print(f"{part}, {name}: {side.name}", flush=True)
                suite = suites[name][part]
                cells = _answer(config, pair, name, side, suite, folder)
                rows += [{**row, "model": name} for row in suite.rows(cells)]
                answered[name][part] = _answers(suite, side, cells, folder.suite(name, part))
    comparison = compare(answered["original"], answered["converted"], seed=config.seed)
    return Retrieval(rows, comparison)


def _answer(
    config: ParityConfig, pair: Pair, name: str, side: Side, suite: Suite[Any], folder: ParityFolder
) -> list[Row]:
    """Rows of the suite's cells, written into its folder as `evaluate` does."""
    of_suite = folder.suite(name, suite.name)
    with suite_progress(suite) as on_sample:
        cells = run_suite(side.model, pair.tokenizer, suite, of_suite.samples, on_sample)
    title = f"{name}, {side.name}: {suite.title}"
    write_report(suite, cells, of_suite, title=title, trained_length=side.trained_length)
    options = getattr(config, f"{suite.name}_options")(_lengths(config, side.positions))
    about = {
        "suite": suite.name,
        "evaluation": asdict(options),
        "identity": identity_of(side.model, side.weights, pair.tokenizer, suite),
        "model": asdict(
            Measured(side.name, side.published_source, side.weights, side.trained_length)
        ),
    }
    said = {**asdict(config), **about}
    write_results(of_suite.results, said, suite.rows(cells), shown=shown(suite, cells), public=True)
    return cells


def _answers(suite: Suite[Any], side: Side, cells: list[Row], folder: SuiteFolder) -> SuiteAnswers:
    """The answers of these cells alone: the folder may hold those of other lengths."""
    samples = [
        {**cell_fields(cell), "index": index, **answer}
        for cell in cells
        for index, answer in enumerate(cell["answers"])
    ]
    answers = {each.key: each for each in map(answer_of, suite.counted(samples))}
    settings = settings_hash(suite)
    return SuiteAnswers(suite.name, folder.path, side.weights, settings, None, {}, answers)


def _lengths(config: ParityConfig, positions: int) -> list[int]:
    """Those that a model has positions for."""
    return [length for length in config.retrieval_lengths if length <= positions]


def _haystack(config: ParityConfig) -> Haystack:
    """The user's text; without one, noise.

    Raises:
        ValueError: there is none in the files.
    """
    if not config.text:
        return noise_haystack()
    files = resolve_files(expand_folders(config.text, "text"), "text")
    kind = detect_format(files, config.format, "text", "")
    texts = TextFiles(files, kind, config.text_column, config.document_unit, "")
    haystack = haystack_of(texts, repeat=True)
    if haystack is None:
        raise ValueError(f"text={config.text}: there is no text in it")
    return haystack
