"""A poisoned batch is skipped and named, three in a row lead back to the last good checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from ic.callbacks.checkpoint import FolderCheckpoint
from ic.callbacks.guardrails import Guardrails, TrainingDivergedError
from ic.callbacks.options import CheckpointOptions, GuardrailsOptions
from ic.checkpoint.errors import CheckpointError
from ic.checkpoint.folder import MODULE_PREFIX, FolderCheckpointIO
from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.datamodules.passkey import PasskeyDataModule
from ic.datamodules.tokenizers import build_tokenizer
from ic.files.json_lines import read_rows, write_rows
from ic.model import MLAForCausalLM
from ic.parallel.fsdp2 import FSDP2Strategy
from ic.run.build import build_module
from ic.training.loops import use_resumable_loops
from tests.parallel.training_run import join

STRATEGIES: dict[str, Any] = {"auto": lambda: "auto", "ddp": DDPStrategy, "fsdp2": FSDP2Strategy}
TINY = (
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "data.context_length=128",
    "data.tokens_per_batch=256",
    "data.val_batches=1",
    "optimizer.warmup_steps=0",
    "data.num_workers=0",
)


class Poisoned(PasskeyDataModule):
    """Turns one row of the embedding's input into NaN at some steps, on one rank alone."""

    steps: tuple[int, ...] = ()
    rank = 0

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        trainer = self.trainer
        assert trainer is not None
        module: Any = trainer.lightning_module
        module.poisoned = (
            trainer.training and batch["step"] in self.steps and trainer.global_rank == self.rank
        )
        return batch


def nan_embedding(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * math.nan if module.owner[0].poisoned else output


class BrokenWeight(Callback):
    """Makes one weight NaN after a step, as an overflow in an update would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            with torch.no_grad():
                pl_module.model.lm_head.weight[-1, -1] = math.nan


def fit(
    folder: Path,
    steps: tuple[int, ...],
    *,
    ranks: int = 1,
    strategy: str = "auto",
    callbacks: tuple[Callback, ...] = (),
    guarded: bool = True,
    overrides: tuple[str, ...] = (),
    accumulate: int = 1,
    **settings: Any,
) -> None:
    config, _ = compose_config("fit", RunConfig, ["experiment=mla_tiny", *TINY, *overrides])
    torch.manual_seed(0)
    tokenizer = build_tokenizer("bytes")
    model = MLAForCausalLM(config.model.mla_config(320)).train()
    module = build_module(config, model, tokenizer)
    embedding: Any = model.model.embed_tokens
    embedding.owner = (module,)
    embedding.register_forward_hook(nan_embedding)
    data = Poisoned(config.data, tokenizer)
    data.steps, data.rank = steps, ranks - 1
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=ranks,
        max_steps=10,
        max_epochs=-1,
        strategy=STRATEGIES[strategy](),
        gradient_clip_val=1.0,
        callbacks=[
            *callbacks,
            *([Guardrails(GuardrailsOptions(**settings))] if guarded else []),
            FolderCheckpoint(
                CheckpointOptions(every_n_steps=2, keep_every_n_steps=2, monitor=None)
            ),
        ],
        accumulate_grad_batches=accumulate,
        plugins=[FolderCheckpointIO(model.config, tokenizer)],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    use_resumable_loops(trainer).fit(module, datamodule=data)


def fit_rank(
    rank: int, ranks: int, port: int, folder: Path, steps: tuple[int, ...], strategy: str
) -> None:
    join(rank, ranks, port)
    fit(folder, steps, ranks=ranks, strategy=strategy)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "guardrails.jsonl").read_text().splitlines()]


def saved(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint of either format, as one process would load it."""
    config, _ = compose_config("fit", RunConfig, ["experiment=mla_tiny", *TINY])
    tokenizer = build_tokenizer("bytes")
    reader = FolderCheckpointIO(config.model.mla_config(320), tokenizer)
    return reader.load_checkpoint(folder / f"checkpoints/step={step}")


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = saved(folder, step)["state_dict"]
    return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in state.items()}


def optimizer_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (optimizer,) = saved(folder, step)["optimizer_states"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in optimizer["state"].items()
        for name, value in entry.items()
    }


def assert_same(folder: Path, step: int, other: int) -> None:
    """Weights and optimizer state of two checkpoints are equal bit for bit."""
    for read in (weights, optimizer_state):
        expected, found = read(folder, other), read(folder, step)
        assert found.keys() == expected.keys()
        assert found
        for name, tensor in found.items():
            assert tensor.equal(expected[name]), name


def test_a_poisoned_batch_is_survived_and_named(tmp_path: Path) -> None:
    fit(tmp_path, (4,))
    (record,) = records(tmp_path)
    assert record["reason"] == "loss is not finite"
    assert record["global_step"] == 4
    assert record["ranks"] == [{"rank": 0, "loss": "nan", "batches": [{"step": 4}]}]
    assert record["data_position_after"]["next_step"] == 5
    before, after, end = (weights(tmp_path, step) for step in (4, 6, 10))
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert not end["lm_head.weight"].equal(after["lm_head.weight"])
    assert not after["lm_head.weight"].equal(before["lm_head.weight"])


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, (4, 5), max_in_a_row=9)
    assert [r["in_a_row"] for r in records(tmp_path)] == [1, 2]
    assert_same(tmp_path, 6, 4)
    assert saved(tmp_path, 6)["global_step"] == 6


def test_the_first_step_may_be_bad(tmp_path: Path) -> None:
    """It is one in a row, and the first of them: nothing is older to return to."""
    with pytest.raises(TrainingDivergedError, match="2 bad steps in a row from step 0, and no"):
        fit(tmp_path, (0, 1), max_in_a_row=2)
    assert [(r["global_step"], r["in_a_row"]) for r in records(tmp_path)] == [(0, 1), (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_three_in_a_row_roll_back(
    tmp_path: Path, strategy: str, ranks: int, spawn: Callable[..., None]
) -> None:
    """Bad steps 5 to 7, and 1, which is survived; the newest checkpoint before 5 is step 4's, so
    that the step taken after it is lost. With two ranks only the second one's batches are bad.
    """
    bad = (1, 5, 6, 7)
    if ranks > 1:
        spawn(fit_rank, ranks, tmp_path, bad, strategy)
    else:
        fit(tmp_path, bad)
    for record, step in zip(records(tmp_path), bad, strict=True):
        # Rank 0 writes it, so it must know of the other's loss; the norm is bad as well.
        assert record["reason"] == "loss is not finite"
        assert [r["batches"] for r in record["ranks"]] == [[{"step": step}]] * ranks
        finite = [r["loss"] != "nan" for r in record["ranks"]]
        assert finite == [True] * (ranks - 1) + [False]
    assert_same(tmp_path, 8, 4)
    assert not weights(tmp_path, 6)["lm_head.weight"].equal(weights(tmp_path, 4)["lm_head.weight"])
    assert saved(tmp_path, 10)["Poisoned"]["next_step"] == 10
    assert not weights(tmp_path, 10)["lm_head.weight"].equal(weights(tmp_path, 8)["lm_head.weight"])
    assert (tmp_path / "checkpoints/last").resolve().name == "step=10"


class Rates(Callback):
    """The learning rate of each step, as the optimizer is about to use it."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


def test_a_rollback_does_not_take_the_schedule_back(tmp_path: Path) -> None:
    """The rate rises through the warm-up as if nothing had happened."""
    poisoned, clean = Rates(), Rates()
    warmup = ("optimizer.warmup_steps=20", "optimizer.decay_fraction=0")
    fit(tmp_path / "poisoned", (4, 5, 6), overrides=warmup, callbacks=(poisoned,))
    fit(tmp_path / "clean", (), overrides=warmup, callbacks=(clean,))
    assert len(set(clean.used)) == len(clean.used) == 10
    assert poisoned.used == clean.used


def test_bad_steps_are_counted_in_a_row(tmp_path: Path) -> None:
    """A good step begins the count anew, and so does a rollback."""
    fit(tmp_path, (2, 4, 5, 6, 7))
    assert [r["in_a_row"] for r in records(tmp_path)] == [1, 1, 2, 3, 1]
    (state,) = (
        value for key, value in saved(tmp_path, 10)["callbacks"].items() if "Guardrails" in key
    )
    assert (state["num_rollbacks"], state["bad_in_a_row"]) == (1, 0)


@pytest.mark.parametrize("bad", [6, 7])
def test_every_micro_batch_is_judged(tmp_path: Path, bad: int) -> None:
    """Batches 6 and 7 are the halves of step 3; either of them spoils it."""
    fit(tmp_path, (bad,), accumulate=2)
    (record,) = records(tmp_path)
    assert record["global_step"] == 3
    assert record["reason"] == "loss is not finite"
    assert record["ranks"] == [{"rank": 0, "loss": "nan", "batches": [{"step": 6}, {"step": 7}]}]


def test_a_step_counts_with_the_loss_of_all_its_micro_batches(tmp_path: Path) -> None:
    """What the window holds is a step's mean loss: the logged one."""
    fit(tmp_path, (), accumulate=2)
    (state,) = (
        value for key, value in saved(tmp_path, 10)["callbacks"].items() if "Guardrails" in key
    )
    fit(tmp_path / "single", ())
    (single,) = (
        value
        for key, value in saved(tmp_path / "single", 10)["callbacks"].items()
        if "Guardrails" in key
    )
    assert len(state["losses"]) == len(single["losses"]) == 10
    # Two halves of a mean add up to a whole loss, near ln(320) = 5.8 at the first step.
    assert state["losses"][0] == pytest.approx(single["losses"][0], rel=0.2)


def test_divergence_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="no checkpoint is older"):
        fit(tmp_path / "early", (0, 1, 2))
    with pytest.raises(TrainingDivergedError, match="after 1 rollbacks"):
        fit(tmp_path / "late", (3, 4, 5, 6, 7, 8), max_rollbacks=1)


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """Step 6 is not saved, so the rollback does not go back to it."""
    with pytest.warns(UserWarning, match=r"step 6: the weights are NaN.* first in model.lm_head"):
        fit(tmp_path, (), callbacks=(BrokenWeight(6),))
    assert [record["global_step"] for record in records(tmp_path)] == [6, 7, 8]
    assert steps_saved(tmp_path) == ["last", "step=10", "step=2", "step=4"]
    end, at_4 = weights(tmp_path, 10), weights(tmp_path, 4)
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert not end["lm_head.weight"].equal(at_4["lm_head.weight"])


@pytest.mark.parametrize("guarded", [True, False])
def test_a_run_does_not_end_well_with_weights_that_are_no_numbers(
    tmp_path: Path, guarded: bool
) -> None:
    """Without guardrails at the next save, with them at the latest at the end."""
    step = 9 if guarded else 5
    with pytest.raises(CheckpointError, match=r"not saved; earlier checkpoints are intact\. Lower"):
        fit(tmp_path, (), callbacks=(BrokenWeight(step),), guarded=guarded)
    kept = (
        ["last", "step=2", "step=4"]
        if step == 5
        else ["last", *(f"step={n}" for n in (2, 4, 6, 8))]
    )
    assert steps_saved(tmp_path) == kept


def test_steps_that_are_taken_again_have_one_line(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        default_root_dir=tmp_path, is_global_zero=True, global_step=4, ckpt_path=None
    )
    file = tmp_path / "guardrails.jsonl"
    guardrails: Any = Guardrails()
    for checkpoint, kept in ((tmp_path / "checkpoints/step=4", [1, 3]), (Path("other/step=4"), [])):
        write_rows(file, [{"global_step": step} for step in (1, 3, 4, 7)])
        trainer.ckpt_path = checkpoint
        guardrails.on_train_start(trainer, None)
        assert [row["global_step"] for row in read_rows(file)] == kept
