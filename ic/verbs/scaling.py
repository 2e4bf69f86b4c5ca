"""time training under different strategies on the GPUs of this host"""

from __future__ import annotations

from ic.studies.scaling.options import ScalingConfig as Config


def run(config: Config) -> int:
    from ic.studies.scaling.run import run_scaling

    return run_scaling(config)
