"""When the samples begin; NVML's answer is made up, since a test has no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ic.callbacks.gpu_utilisation import GpuUtilisation
from ic.callbacks.options import GpuUtilisationOptions


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_begins_with_the_step_behind_the_warmup(
    monkeypatch: pytest.MonkeyPatch, warmup_steps: int
) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 50)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)), global_step=7
    )
    callback = GpuUtilisation(GpuUtilisationOptions(warmup_steps=warmup_steps))
    module: Any = None
    callback.on_train_start(trainer, module)
    samples_from = None
    for step in range(5):
        trainer.global_step = 7 + step
        callback.on_train_batch_start(trainer, module, None, step)
        if samples_from is None and callback._thread is not None:
            samples_from = step
    callback.on_exception(trainer, module, RuntimeError())
    assert samples_from == warmup_steps
    assert not callback._thread.is_alive()
