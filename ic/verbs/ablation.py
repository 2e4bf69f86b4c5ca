"""train variants over several seeds for equal time and compare their retrieval"""

from __future__ import annotations

from ic.studies.ablation.options import AblationConfig as Config


def run(config: Config) -> int:
    from ic.studies.ablation.run import run_ablation

    return run_ablation(config)
