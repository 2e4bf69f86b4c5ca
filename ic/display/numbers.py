"""Numbers as tables, plots and lines on the terminal show them; `-` where there is none."""

from __future__ import annotations

from datetime import timedelta


def tokens(count: int) -> str:
    """A length in tokens: 128k, 1M; whole where it is no multiple of 1,024: 1,000."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return f"{count:,}"


def gib(nbytes: float | None, digits: int = 1, unit: str = " GiB") -> str:
    """Bytes in units of 2^30: 3.4 GiB. A column that names its unit leaves `unit` out."""
    return "-" if nbytes is None else f"{nbytes / 2**30:.{digits}f}{unit}"


def percent(share: float | None, digits: int = 0, sign: str = " %") -> str:
    """A share from 0 to 1: 41 %."""
    return "-" if share is None else f"{100 * share:.{digits}f}{sign}"


def probability(p: float) -> str:
    """`< 0.001`, or three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def short_number(value: float) -> str:
    """Three figures: 950, 12.3k, 1.25M."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if value >= scale * 0.9995:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def clock_text(seconds: float | None) -> str:
    """`0:01:05`, or `-:--:--` for None."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
