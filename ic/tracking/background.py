"""Sending while training goes on: a thread that a server may keep waiting, and nobody else."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ic.errors import one_line
from ic.tracking.spool import SpoolFolder

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class Sender(ABC):
    """Tells one server what a spool holds.

    Attributes:
        tracker: its name, for people.
        folder: of the spool.
    """

    tracker: str
    folder: SpoolFolder

    @property
    @abstractmethod
    def waiting_bytes(self) -> int:
        """Of the spool, that are not known to have arrived."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Which run at which server, for people."""

    @abstractmethod
    def send_some(self) -> bool:
        """Send the next messages; whether there were any.

        Raises:
            Exception: whatever the client raises; nothing is lost, and the next call tries again.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait until the server has what was sent.

        Raises:
            Exception: it has not; `waiting_bytes` stays.
        """


class Background(threading.Thread):
    """Sends while training goes on. A failure is one warning, and is followed by pauses."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(name=sender.tracker, daemon=True)
        self._sender = sender
        self._something_new = threading.Event()
        self._closing = threading.Event()

    def nudge(self) -> None:
        """Say that the spool has grown."""
        self._something_new.set()

    def close(self, within_s: float) -> bool:
        """Send what is left, until the server fails or the time is used up -> all has arrived."""
        self._closing.set()
        self._something_new.set()
        self.join(within_s)
        return not self.is_alive() and not self._sender.waiting_bytes

    def run(self) -> None:
        failures = 0
        while True:
            last = self._closing.is_set()
            try:
                self._something_new.clear()
                while self._sender.send_some():
                    if failures:
                        failures = 0
                        rank_zero_info(f"{self.name} answers again; it is told what it has missed")
                if last:
                    self._sender.close()
                    return
                self._something_new.wait()
            except Exception as error:  # whatever the client raises
                if last:
                    return
                failures += 1
                if failures == 1:
                    rank_zero_warn(
                        f"{self.name} failed: {type(error).__name__}: {one_line(error)}. Training "
                        f"goes on; what it is to be told waits in {self._sender.folder.path}"
                    )
                pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 1))
                self._closing.wait(pause)
