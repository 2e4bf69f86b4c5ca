"""Memory counters that a test sets by hand."""

from __future__ import annotations


class FakeMeter:
    """A counter that a test sets by hand; as on CUDA, it also has reserved bytes."""

    name = "fake"

    def __init__(self) -> None:
        self.now = self.top = 0

    def use(self, now: int, peak: int | None = None) -> None:
        self.now, self.top = now, max(self.top, now, peak or 0)

    def current(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.top

    def peak_reserved(self) -> int | None:
        return self.top + 1000

    def reset(self) -> None:
        self.top = self.now


class RisingMeter(FakeMeter):
    """Every look is higher than the last: a phase keeps its latest measurement."""

    def peak(self) -> int:
        self.top += 10**9
        return self.top

    def reset(self) -> None:
        pass
