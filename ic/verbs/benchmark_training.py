"""time and memory of a training step on a GPU: bf16, FP8 products and transformers' DeepSeek-V3"""

from __future__ import annotations

from ic.studies.benchmark_training_options import TrainingBenchmarkOptions as Config


def run(config: Config) -> int:
    from ic.studies.benchmark_training import benchmark_training

    return benchmark_training(config)
