"""train a model (pre-training, SFT, DPO); resumes with run=FOLDER"""

from __future__ import annotations

from ic.config.run import RunConfig as Config


def complete(overrides: list[str]) -> list[str]:
    """`run=FOLDER` is that run; `from=FOLDER` a new one with its configuration."""
    from ic.config.from_run import complete_from, complete_run

    return complete_run(complete_from(overrides))


def check(config: Config) -> None:
    """Raises:
    ValueError: a tracker cannot be had.
    """
    config.logger.check_here()


def run(config: Config) -> int:
    from ic.run.train import train

    return train(config)
