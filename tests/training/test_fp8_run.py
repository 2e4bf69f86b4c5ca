"""Runs with FP8 products (`model.fp8`), which a CPU emulates: they learn as much as without,
continue exactly, and leave what a run without them would.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ic.checkpoint.folder import load_model
from ic.config.model import ModelConfig
from ic.datamodules.tokenizers import build_tokenizer
from ic.model.fp8 import use_fp8
from ic.training.optimizers import build_optimizer
from ic.training.options import OptimizerOptions
from tests.conftest import SHORT

pytest.importorskip("torchao", reason="pip install '.[fp8]'")
RUN = (
    *SHORT,
    "trainer.max_steps=6",
    "trainer.val_check_interval=6",
    "callbacks.checkpoint.every_n_steps=1",
    "callbacks.checkpoint.keep_every_n_steps=1",
    "callbacks.context_length=null",
    "callbacks.memory=null",
    "callbacks.passkey=null",
    "optimizer.warmup_steps=3",
)
FP8 = ("model.fp8=rowwise", "model.fp8_keep_layers=[0]")


def losses(folder: Path) -> dict[int, float]:
    rows = csv.DictReader((folder / "csv" / "metrics.csv").open())
    return {int(r["step"]): float(r["train/loss"]) for r in rows if r["train/loss"]}


@pytest.mark.slow
def test_a_run_continues_exactly_and_exports_plain_weights(
    ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic(*RUN, *FP8, "run_id=whole") == 0
    # Seven layers each; the latent and its key are 64 + 16 wide.
    assert (
        "model.fp8=rowwise: 14 of 21 linear layers multiply in FP8, 7 are kept, 0 have sizes"
        in capsys.readouterr().err
    )
    whole = tmp_path / "runs/debug/whole"
    assert ic(*RUN, *FP8, "run_id=rest", f"ckpt_path={whole / 'checkpoints/step=3'}") == 0
    rest, all_steps = losses(tmp_path / "runs/debug/rest"), losses(whole)
    assert rest == {step: loss for step, loss in all_steps.items() if step >= 3}
    weights = load_file(whole / "checkpoints/last/model.safetensors")
    for name, tensor in load_file(
        tmp_path / "runs/debug/rest/checkpoints/last/model.safetensors"
    ).items():
        assert tensor.equal(weights[name]), name

    assert ic(*RUN, "run_id=plain") == 0
    plain = tmp_path / "runs/debug/plain"
    others = load_file(plain / "checkpoints/last/model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in weights.items()} == {
        n: (t.shape, t.dtype) for n, t in others.items()
    }
    assert any(not tensor.equal(others[name]) for name, tensor in weights.items())
    configs = [(f / "checkpoints/last/config.json").read_text() for f in (whole, plain)]
    assert configs[0] == configs[1]
    # A run may go on without, and its loss is that of the same weights.
    assert ic("validate", f"run={whole}") == 0
    assert (
        ic("export", f"checkpoint={whole}", f"output={tmp_path / 'export'}", "dtype=float32") == 0
    )
    for name, tensor in load_model(tmp_path / "export").state_dict().items():
        assert tensor.equal(weights[name]), name
    rows = json.loads((whole / "validate/step=6.json").read_text())["rows"]
    measured = {row["metric"]: row["value"] for row in rows}
    last = list(csv.DictReader((whole / "csv/metrics.csv").open()))
    during = [float(row["val/loss"]) for row in last if row["val/loss"]][-1]
    assert measured["val/loss"] == pytest.approx(during, rel=1e-6)


def learning_curve(recipe: str | None, seed: int = 0) -> list[float]:
    """Mean losses of ten steps each of a small model that learns to copy 32 random bytes."""
    torch.manual_seed(seed)
    model = ModelConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    ).build(build_tokenizer("bytes"))
    if recipe is not None:
        use_fp8(model, recipe, None, [0], [])
    options = OptimizerOptions(name="muon", lr=5e-3, warmup_steps=0, decay_fraction=0)
    optimizer = build_optimizer(model, options)
    rng, losses = torch.Generator().manual_seed(1), []
    for _ in range(100):
        half = torch.randint(3, 60, (4, 32), generator=rng)
        ids = torch.cat((half, half), dim=1)
        sums = model.target_sums(ids, ids.clone().index_fill_(1, torch.arange(32), -100))
        assert sums.all_tokens is not None
        loss = sums.all_tokens / half.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return [sum(losses[at : at + 10]) / 10 for at in range(0, 100, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_it_learns_as_much_as_without(recipe: str) -> None:
    """Within 0.5 % at every point of the curve, a fifth of what other random weights change."""
    plain, fp8, other = learning_curve(None), learning_curve(recipe), learning_curve(None, seed=1)
    assert plain[0] - plain[-1] > 1.5

    def distance(curve: list[float]) -> float:
        return max(abs(a - b) / b for a, b in zip(curve, plain, strict=True))

    assert 0 < distance(fp8) < 5e-3
    assert distance(fp8) < distance(other) / 5


REFUSED = {
    "an adapter": (
        ["model/adapter=lora", "model.fp8=rowwise"],
        "model.fp8=rowwise does not go with model/adapter",
    ),
    "another recipe": (["model.fp8=row"], "model.fp8='row': did you mean rowwise? choose one of"),
    "no such layer": (
        ["model.fp8=rowwise", "model.fp8_keep_layers=[7]"],
        "model.fp8_keep_layers=[7]: the model has no decoder layer 7; choose from -3 to 2",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(
    what: str, ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, message = REFUSED[what]
    assert ic("fit", "experiment=mla_tiny", *overrides) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))


def test_not_with_preference_training_nor_in_a_plan(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ic("fit", "experiment=dpo_tiny", "model.fp8=rowwise") == 2
    assert "model.fp8=rowwise does not go with preference training" in capsys.readouterr().err
    assert ic("plan", "experiment=mla_4k", "model.fp8=rowwise") == 2
    assert "plan does not know what FP8 products take" in capsys.readouterr().err
