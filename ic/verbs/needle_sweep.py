"""compare what a small model is fine-tuned on: needle conversations that differ in one parameter"""

from __future__ import annotations

from ic.studies.needle_sweep_options import NeedleSweepConfig as Config


def run(config: Config) -> int:
    from ic.studies.needle_sweep import run_needle_sweep

    return run_needle_sweep(config)
