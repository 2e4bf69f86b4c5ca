"""train the stages mla_4k to mla_1m one after another; skips finished ones"""

from __future__ import annotations

from ic.studies.ladder_options import LadderConfig as Config


def run(config: Config) -> int:
    from ic.studies.ladder import run_ladder

    return run_ladder(config)
