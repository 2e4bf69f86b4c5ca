"""What interruptions cost a training run, and how often it should save.

A run works, saves every so often, and after an interruption does again what it had not saved. With
interruptions that come at random, M seconds apart on average, the expected time of a run that needs
T seconds of work, saves after each t of them for d seconds, and takes r to begin again is

    M exp(r / M) (exp((t + d) / M) - 1) T / t

(J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
Generation Computer Systems 22, 2006, equation 13). It is least near sqrt(2 d M) (J. W. Young, "A
first order approximation to the optimum checkpoint interval", 1974), which Daly's equation 37
refines.
"""

from __future__ import annotations

import math


def best_interval(checkpoint_s: float, between_s: float) -> float:
    """Seconds of work between two checkpoints for which a run is expected to end soonest.

    Args:
        checkpoint_s: that a checkpoint takes.
        between_s: between two interruptions on average.
    """
    ratio = checkpoint_s / (2 * between_s)
    if ratio >= 1:
        return between_s
    young = math.sqrt(2 * checkpoint_s * between_s)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def expected_seconds(
    work_s: float, every_s: float, checkpoint_s: float, restart_s: float, between_s: float
) -> float:
    """How long a run takes that needs `work_s` seconds of work; infinite where it would hardly ever
    get from one checkpoint to the next.
    """
    try:
        each = math.exp(restart_s / between_s) * math.expm1((every_s + checkpoint_s) / between_s)
    except OverflowError:
        return math.inf
    return between_s * each * work_s / every_s
