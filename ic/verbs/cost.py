"""dollars per million tokens and per training run, from measured throughput and your prices"""

from __future__ import annotations

from ic.serving.cost.options import CostOptions as Config

LOADS_PYTORCH = False


def run(config: Config) -> int:
    """Print tables and the cheapest, write the rows and a picture."""
    from ic.serving.cost.report import report

    return report(config)
