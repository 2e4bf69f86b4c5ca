"""Runs that train an indexer: warm-up, sparse training, what they refuse, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ic.checkpoint.folder import load_config
from tests.conftest import SHORT

Run = Callable[..., int]
INDEXER = ("model.indexer.num_heads=2", "model.indexer.head_dim=16", "model.indexer.top_k=32")
LAST = "checkpoints/last"


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs/debug") / run / LAST / "model.safetensors")


def rows(run: str) -> list[dict[str, str]]:
    text = (Path("runs/debug") / run / "csv/metrics.csv").read_text().splitlines()
    names = text[0].split(",")
    return [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]


@pytest.mark.slow
def test_from_a_dense_model_to_a_sparse_one(ic: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert ic(*SHORT, "run_id=dense") == 0
    first = "model.init_from=runs/debug/dense"
    alone = ("model.indexer.mode=dense", "objective.indexer=alone", "optimizer.warmup_steps=0")
    assert ic(*SHORT, "run_id=warm", first, *INDEXER, *alone) == 0
    before, warm = weights("dense"), weights("warm")
    learnt = {name for name in warm if name not in before}
    assert {name.rsplit("self_attn.", 1)[1] for name in learnt} == {
        f"indexer.{name}"
        for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias",
                     "weights_proj.weight")
    }  # fmt: skip
    assert all(warm[name].equal(before[name]) for name in before)
    losses = [float(r["train/index_loss"]) for r in rows("warm") if r.get("train/index_loss")]
    assert len(losses) > 5
    assert losses[-1] < losses[0]
    validated = [r["val/index_loss"] for r in rows("warm") if r.get("val/index_loss")]
    assert validated
    capfd.readouterr()
    second = "model.init_from=runs/debug/warm"
    sparse = ("model.indexer.mode=sparse", "objective.indexer=with_model")
    assert ic(*SHORT, "run_id=sparse", second, *INDEXER, *sparse) == 0
    assert "never trained" not in capfd.readouterr().err
    after = weights("sparse")
    assert all(not after[name].equal(warm[name]) for name in warm if "proj" in name or "wk" in name)
    config = load_config(Path("runs/debug/sparse") / LAST)
    assert (config.indexer, config.index_topk, config.index_n_heads) == ("sparse", 32, 2)

    # What is left goes on, with another mode, without the indexer, and as an export.
    for mode in ("dense", "sparse"):
        out = f"{mode}.jsonl"
        assert ic("generate", "checkpoint=runs/debug/sparse", f"indexer={mode}",
                  f"prompt={'The grass is green. ' * 8}", "max_new_tokens=4") == 0, out  # fmt: skip
    assert ic("export", "checkpoint=runs/debug/sparse", "output=out") == 0
    exported = json.loads(Path("out/config.json").read_text())
    assert exported["model_type"] == "infinite_context"
    assert exported["indexer"] == "sparse"
    assert "indexer=sparse of InfiniteContext" in exported["n_shared_experts"]
    assert load_file("out/model.safetensors").keys() == after.keys()
    off = ("model.init_from=runs/debug/sparse", "model.indexer.mode=off")
    assert ic(*SHORT, "run_id=off", *off) == 0
    assert weights("off").keys() == before.keys()
    pretrained = ("model=pretrained", "model.init_from=out", "model.indexer.mode=dense")
    assert ic(*SHORT, "run_id=pretrained", *pretrained) == 0
    assert load_config(Path("runs/debug/pretrained") / LAST).indexer == "dense"
    assert weights("pretrained").keys() == after.keys()
    # A run goes on.
    assert ic(*SHORT, "run_id=sparse", second, *INDEXER, *sparse, "trainer.max_steps=12") == 0


def test_an_indexer_that_was_never_trained_is_announced(
    ic: Run, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert ic(*SHORT, "model.indexer.mode=sparse", *INDEXER) == 0
    said = capfd.readouterr().err + "".join(str(w.message) for w in recwarn.list)
    assert "with an indexer that was never trained: it chooses 32 tokens at random" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["objective.indexer=alone"], "the model has no indexer"),
        (["objective.indexer=both"], "objective.indexer='both'"),
        (["model.indexer.mode=on"], "model.indexer.mode='on'"),
        (["model.indexer.mode=dense", "model.indexer.top_k=0"], "model.indexer.top_k=0"),
        (["model.indexer.mode=dense", "model.indexer.group_size=2"], "index_group_size=2 of 3"),
        (
            ["model.indexer.mode=dense", "model.indexer.head_dim=8"],
            "index_head_dim=8 and 16 rotated dimensions",
        ),
        (
            ["model.indexer.mode=dense", "objective.indexer=alone", "model/adapter=lora"],
            "goes without preference training, distillation and LoRA",
        ),
        (
            ["model.indexer.mode=dense", "objective.indexer=alone", "strategy=fsdp2"],
            "does not run with strategy=fsdp2",
        ),
        (
            ["model.indexer.mode=sparse", "strategy=fsdp2", "strategy.context_parallel_size=2"],
            "strategy.context_parallel_size above 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    ic: Run, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert ic(*SHORT, *options) == 2
    assert message in capfd.readouterr().err
    assert not Path("runs").exists()


def test_a_model_without_an_indexer_cannot_be_asked_for_one(
    ic: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ic(*SHORT) == 0
    capfd.readouterr()
    asked = ("checkpoint=runs/debug/default", "indexer=sparse", "prompt=The")
    assert ic("generate", *asked) == 2
    assert "indexer=sparse: the model has no indexer" in capfd.readouterr().err
