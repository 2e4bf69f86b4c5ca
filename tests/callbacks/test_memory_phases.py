"""A phase's peak is its own, split into what holds the memory."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ic.callbacks.memory_phases import GradientWatch, Phase, PhaseRecorder
from tests.callbacks.meters import FakeMeter

CPU = torch.device("cpu")


def nothing_held() -> dict[str, int]:
    return {"parameters": 0, "gradients": 0, "optimizer": 0}


def test_activations_are_the_rest_of_the_peak():
    meter = FakeMeter()
    held = {"parameters": 100, "gradients": 10, "optimizer": 200}
    recorder = PhaseRecorder(meter, lambda: dict(held))
    meter.use(350)
    phase = recorder.enter(Phase("forward"))
    phase.record_cache(SimpleNamespace(nbytes=30))
    meter.use(400, peak=1000)
    recorder.leave(phase)
    record = recorder.records["forward"]
    assert record.split_bytes == {
        "parameters": 100,
        "gradients": 10,
        "optimizer": 200,
        "cache": 30,
        "other": 40,
        "activations": 620,
    }
    assert (record.peak_allocated_bytes, record.peak_reserved_bytes) == (1000, 2000)


def test_a_lower_peak_does_not_replace_a_higher_one():
    meter = FakeMeter()
    recorder = PhaseRecorder(meter, nothing_held)
    for step, peak in enumerate([500, 900, 700]):
        recorder.step = step
        phase = recorder.enter(Phase("forward"))
        meter.use(100, peak=peak)
        recorder.leave(phase)
    record = recorder.records["forward"]
    assert (record.num_measured, record.split_of_bytes, record.step) == (3, 900, 1)
    assert recorder.total_peak_bytes() == 900


def test_inner_phase_does_not_count_for_the_outer():
    meter = FakeMeter()
    recorder = PhaseRecorder(meter, nothing_held)
    outer = recorder.enter(Phase("validation"))
    meter.use(10, peak=50)
    inner = recorder.enter(Phase("passkey"))
    meter.use(10, peak=800)
    recorder.leave(inner)
    meter.use(10, peak=60)
    recorder.leave(outer)
    assert recorder.records["validation"].split_of_bytes == 60
    assert recorder.records["passkey"].split_of_bytes == 800


def test_gradients_in_backward_are_those_alive_at_the_peak():
    meter = FakeMeter()
    first, second = (torch.nn.Parameter(torch.ones(n)) for n in (3, 5))
    phase = Phase("backward")
    watch = GradientWatch(meter, phase, [first, second], CPU)
    first.sum().backward()
    assert phase.gradient_bytes == 0
    meter.use(0, peak=100)  # climbs while the second gradient is computed, the first is there
    second.sum().backward()
    assert phase.gradient_bytes == 12
    watch.stop()
    assert phase.gradient_bytes == 12
    meter.use(0, peak=200)
    second.sum().backward()
    assert phase.gradient_bytes == 12  # hooks are gone


def test_gradients_that_accumulate_do_not_count_twice():
    meter = FakeMeter()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    phase = Phase("backward")
    phase.gradient_bytes = 12
    watch = GradientWatch(meter, phase, [weight], CPU)
    weight.sum().backward()
    meter.use(0, peak=100)
    watch.stop()
    assert phase.gradient_bytes == 12
