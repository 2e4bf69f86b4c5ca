"""latency and throughput of the engine, or of a server, by batch and context"""

from __future__ import annotations

from ic.studies.serving.options import ServingBenchmarkOptions as Config


def run(config: Config) -> int:
    from ic.studies.serving.run import benchmark_serving

    return benchmark_serving(config)
