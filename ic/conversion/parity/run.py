"""Measure an original and its conversion on the same inputs, and write the report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ic.checkpoint.model_card import refresh_card
from ic.conversion.parity.answers import answer_instructions, answer_row, answered, answers_page
from ic.conversion.parity.cache_bytes import cache_rows, weight_row
from ic.conversion.parity.figure import draw
from ic.conversion.parity.instructions import shipped_instructions
from ic.conversion.parity.options import (
    CACHE,
    INSTRUCTIONS,
    LOGITS,
    NIAH,
    PASSKEY,
    SPEED,
    TURNS,
    WEIGHTS,
    ParityConfig,
)
from ic.conversion.parity.pair import Pair, open_pair
from ic.conversion.parity.progress import steps
from ic.conversion.parity.report import HEAD, document, headline
from ic.conversion.parity.retrieval import answer_suites, build_suites
from ic.conversion.parity.speed import measurements, speed_rows
from ic.conversion.parity.texts import Texts, draw_texts, read_texts, text_rows, tokens_file
from ic.conversion.parity.turns import turn_rows
from ic.evaluation.comparison.compare import Comparison
from ic.evaluation.comparison.words import sentences
from ic.files.atomic_write import replacing, write_json
from ic.files.results import describe_run
from ic.files.run_folder import ParityFolder

Row = dict[str, Any]


def measure_parity(config: ParityConfig, *, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure two models, write `report.md`, `parity.json` and `parity.png` -> what the JSON holds.

    What an interrupted measurement of the same models has left in the folder is not measured again,
    but for the cache, the conversations and the speed, which take seconds.

    Args:
        notes: sentences that the report has to say, such as what the text is.

    Raises:
        ValueError: before weights are loaded, for sources, tokenizers, lengths and texts that do
            not fit; after that for weights that are damaged, or a folder of other models.
    """
    folder = ParityFolder(config.output)
    opened = open_pair(config, folder)
    texts = draw_texts(config, opened.tokenizer) if LOGITS in opened.parts else None
    suites = None
    if {PASSKEY, NIAH} & set(opened.parts):
        suites = build_suites(config, opened.parts, opened.tokenizer, opened.positions)
    pair = opened.load(folder)
    rows: list[Row] = []
    comparison: Comparison | None = None
    if texts is not None:
        rows += _logits(config, pair, texts, folder)
    if WEIGHTS in pair.parts:
        rows.append(weight_row(pair))
    if CACHE in pair.parts:
        rows += cache_rows(pair, config.context_tokens)
    if suites is not None:
        retrieval = answer_suites(config, pair, suites, folder)
        comparison = retrieval.comparison
        rows += retrieval.rows
        rows += [_comparison_row(group.columns, comparison) for group in comparison.groups]
    if INSTRUCTIONS in pair.parts:
        rows.append(_instructions(config, pair, folder))
    if TURNS in pair.parts:
        with steps("turns", "answers", config.conversations * config.turns) as on_turn:
            rows += turn_rows(config, pair, on_turn)
    if SPEED in pair.parts:
        with steps("speed", "measurements", measurements(config, pair)) as on_measurement:
            rows += speed_rows(config, pair, on_measurement)
    results = {
        **describe_run(asdict(config), public=True),
        "models": {name: side.facts() for name, side in pair.sides.items()},
        "parts": list(pair.parts),
        "notes": [*pair.notes, *notes],
        "words": [] if comparison is None else sentences(comparison),
        "shown": {"heads": HEAD, "lines": headline(rows)},  # what a model card shows
        "rows": rows,
    }
    title = f"{pair.converted.name} against {pair.original.name}"
    picture = draw(rows, folder.picture, title=title)
    with replacing(folder.document) as partial:
        partial.write_text(document(results, comparison, picture=picture), encoding="utf-8")
    write_json(folder.results, results)
    refresh_card(folder)
    return results


def _logits(config: ParityConfig, pair: Pair, texts: Texts, folder: ParityFolder) -> list[Row]:
    left = texts.tokens_left(lambda each: tokens_file(folder, pair, each).is_file())
    with steps("logits", "tokens", left) as on_tokens:
        distances = read_texts(pair, texts, config, folder, on_tokens)
    return text_rows(texts, distances, config, pair.both_positions)


def _instructions(config: ParityConfig, pair: Pair, folder: ParityFolder) -> Row:
    known = answered(config, pair, folder)
    asked = shipped_instructions()[: config.instructions]
    left = sum(each.instruction not in known for each in asked)
    with steps("instructions", "answers", left) as on_answers:
        answers = answer_instructions(config, pair, folder, on_answers)
    page = answers_page(answers, pair.original.name, pair.converted.name)
    with replacing(folder.answers_page) as partial:
        partial.write_text(page, encoding="utf-8")
    return answer_row(answers)


def _comparison_row(columns: Row, comparison: Comparison) -> Row:
    """With whether the row is of all samples of its suite."""
    of_suite = [g for g in comparison.groups if g.suite == columns["suite"]]
    whole = len(of_suite) == 1 or (columns["task"] is None and columns["length_tokens"] is None)
    return {**columns, "whole_suite": whole}
