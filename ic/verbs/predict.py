"""write a checkpoint's answers on test data to predictions.jsonl"""

from __future__ import annotations

from ic.config.run import RunConfig as Config


def run(config: Config) -> int:
    from ic.run.trained import write_predictions

    return write_predictions(config)
