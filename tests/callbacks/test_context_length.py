"""The curriculum's rule, by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ic.callbacks.context_length import AdaptiveContextLength, ContextLength, StagedContextLength
from ic.callbacks.options import ContextLengthOptions
from ic.datamodules.options import PasskeyDataOptions, TextDataOptions
from ic.datamodules.passkey import PasskeyDataModule
from ic.datamodules.text import TextDataModule
from ic.model.byte_tokenizer import ByteTokenizer


def trainer_of(data: object) -> SimpleNamespace:
    return SimpleNamespace(
        datamodule=data,
        global_step=0,
        callback_metrics={},
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )


def drive(callback: ContextLength, trainer: SimpleNamespace, accuracies: list[float]) -> list:
    lengths = []
    for accuracy in accuracies:
        trainer.global_step += 1
        trainer.callback_metrics["train/answer_accuracy"] = torch.tensor(accuracy)
        callback.on_train_batch_end(trainer, None, None, None, 0)
        lengths.append(trainer.datamodule.context_length)
    return lengths


def test_doubles_when_the_average_passes_at_a_check() -> None:
    config = ContextLengthOptions(
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
    config = ContextLengthOptions(
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
    config = ContextLengthOptions(start_length=128, threshold=0.68, check_every_n_steps=5)
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
    config = ContextLengthOptions(start_length=128, threshold=0.6, check_every_n_steps=5)
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
        AdaptiveContextLength(ContextLengthOptions()).on_train_start(
            trainer_of(SimpleNamespace()), None
        )


@pytest.mark.parametrize(
    "changes",
    [{"start_length": 64}, {"threshold": 1.0}, {"check_every_n_steps": 0}, {"new_weight": 0.0}],
)
def test_refuses(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"callbacks.context_length.{next(iter(changes))}="):
        ContextLengthOptions(**changes)


def test_stages_beside_an_experiments_doubling_say_what_to_add() -> None:
    stages = [[0, 128], [3, 256]]
    with pytest.raises(ValueError, match="nothing doubles") as refused:
        ContextLengthOptions(stages=stages, start_length=128, new_weight=0.5)
    added = re.findall(r"callbacks\.context_length\.(\w+)=([\d.]+)(?: |$)", str(refused.value))
    assert added == [("start_length", "256"), ("new_weight", "0.2")]
    ContextLengthOptions(stages=stages, start_length=256, new_weight=0.2)


def staged(stages: list[list[int]]) -> StagedContextLength:
    return StagedContextLength(ContextLengthOptions(stages=stages))


def test_stages_depend_on_the_step_alone(tmp_path: Path) -> None:
    data = PasskeyDataModule(PasskeyDataOptions(context_length=512), ByteTokenizer())
    callback, trainer = staged([[0, 128], [3, 256], [5, 512], [7, 128]]), trainer_of(data)
    callback.on_train_start(trainer, None)
    assert data.context_length == 128
    # After step n comes the row of step n, counted from 0; accuracy makes no difference.
    assert drive(callback, trainer, [1.0] * 8) == [128, 128, 256, 256, 512, 512, 128, 128]
    assert [row[:2] for row in callback.history] == [(0, 128), (3, 256), (5, 512), (7, 128)]
    trainer.is_global_zero, trainer.default_root_dir = True, tmp_path
    callback.on_train_end(trainer, None)
    reached = json.loads((tmp_path / "context_length.json").read_text())["reached"]
    assert [row["context_length_tokens"] for row in reached] == [128, 256, 512, 128]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_stages_go_on_where_a_run_was(step: int) -> None:
    """Before a border, at it and behind it; with the state of the callback and without."""
    data = PasskeyDataModule(PasskeyDataOptions(context_length=512), ByteTokenizer())
    callback, trainer = staged([[0, 128], [3, 512]]), trainer_of(data)
    callback.on_train_start(trainer, None)
    drive(callback, trainer, [0.0] * step)
    for state in (callback.state_dict(), None):
        again = staged([[0, 128], [3, 512]])
        if state is not None:
            again.load_state_dict(state)
        data.set_context_length(256)
        trainer.global_step = step
        again.on_train_start(trainer, None)
        assert data.context_length == (128 if step < 3 else 512)
        assert drive(again, trainer, [0.0] * 2)[-1] == 512
        if state is not None:
            assert [row[:2] for row in again.history] == [(0, 128), (3, 512)]


def test_a_later_stage_is_refused_before_training() -> None:
    data = TextDataModule(
        TextDataOptions(context_length=512, tokens_per_batch=512), ByteTokenizer()
    )
    with pytest.raises(ValueError, match="context length 384: must be at least 2 and divide"):
        staged([[0, 128], [100, 384]]).on_train_start(trainer_of(data), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [[1, 256]]}, "the first begins at step 0"),
        ({"stages": [[0, 256], [5, 128], [5, 64]]}, "each later than the one before"),
        ({"stages": [[0, 1]]}, "a length must be at least 2 tokens"),
        ({"stages": [[0]]}, "each is a step and a length"),
        (
            {"stages": [[0, 256]], "threshold": 0.9},
            "nothing doubles, but threshold=0.9 would say when",
        ),
    ],
)
def test_refuses_stages(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextLengthOptions(**changes)
