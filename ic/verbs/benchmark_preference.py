"""memory and speed of preference training on a GPU, ours beside TRL's"""

from __future__ import annotations

from ic.studies.benchmark_preference_options import PreferenceBenchmarkOptions as Config


def run(config: Config) -> int:
    from ic.studies.benchmark_preference import benchmark_preference

    return benchmark_preference(config)
