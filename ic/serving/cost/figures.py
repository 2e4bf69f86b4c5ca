"""Prices and rates -> dollars per million tokens and per run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ic.serving.cost.interruptions import best_interval, expected_seconds
from ic.serving.cost.measured import ServingRate, TrainingRate
from ic.serving.cost.options import CostOptions, OfferOptions

Row = dict[str, Any]
_HOUR_S = 3600.0
_NEEDS_BOTH = "a spot offer: give checkpoint_s= and restart_s=, which are not measured here"
_NEEDS_RESTART = "a spot offer: give restart_s=, which is not measured here"


def cost_rows(
    options: CostOptions, serving: Sequence[ServingRate], training: Sequence[TrainingRate]
) -> list[Row]:
    """A row per offer and measurement on its type of GPU; an offer without any has a row that says
    what is missing.
    """
    rows: list[Row] = []
    for name, offer in options.cost.offers.items():
        found = [
            *(_serving(name, offer, rate, options) for rate in serving if rate.gpu == offer.gpu),
            *(_training(name, offer, rate, options) for rate in training if rate.gpu == offer.gpu),
        ]
        for what, rates in (("serving", serving), ("training", training)):
            if not any(rate.gpu == offer.gpu for rate in rates):
                missing = f"no {what} was measured on {offer.gpu}"
                found.append({"what": what, "offer": name, "gpu": offer.gpu, "refused": missing})
        rows += found
    return rows


def cheapest(rows: Sequence[Row], options: CostOptions) -> Row | None:
    """Of the serving rows that meet the targets, the one that costs least."""
    key = f"{options.by}_dollars_per_million"
    known = [row for row in rows if row.get("meets_targets") and row.get(key) is not None]
    return min(known, key=lambda row: row[key], default=None)


def cheapest_training(rows: Sequence[Row], options: CostOptions) -> list[Row]:
    """Of the training rows with the context asked for, the one of each model that costs least."""
    least = options.context_tokens or 0
    known = [
        row
        for row in rows
        if row["what"] == "training" and "refused" not in row and row["context_tokens"] >= least
    ]
    best: dict[str, Row] = {}
    for row in sorted(known, key=lambda row: row["dollars_per_million"]):
        best.setdefault(row["model"].partition(",")[0], row)
    return list(best.values())


def _machines(offer: OfferOptions, gpus: int) -> tuple[int, float, float]:
    """Of a job of so many GPUs: machines, dollars per second, seconds between interruptions."""
    assert offer.gpus is not None
    assert offer.dollars_per_hour is not None
    assert offer.interruptions_per_hour is not None
    machines = math.ceil(gpus / offer.gpus)
    per_s = machines * offer.dollars_per_hour / _HOUR_S
    rate = machines * offer.interruptions_per_hour
    return machines, per_s, _HOUR_S / rate if rate else math.inf


def _of_a_rate(what: str, name: str, machines: int, rate: ServingRate | TrainingRate) -> Row:
    """What a row says first, of either kind."""
    return {
        "what": what,
        "offer": name,
        "gpu": rate.gpu,
        "gpus": rate.gpus,
        "machines": machines,
        "model": rate.model,
        "context_tokens": rate.context_tokens,
    }


def _serving(name: str, offer: OfferOptions, rate: ServingRate, options: CostOptions) -> Row:
    # A machine with more GPUs than the server uses runs as many servers as fit.
    assert offer.gpus is not None
    machines, per_s, between_s = _machines(offer, rate.gpus)
    servers = max(1, offer.gpus // rate.gpus)
    row = _of_a_rate("serving", name, machines, rate) | {
        "batch": rate.batch,
        "first_token_p95_s": rate.first_token_p95_s,
        "per_token_p95_s": rate.per_token_p95_s,
        "file": rate.file,
    }
    if math.isfinite(between_s):
        if options.restart_s is None:
            return {**row, "refused": _NEEDS_RESTART}
        # While it begins again a machine is paid for, and serves nobody.
        row["loss_share"] = options.restart_s / (between_s + options.restart_s)
        per_s /= 1 - row["loss_share"]
    for kind, tokens_per_s in (
        ("prefill", rate.prefill_tokens_per_s),
        ("decode", rate.decode_tokens_per_s),
        ("answer", rate.answer_tokens_per_s),
    ):
        dollars = None if not tokens_per_s else per_s / (servers * tokens_per_s) * 1e6
        row[f"{kind}_dollars_per_million"] = dollars
    row["meets_targets"] = all(_targets(options, rate))
    return row


def _targets(options: CostOptions, rate: ServingRate) -> Iterator[bool]:
    yield options.context_tokens is None or rate.context_tokens >= options.context_tokens
    yield options.first_token_s is None or rate.first_token_p95_s <= options.first_token_s
    yield options.per_token_s is None or rate.per_token_p95_s <= options.per_token_s


def _training(name: str, offer: OfferOptions, rate: TrainingRate, options: CostOptions) -> Row:
    machines, per_s, between_s = _machines(offer, rate.gpus)
    row = _of_a_rate("training", name, machines, rate) | {
        "tokens_per_s": rate.tokens_per_s,
        "file": rate.file,
    }
    slower = 1.0
    if math.isfinite(between_s):
        checkpoint_s, restart_s = options.checkpoint_s, options.restart_s
        if checkpoint_s is None or restart_s is None:
            return {**row, "refused": _NEEDS_BOTH}
        best_s = best_interval(checkpoint_s, between_s)
        every_s = options.checkpoint_every_s or best_s
        slower = expected_seconds(1.0, every_s, checkpoint_s, restart_s, between_s)
        if not math.isfinite(slower):
            return {**row, "refused": "it would hardly ever get to its next checkpoint"}
        row |= {
            "best_checkpoint_every_s": best_s,
            "checkpoint_every_s": every_s,
            "loss_share": 1 - 1 / slower,
        }
    row["dollars_per_million"] = slower * per_s / rate.tokens_per_s * 1e6
    if options.tokens is not None:
        row["run_hours"] = slower * options.tokens / rate.tokens_per_s / _HOUR_S
        row["run_dollars"] = row["dollars_per_million"] * options.tokens / 1e6
    return row
