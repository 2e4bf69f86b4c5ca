"""loss and answer accuracy of a checkpoint on test data"""

from __future__ import annotations

from ic.config.run import RunConfig as Config


def run(config: Config) -> int:
    from ic.run.trained import show_metrics

    return show_metrics(config, "test")
