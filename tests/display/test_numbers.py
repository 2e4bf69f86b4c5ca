"""Numbers as a reader sees them."""

from __future__ import annotations

import pytest

from ic.display.numbers import clock_text, gib, percent, short_number, tokens


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (512, "512"),
        (1000, "1,000"),
        (1024, "1k"),
        (1536, "1,536"),
        (131072, "128k"),
        (2**20, "1M"),
        (3 * 2**20, "3M"),
        (2**20 + 1024, "1025k"),
    ],
)
def test_lengths(count: int, text: str) -> None:
    assert tokens(count) == text


def test_bytes() -> None:
    assert gib(3.44 * 2**30) == "3.4 GiB"
    assert gib(0, digits=2) == "0.00 GiB"
    assert gib(2**30, digits=2, unit="") == "1.00"
    assert gib(None) == "-"


def test_shares() -> None:
    assert percent(0.414) == "41 %"
    assert percent(0, digits=1) == "0.0 %"
    assert percent(0.4567, digits=1, sign="%") == "45.7%"
    assert percent(None) == "-"


def test_rates_and_times() -> None:
    numbers = {0.5: "0.5", 950: "950", 999.9: "1k", 12_345: "12.3k", 1_250_000: "1.25M"}
    for value, text in numbers.items():
        assert short_number(value) == text
    assert clock_text(65.4) == "0:01:05"
    assert clock_text(None) == "-:--:--"
