"""Who gets which version: shares of users that stay with their version when shares change.

A user is one of 10,000 slots, by a hash of the name and the experiment's. Slots belong to versions.
When weights change, only as many slots change hands as the weights ask for, so that everybody else
keeps the version. Of two versions the slots are those of one threshold, whatever weights there
were before; of three and more they depend on the changes, and are kept in the router's state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ic.errors import UsageError

# A slot is a hundredth of a per cent.
SLOTS = 10_000
_PER_CENT = SLOTS // 100


def check_weights(name: str, weights: Mapping[str, float]) -> dict[str, int]:
    """Weights in per cent -> slots of each version.

    Args:
        name: the option's, for an error.

    Raises:
        UsageError: fewer than two versions, a weight that is out of range or finer than a
            hundredth, or a sum other than 100.
    """
    if len(weights) < 2:
        raise UsageError(
            f"{name}={dict(weights)}: give at least two versions, each with its weight in per cent"
        )
    slots = {}
    for version, weight in weights.items():
        if not (math.isfinite(weight) and 0 <= weight <= 100):
            raise UsageError(f"{name}: {version} has {weight:g}; give per cent, from 0 to 100")
        slots[version] = round(weight * _PER_CENT)
        if abs(slots[version] - weight * _PER_CENT) > 1e-6:
            raise UsageError(f"{name}: {version} has {weight:g}; give at most two decimals")
    if (total := sum(slots.values())) != SLOTS:
        shown = ", ".join(f"{version} {weight:g}" for version, weight in weights.items())
        raise UsageError(
            f"{name}: {shown} sum to {total / _PER_CENT:g} per cent; they must sum to 100"
        )
    return slots


def slot_of(experiment: str, user: str) -> int:
    """The slot of a user: the same for ever, and another one in another experiment."""
    digest = hashlib.sha256(f"{experiment}\0{user}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SLOTS


@dataclass(frozen=True)
class Split:
    """Which slots belong to which version.

    Attributes:
        versions: in the order in which they were first given.
        ranges: ends of ranges of slots, rising to `SLOTS`, each with its version.
    """

    versions: tuple[str, ...]
    ranges: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Split:
        """One range for each version.

        Raises:
            UsageError: as `check_weights`.
        """
        end, ranges = 0, []
        for version, slots in check_weights("weights", weights).items():
            end += slots
            if slots:
                ranges.append((end, version))
        return cls(tuple(weights), tuple(ranges))

    @property
    def weights(self) -> dict[str, float]:
        """In per cent."""
        found = dict.fromkeys(self.versions, 0)
        begin = 0
        for end, version in self.ranges:
            found[version] += end - begin
            begin = end
        return {version: slots / _PER_CENT for version, slots in found.items()}

    def version_at(self, slot: int) -> str:
        return next(version for end, version in self.ranges if slot < end)

    def changed(self, weights: Mapping[str, float]) -> Split:
        """The split with other weights; only the share that must move does.

        Raises:
            UsageError: as `check_weights`, or other versions than there are.
        """
        if set(weights) != set(self.versions):
            raise UsageError(
                f"weights: of {', '.join(weights)}, but the versions are "
                f"{', '.join(self.versions)}; give each of them a weight (0 for none)"
            )
        wanted = check_weights("weights", weights)
        owners = [self.version_at(slot) for slot in range(SLOTS)]
        has = {version: owners.count(version) for version in self.versions}
        wants = {version: wanted[version] - has[version] for version in self.versions}
        for receiver in (version for version in self.versions if wants[version] > 0):
            for giver in self.versions:
                number = min(wants[receiver], -wants[giver])
                if number <= 0:
                    continue
                # From the end that looks towards the receiver: of two versions a threshold stays.
                upward = self.versions.index(receiver) > self.versions.index(giver)
                slots = range(SLOTS - 1, -1, -1) if upward else range(SLOTS)
                for slot in [slot for slot in slots if owners[slot] == giver][:number]:
                    owners[slot] = receiver
                wants[giver] += number
                wants[receiver] -= number
        ends = [slot + 1 for slot in range(SLOTS - 1) if owners[slot] != owners[slot + 1]]
        return Split(self.versions, tuple((end, owners[end - 1]) for end in [*ends, SLOTS]))
