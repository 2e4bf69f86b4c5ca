"""The servers of the versions: which of them may be asked now, and in which order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx2

from ic.serving.ab.options import HealthOptions, VersionOptions

# Failed questions after their health in a row that leave a server alone.
_UNHEALTHY_AFTER = 2
# Answers in a row after which earlier failures of a server are forgotten.
_FORGOTTEN_AFTER = 20


@dataclass
class Backend:
    """One server of a version.

    Attributes:
        in_flight: requests that it works on.
        healthy: whether it answers when asked after its health.
    """

    version: str
    url: str
    options: HealthOptions
    clock: Callable[[], float] = time.monotonic
    in_flight: int = 0
    healthy: bool = True
    _unhealthy_in_a_row: int = 0
    _failed_in_a_row: int = 0
    _answered_in_a_row: int = 0
    _times_ejected: int = 0
    _ejected_until: float = 0.0
    _on_trial: bool = False

    @property
    def available(self) -> bool:
        """Whether it should get the next request."""
        if not self.healthy or self.clock() < self._ejected_until:
            return False
        return not self._on_trial or self.in_flight == 0

    def answered(self) -> None:
        """It has answered a request."""
        self._on_trial = False
        self._failed_in_a_row = 0
        self._answered_in_a_row += 1
        if self._answered_in_a_row >= _FORGOTTEN_AFTER:
            self._times_ejected = 0

    def failed(self) -> None:
        """It has failed a request: the last of several in a row, or the one on trial, ejects it."""
        self._answered_in_a_row = 0
        self._failed_in_a_row += 1
        if self.clock() < self._ejected_until:
            return  # one of those that were on their way when it was ejected
        if self._on_trial or self._failed_in_a_row >= self.options.eject_after:
            seconds = self.options.eject_s * 2**self._times_ejected
            self._ejected_until = self.clock() + min(seconds, self.options.longest_eject_s)
            self._times_ejected = min(self._times_ejected + 1, 32)
            self._on_trial = True

    def examined(self, well: bool) -> None:
        """It was asked after its health."""
        self._unhealthy_in_a_row = 0 if well else self._unhealthy_in_a_row + 1
        self.healthy = well or (self._unhealthy_in_a_row < _UNHEALTHY_AFTER and self.healthy)


@dataclass
class Backends:
    """All servers.

    Attributes:
        of: the servers of each version.
    """

    of: dict[str, list[Backend]] = field(default_factory=dict)

    @classmethod
    def build(cls, versions: dict[str, VersionOptions], options: HealthOptions) -> Backends:
        return cls(
            {
                name: [Backend(name, url.rstrip("/"), options) for url in version.urls]
                for name, version in versions.items()
            }
        )

    def in_order(self, version: str, control: str) -> list[Backend]:
        """Every server, in the order in which they should be asked for a user of `version`.

        First those of the version that are available, then those of the control and of the others;
        at last, because nothing is left to lose, those that had better be left alone.
        """
        ranked = [version, *dict.fromkeys([control, *self.of])]
        ranked = list(dict.fromkeys(ranked))
        every = [each for name in ranked for each in self.of[name]]
        return sorted(
            every, key=lambda each: (not each.available, ranked.index(each.version), each.in_flight)
        )

    def is_healthy(self, version: str) -> bool:
        """Whether any server of a version is available."""
        return any(each.available for each in self.of[version])

    async def watch(self, http: httpx2.AsyncClient, options: HealthOptions) -> None:
        """Ask every server after its health, until cancelled."""
        every: Sequence[Backend] = [each for found in self.of.values() for each in found]
        async with asyncio.TaskGroup() as group:
            for each in every:
                group.create_task(_watch(each, http, options))


async def _watch(backend: Backend, http: httpx2.AsyncClient, options: HealthOptions) -> None:
    while True:
        try:
            asked = await http.get(backend.url + options.path, timeout=options.timeout_s)
            backend.examined(asked.status_code < 400)
        except (httpx2.HTTPError, OSError):
            backend.examined(False)
        await asyncio.sleep(options.every_s)
