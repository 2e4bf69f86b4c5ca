"""memory by part and tokens/s of a run on GPUs that are not here"""

from __future__ import annotations

import json

from ic.planning.options import PlanConfig as Config


def run(config: Config) -> int:
    """Predict memory and speed; or measure what the predictions are compared with."""
    from ic.planning.cache_memory import measure_caches
    from ic.planning.compare import compare_with_scaling
    from ic.planning.memory_measurement import measure_cases
    from ic.planning.plan import Planner
    from ic.planning.report import plan_report, print_plan

    if config.plan.measure:
        return measure_cases(config)
    if config.plan.cache:
        return measure_caches(config)
    if config.plan.compare:
        return compare_with_scaling(config)
    report = plan_report(Planner(config))
    if config.json:
        print(json.dumps(report, indent=2))
    else:
        print_plan(report)
    return 0
