"""The curriculum's rule, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ic.callbacks.context_length import AdaptiveContextLength
from ic.callbacks.options import AdaptiveContextLengthOptions
from ic.datamodules.options import PasskeyDataOptions
from ic.datamodules.passkey import PasskeyDataModule
from ic.model.byte_tokenizer import ByteTokenizer


def trainer_of(data: object) -> SimpleNamespace:
    return SimpleNamespace(
        datamodule=data,
        global_step=0,
        callback_metrics={},
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )


def drive(
    callback: AdaptiveContextLength, trainer: SimpleNamespace, accuracies: list[float]
) -> list:
    lengths = []
    for accuracy in accuracies:
        trainer.global_step += 1
        trainer.callback_metrics["train/answer_accuracy"] = torch.tensor(accuracy)
        callback.on_train_batch_end(trainer, None, None, None, 0)
        lengths.append(trainer.datamodule.context_length)
    return lengths


def test_doubles_when_the_average_passes_at_a_check() -> None:
    config = AdaptiveContextLengthOptions(
        start_length=128, threshold=0.6, check_every_n_steps=5, new_weight=0.2
    )
    data = PasskeyDataModule(PasskeyDataOptions(context_length=512), ByteTokenizer())
    callback, trainer = AdaptiveContextLength(config), trainer_of(data)
    callback.on_train_start(trainer, None)
    assert data.context_length == 128
    # 1 - 0.8^5 = 0.67 passes 0.6 at step 5; the average then begins again.
    assert drive(callback, trainer, [1.0] * 10) == [128] * 4 + [256] * 5 + [512]
    assert drive(callback, trainer, [1.0] * 20) == [512] * 20  # the datamodule's limit
    assert [row[:2] for row in callback.history] == [(0, 128), (5, 256), (10, 512)]


def test_a_doubling_rests_on_its_own_length_alone() -> None:
    """After 0.67 at step 5, five steps of 0.8 come to 0.54 from zero, but to 0.76 from 0.67."""
    config = AdaptiveContextLengthOptions(
        start_length=128, threshold=0.6, check_every_n_steps=5, new_weight=0.2
    )
    data = PasskeyDataModule(PasskeyDataOptions(context_length=512), ByteTokenizer())
    callback, trainer = AdaptiveContextLength(config), trainer_of(data)
    callback.on_train_start(trainer, None)
    assert drive(callback, trainer, [1.0] * 5)[-1] == 256
    assert float(callback.average) == 0
    assert drive(callback, trainer, [0.8] * 5) == [256] * 5
    assert float(callback.average) == pytest.approx(0.8 * (1 - 0.8**5))


def test_does_not_double_below_the_threshold() -> None:
    config = AdaptiveContextLengthOptions(start_length=128, threshold=0.68, check_every_n_steps=5)
    data = PasskeyDataModule(PasskeyDataOptions(context_length=512), ByteTokenizer())
    callback, trainer = AdaptiveContextLength(config), trainer_of(data)
    callback.on_train_start(trainer, None)
    # 0.672 at step 5 is below 0.68, 0.893 at step 10 above.
    assert drive(callback, trainer, [1.0] * 10) == [128] * 9 + [256]


def test_state_and_times_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(
        "ic.callbacks.context_length.time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    config = AdaptiveContextLengthOptions(start_length=128, threshold=0.6, check_every_n_steps=5)
    data = PasskeyDataModule(PasskeyDataOptions(context_length=512), ByteTokenizer())
    callback, trainer = AdaptiveContextLength(config), trainer_of(data)
    callback.on_train_start(trainer, None)  # second 1
    drive(callback, trainer, [1.0] * 7)  # doubles in second 2
    again = AdaptiveContextLength(config)  # second 3
    again.load_state_dict(callback.state_dict())  # second 4: 3 s of training so far
    again.on_train_start(trainer, None)  # second 5
    assert data.context_length == 256
    assert drive(again, trainer, [1.0] * 3) == [256, 256, 512]  # second 6
    trainer.is_global_zero, trainer.default_root_dir = True, tmp_path
    again.on_train_end(trainer, None)
    assert json.loads((tmp_path / "context_length.json").read_text())["reached"] == [
        {"context_length_tokens": 128, "step": 0, "elapsed_s": 0},
        {"context_length_tokens": 256, "step": 5, "elapsed_s": 1},
        {"context_length_tokens": 512, "step": 10, "elapsed_s": 4},
    ]


def test_needs_data_whose_length_changes() -> None:
    with pytest.raises(ValueError, match="set callbacks.context_length=null"):
        AdaptiveContextLength(AdaptiveContextLengthOptions()).on_train_start(
            trainer_of(SimpleNamespace()), None
        )


@pytest.mark.parametrize(
    "changes",
    [{"start_length": 64}, {"threshold": 1.0}, {"check_every_n_steps": 0}, {"new_weight": 0.0}],
)
def test_refuses(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"callbacks.context_length.{next(iter(changes))}="):
        AdaptiveContextLengthOptions(**changes)
