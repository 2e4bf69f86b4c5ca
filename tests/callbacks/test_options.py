"""The bounds of every callback's options, at them and just beyond."""

from __future__ import annotations

from typing import Any

import pytest

from ic.callbacks.options import (
    CheckpointOptions,
    ContextLengthOptions,
    GpuUtilisationOptions,
    GuardrailsOptions,
    MemoryProfilerOptions,
    PasskeyEvaluationOptions,
    ProfilerOptions,
    SamplesOptions,
    SlurmRequeueOptions,
    SuiteEvaluationOptions,
    ThroughputOptions,
)
from tests.bounds import check_bounds

JUST = 1e-9


@pytest.mark.parametrize(
    ("options", "section", "name", "allowed", "refused"),
    [
        (CheckpointOptions, "checkpoint", "every_n_steps", [1], [0]),
        (CheckpointOptions, "checkpoint", "keep_last", [1], [0]),
        (CheckpointOptions, "checkpoint", "keep_every_n_steps", [0, 250, 500], [-250, 1, 251]),
        (ContextLengthOptions, "context_length", "start_length", [128], [127]),
        (ContextLengthOptions, "context_length", "threshold", [JUST, 1 - JUST], [0, 1]),
        (ContextLengthOptions, "context_length", "check_every_n_steps", [1], [0]),
        (ContextLengthOptions, "context_length", "new_weight", [JUST, 1], [0, 1 + JUST]),
        (GpuUtilisationOptions, "gpu_utilisation", "warmup_steps", [0], [-1]),
        (GpuUtilisationOptions, "gpu_utilisation", "every_s", [JUST], [0]),
        (GuardrailsOptions, "guardrails", "loss_threshold", [None, JUST], [0, -1]),
        (GuardrailsOptions, "guardrails", "grad_norm_threshold", [None, JUST], [0, -1]),
        (GuardrailsOptions, "guardrails", "min_steps", [2], [1]),
        (GuardrailsOptions, "guardrails", "max_in_a_row", [1], [0]),
        (GuardrailsOptions, "guardrails", "max_rollbacks", [0], [-1]),
        (GuardrailsOptions, "guardrails", "window_steps", [50], [49]),
        (MemoryProfilerOptions, "memory", "first_steps", [0], [-1]),
        (MemoryProfilerOptions, "memory", "every_n_steps", [0], [-1]),
        (MemoryProfilerOptions, "memory", "oom_history_entries", [0], [-1]),
        (SuiteEvaluationOptions, "suites", "every_n_steps", [0], [-1]),
        (SuiteEvaluationOptions, "suites", "cheap_samples", [1], [0]),
        (PasskeyEvaluationOptions, "passkey", "every_n_steps", [0], [-1]),
        (PasskeyEvaluationOptions, "passkey", "cheap_samples", [1], [0]),
        (ProfilerOptions, "profiler", "wait_steps", [0], [-1]),
        (ProfilerOptions, "profiler", "warmup_steps", [1], [0]),
        (ProfilerOptions, "profiler", "active_steps", [1], [0]),
        (ProfilerOptions, "profiler", "num_kernels", [1], [0]),
        (ProfilerOptions, "profiler", "memory_history_entries", [1], [0]),
        (SamplesOptions, "samples", "prompts", [["a"]], [[], ["a", ""]]),
        (SamplesOptions, "samples", "every_n_validations", [1], [0]),
        (SamplesOptions, "samples", "max_new_tokens", [1], [0]),
        (SamplesOptions, "samples", "seed", [0], [-1]),
        (SamplesOptions, "samples", "temperature", [0, 2], [-JUST, 2 + JUST, float("inf")]),
        (SamplesOptions, "samples", "top_p", [JUST, 1], [0, 1 + JUST]),
        (SlurmRequeueOptions, "requeue", "margin_s", [0], [-JUST]),
        (SlurmRequeueOptions, "requeue", "max_restarts", [0], [-1]),
        (ThroughputOptions, "throughput", "warmup_steps", [0], [-1]),
        (ThroughputOptions, "throughput", "window_steps", [1], [0]),
        (ThroughputOptions, "throughput", "sync_every_n_steps", [1], [0]),
    ],
)
def test_bounds(options: Any, section: str, name: str, allowed: list, refused: list) -> None:
    check_bounds(options, f"callbacks.{section}.", name, allowed, refused)


def test_a_cheap_evaluation_needs_lengths_and_takes_each_once() -> None:
    assert SuiteEvaluationOptions(every_n_steps=1, cheap_lengths=[256]).cheap_lengths == [256]
    for lengths in (None, []):
        with pytest.raises(ValueError, match=r"callbacks\.passkey\.cheap_lengths: needed"):
            PasskeyEvaluationOptions(every_n_steps=1, cheap_lengths=lengths)
    with pytest.raises(ValueError, match=r"callbacks\.passkey\.cheap_lengths.*256"):
        PasskeyEvaluationOptions(cheap_lengths=[256, 256])


def test_the_defaults_are_what_the_configuration_reference_says() -> None:
    """Changed on purpose alone: published runs were made with them."""
    checkpoint, guardrails = CheckpointOptions(), GuardrailsOptions()
    assert (checkpoint.every_n_steps, checkpoint.keep_last, checkpoint.mode) == (250, 1, "min")
    curriculum = ContextLengthOptions()
    assert (curriculum.start_length, curriculum.threshold) == (256, 0.95)
    assert (curriculum.check_every_n_steps, curriculum.new_weight) == (10, 0.2)
    assert (guardrails.loss_threshold, guardrails.grad_norm_threshold) == (20.0, 100.0)
    assert (guardrails.window_steps, guardrails.min_steps) == (100, 50)
    assert (guardrails.max_in_a_row, guardrails.max_rollbacks) == (3, 3)
    throughput, requeue = ThroughputOptions(), SlurmRequeueOptions()
    assert (throughput.warmup_steps, throughput.window_steps) == (3, 20)
    assert (requeue.margin_s, requeue.max_restarts) == (180.0, 20)
