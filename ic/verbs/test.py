"""loss and answer accuracy of a checkpoint on test data"""

from __future__ import annotations

from ic.config.run import RunConfig as Config


def complete(overrides: list[str]) -> list[str]:
    """`run=FOLDER` is that run and its configuration."""
    from ic.config.from_run import complete_run

    return complete_run(overrides)


def run(config: Config) -> int:
    from ic.run.trained import show_metrics

    return show_metrics(config, "test")
