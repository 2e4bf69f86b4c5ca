"""Compared perplexities in words and as lines of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ic.display.numbers import probability, tokens
from ic.evaluation.comparison.losses import Band, Curve
from ic.evaluation.perplexity.curve import perplexity_text

PERPLEXITY_HEADS = ["task", "tokens", "positions", "n", "A", "B", "B - A", "95 %", "p", "better"]


def perplexity_phrase(curve: Curve) -> str:
    """`B's perplexity is 3.1 % lower at 2k (12.31 against 12.70 over 10 documents, 95 % between 2.2
    and 4.0 % lower, p = 0.002; lower in 4 of 5 bands of positions, most at 1-127 (5.0 %))`.
    """
    whole, at = curve.whole, tokens(curve.length_tokens)
    texts = {"A": perplexity_text(math.exp(whole.first))}
    texts["B"] = perplexity_text(math.exp(whole.second))
    documents = f"over {whole.n} document{'s' * (whole.n > 1)}"
    if whole.low_95 is None or whole.high_95 is None:
        return (
            f"at {at} one document alone was read ({texts['A']} against {texts['B']}), which does "
            "not tell them apart"
        )
    if curve.better is None:
        return (
            f"at {at} no difference can be seen ({texts['A']} against {texts['B']} {documents}; "
            f"B's 95 % between {_change(whole.low_95)} and {_change(whole.high_95)})"
        )
    # From the better one's side; what is lower by a difference d is lower by 1 - exp(-|d|).
    sign = 1 if curve.better == "A" else -1
    other = "B" if curve.better == "A" else "A"
    near, far = sorted((sign * whole.low_95, sign * whole.high_95))
    p = probability(curve.p_adjusted)
    sure = p if p.startswith("<") else f"= {p}"
    lower = [band for band in curve.bands if band.side == sign]
    higher = [band for band in curve.bands if band.side == -sign]
    by_position = ""
    if len(curve.bands) > 1:
        most = max(curve.bands, key=lambda band: sign * band.difference)
        by_position = f"; lower in {len(lower)} of {len(curve.bands)} bands of positions"
        by_position += f", higher in {len(higher)}" if higher else ""
        by_position += f", most at {positions(most)} ({_share(sign * most.difference)})"
    return (
        f"{curve.better}'s perplexity is {_share(sign * whole.difference)} lower at {at} "
        f"({texts[curve.better]} against {texts[other]} {documents}, 95 % between "
        f"{_share(near)} and {_share(far)} lower, p {sure}{by_position})"
    )


def perplexity_lines(curves: Sequence[Curve]) -> list[list[str]]:
    """A line of a table for each curve and each of its bands, under `PERPLEXITY_HEADS`."""
    return [
        [
            curve.task,
            f"{curve.length_tokens:,}",
            "all" if band is curve.whole else positions(band),
            str(band.n),
            perplexity_text(math.exp(band.first)),
            perplexity_text(math.exp(band.second)),
            _signed(band.difference),
            "-"
            if band.low_95 is None or band.high_95 is None
            else f"{_signed(band.low_95)} to {_signed(band.high_95)}",
            probability(curve.p_adjusted) if band is curve.whole else "",
            (curve.better or "-") if band is curve.whole else "",
        ]
        for curve in curves
        for band in (curve.whole, *curve.bands)
    ]


def positions(band: Band) -> str:
    """`128-255`."""
    return f"{band.from_token:,}-{band.to_token - 1:,}"


def _share(difference: float) -> str:
    """A loss that is so many nats lower -> `3.1 %` of the perplexity."""
    return f"{100 * (1 - math.exp(-difference)):.1f} %"


def _change(difference: float) -> str:
    """`3.1 % lower`."""
    change = 100 * math.expm1(difference)
    return f"{abs(change):.1f} % {'lower' if change < 0 else 'higher'}"


def _signed(difference: float) -> str:
    """`-3.1 %` of the perplexity."""
    return f"{100 * math.expm1(difference):+,.1f} %"
