"""Which steps guardrails call bad: what a loss and a gradient norm are compared with."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer

from ic.callbacks.guardrails import Guardrails, robust_z_score
from ic.callbacks.options import GuardrailsOptions
from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.run.build import build_run
from ic.run.resume import Start


def test_a_spike_is_skipped(tmp_path: Path) -> None:
    """Against a window made by hand: median 1, MAD 0, so that the spread is a tenth of the median."""
    guard = Guardrails(GuardrailsOptions(min_steps=5, window_steps=5))
    guard._losses.extend([1.0] * 5)
    guard._norms.extend([1.0] * 5)
    assert guard._judge(2.9, 1.0, True, False) is None
    assert guard._judge(3.1, 1.0, True, False) == "loss 3.1 has z-score 21.0 (limit 20)"
    assert guard._judge(1.0, 12.0, True, False) == "gradient norm 12 has z-score 110.0 (limit 100)"
    assert guard._judge(1.0, math.inf, False, False) == "gradient norm is not finite"
    assert guard._judge(1.0, math.inf, False, True) is None


def window_after(
    steps: int, *overrides: str, length_from_step: tuple[int, int] | None = None
) -> int:
    """Good steps in the window at the end of a run."""

    class Curriculum(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if length_from_step is not None and trainer.global_step == length_from_step[0]:
                trainer.datamodule.set_context_length(length_from_step[1])

    config, _ = compose_config(
        "fit",
        RunConfig,
        [
            *overrides,
            "model.hidden_size=32",
            "model.num_hidden_layers=1",
            "model.intermediate_size=48",
            f"trainer.max_steps={steps}",
            "trainer.limit_val_batches=0",
            "callbacks.checkpoint=null",
            "callbacks.memory=null",
            "callbacks.passkey=null",
            "callbacks.context_length=null",
            "callbacks.progress=false",
            "logger=none",
            "overwrite=true",
        ],
    )
    run = build_run(config, Start())
    trainer: Any = run.trainer
    trainer.callbacks.append(Curriculum())
    trainer.fit(run.module, datamodule=run.datamodule)
    (guard,) = (c for c in trainer.callbacks if isinstance(c, Guardrails))
    return len(guard._losses)


def test_window_outlasts_mixed_lengths(tmp_path: Path) -> None:
    """Pairs one at a time, all of different lengths; a curriculum's change empties the window."""
    pairs = ("experiment=dpo_tiny", f"output_dir={tmp_path}", "data.tokens_per_batch=384")
    assert window_after(6, *pairs, "trainer.num_sanity_val_steps=0") == 6
    passkey = ("experiment=mla_tiny", f"output_dir={tmp_path}", "data.tokens_per_batch=1024")
    assert window_after(6, *passkey, length_from_step=(2, 256)) == 4


def test_robust_z_score() -> None:
    seen = [1.0, 2.0, 3.0, 4.0, 100.0]
    mad = statistics.median([2.0, 1.0, 0.0, 1.0, 97.0])
    assert robust_z_score(10.0, seen) == pytest.approx((10 - 3) / (1.4826 * mad))
    assert robust_z_score(1.0, [0.0, 0.0]) == math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_threshold": 0.0}, "loss_threshold=0.0"),
        ({"max_in_a_row": 0}, "max_in_a_row=0"),
        ({"window_steps": 9}, "window_steps=9: must be at least min_steps=50"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardrailsOptions(**settings)
