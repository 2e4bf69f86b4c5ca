"""The simulated memory against real tensors on the CPU and against the runs measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ic.callbacks.memory_accounting import optimizer_state, storage_bytes
from ic.config.compose import compose_config
from ic.model import MLAForCausalLM
from ic.planning.compare import compare_file
from ic.planning.measurements import MEMORY_FILE
from ic.planning.options import PlanConfig
from ic.planning.plan import Planner
from ic.planning.simulate import FakeRun
from ic.training.optimizers import build_optimizer

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
CPU = torch.device("cpu")
ROWS, TOKENS = 2, 512


def tiny(*overrides: str) -> PlanConfig:
    return compose_config("plan", PlanConfig, ["experiment=mla_tiny", *overrides])[0]


def real_step(
    config: PlanConfig, tokens: int = TOKENS, *, checkpointing: bool = False
) -> tuple[dict[str, int], int]:
    """Parts of a real step in mid-run, and the highest of the CPU allocator's count over it."""
    torch.manual_seed(0)
    model = MLAForCausalLM(config.model.mla_config(320)).train()
    optimizer = build_optimizer(model, config.optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(ROWS, tokens, dtype=torch.long)
    # One token in ten asks; none of the first, which the shift drops.
    marks = (torch.arange(tokens) % 10 == 1).expand(ROWS, -1).contiguous()
    parts = {
        "parameters": storage_bytes(model.parameters(), CPU),
        "optimizer": storage_bytes(optimizer_state([optimizer]), CPU),
    }
    # The profiler sees only those tensors freed that it saw made: the last step's gradients, too.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        sums = model.target_sums(ids, ids, answer_mask=marks, position_ids=ids)
        num_answers, num_all = sums.num_targets
        loss = sums.answers / num_answers + 0.1 * sums.all_tokens / num_all
        optimizer.zero_grad()
        loss.backward()
    changes = [
        e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    running = highest = 0
    for change in changes:
        running += change
        highest = max(highest, running)
    return parts, highest + sum(parts.values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_step_is_what_real_tensors_take(optimizer: str) -> None:
    config = tiny(f"optimizer={optimizer}")
    parts, highest = real_step(config)
    fake = FakeRun(config, config.model.mla_config(320), on_gpu=False)
    peak = fake.training_step(ROWS, TOKENS)
    assert fake.parameter_bytes() == parts["parameters"]
    # The allocator rounds each tensor up to 512 bytes; vectors are the smaller ones.
    for name in ("parameters", "optimizer"):
        assert 0 <= peak.parts_bytes[name] - parts[name] < 512 * 100, name
    assert peak.total_bytes == pytest.approx(highest, rel=0.02)


def test_muon_of_a_gpu_is_planned_alike_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch so small that the optimizer's temporaries are the peak."""
    config, peaks = tiny("optimizer=muon"), {}
    for multiplies in (True, False):
        dtype = torch.bfloat16 if multiplies else torch.float32
        monkeypatch.setattr(
            "ic.training.muon.newton_schulz_dtype", lambda device, dtype=dtype: dtype
        )
        for on_gpu in (True, False):
            fake = FakeRun(config, config.model.mla_config(320), on_gpu=on_gpu)
            peaks[on_gpu, multiplies] = fake.training_step(1, 32).parts_bytes["optimizer_step"]
    assert peaks[True, True] == peaks[True, False] == peaks[False, True] < peaks[False, False]


def test_step_on_the_triton_kernels() -> None:
    """Against what the kernels allocate in the interpreter, which is slow: a small model."""
    config = tiny(
        "model.attention=triton",
        "model.norm=triton",
        "model.rope=triton",
        "model.num_hidden_layers=1",
        "model.num_attention_heads=2",
        "model.hidden_size=64",
        "model.intermediate_size=96",
    )
    parts, highest = real_step(config, tokens=64)
    fake = FakeRun(config, config.model.mla_config(320), on_gpu=False)
    peak = fake.training_step(ROWS, 64)
    fixed = sum(parts.values())
    assert peak.total_bytes - fixed == pytest.approx(highest - fixed, rel=0.05)


def test_checkpointed_step_is_what_real_tensors_take() -> None:
    config = tiny()
    _, highest = real_step(config, checkpointing=True)
    fake = FakeRun(config, config.model.mla_config(320), on_gpu=False)
    peak = fake.training_step(ROWS, TOKENS, checkpointing=True)
    assert peak.total_bytes == pytest.approx(highest, rel=0.02)


def test_gradients_stay_through_forward() -> None:
    config = tiny()
    peak = FakeRun(config, config.model.mla_config(320)).training_step(ROWS, TOKENS)
    assert peak.parts_bytes["gradients"] >= peak.parts_bytes["parameters"]


def test_checkpointing_and_length() -> None:
    config = tiny()
    fake = FakeRun(config, config.model.mla_config(320))
    once, twice = (fake.training_step(1, n) for n in (2048, 4096))
    fixed = sum(once.parts_bytes[k] for k in ("parameters", "gradients", "optimizer"))
    assert twice.total_bytes - fixed == pytest.approx(2 * (once.total_bytes - fixed), rel=0.02)
    assert fake.training_step(1, 4096, checkpointing=True).total_bytes < twice.total_bytes


def test_the_measured_run_of_the_1b() -> None:
    """mla_32k on one H100: the caching allocator's peak."""
    data = json.loads((RESULTS / "mla_32k-fit.json").read_text())
    (measured,) = [row["peak_bytes"] for row in data["rows"] if row["what"] == "memory"]
    config, _ = compose_config("plan", PlanConfig, ["experiment=mla_32k"])
    peak = FakeRun(config, config.model.mla_config(320)).training_step(1, 32768)
    assert peak.total_bytes == pytest.approx(measured, rel=0.02)


def test_cache_of_the_prefill() -> None:
    config = tiny()
    peak = FakeRun(config, config.model.mla_config(320)).prefill(2, 4096, 1024)
    # 8 more than the prompt, 3 layers of 64 + 16 float32 numbers.
    assert peak.parts_bytes["cache"] == 2 * (4096 + 8) * 3 * 80 * 4


@pytest.mark.slow
def test_the_published_comparison_is_what_plan_predicts_today() -> None:
    """docs/planning.md's table, each case predicted anew: one GPU, DDP, FSDP, FSDP2 and context
    parallelism, 4k to 1M tokens.
    """
    published = json.loads((RESULTS / "plan-scaling.json").read_text())["rows"]
    files = list(dict.fromkeys(row["source"] for row in published))
    assert len(published) == 10
    fresh = [row for file in files for row in compare_file(RESULTS / file)]
    assert [row["case"] for row in fresh] == [row["case"] for row in published]
    for row, told in zip(fresh, published, strict=True):
        assert row["measured_peak_bytes"] == told["measured_peak_bytes"], row["case"]
        assert row["predicted_peak_bytes"] == pytest.approx(told["predicted_peak_bytes"], rel=1e-3)
        assert row["predicted_peak_bytes"] == pytest.approx(row["measured_peak_bytes"], rel=0.04)
        assert told["error_share"] == pytest.approx(
            told["predicted_peak_bytes"] / told["measured_peak_bytes"] - 1
        )


@pytest.mark.slow
@pytest.mark.skipif(not (RESULTS / MEMORY_FILE).is_file(), reason="plan.measure=true was not run")
def test_measured_cases_are_within_ten_per_cent() -> None:
    """The cases of cases.yaml, predicted anew, on the GPU that measured them."""
    rows = json.loads((RESULTS / MEMORY_FILE).read_text())["rows"]
    assert len(rows) >= 6
    for row in rows:
        overrides = [*row["overrides"], "plan.num_gpus=1", f"plan.liger={row['liger']}"]
        planner = Planner(compose_config("plan", PlanConfig, overrides)[0])
        peak = planner.training(row["rows"], row["context_length_tokens"])
        assert peak.total_bytes == pytest.approx(row["measured_peak_bytes"], rel=0.1), row["case"]
        assert peak.total_bytes == pytest.approx(row["predicted_peak_bytes"], rel=0.01), row["case"]


@pytest.mark.parametrize("length", [32768, 65536])
def test_preference_training_is_what_the_benchmark_measured(length: int) -> None:
    """A pair on one H200 that sent its prompt through the model twice; TRL took the same."""
    data = json.loads((RESULTS / "preference-memory-bytes.json").read_text())
    measured = [r["peak_bytes"] for r in data["rows"] if r["length_tokens"] == length]
    config, _ = compose_config(
        "plan",
        PlanConfig,
        [
            "experiment=dpo_32k",
            "model.init_from=null",
            f"data.context_length={length}",
            f"data.tokens_per_batch={2 * length}",
            "data.share_prompt=false",
        ],
    )
    peak = Planner(config).training(*Planner(config).batch_shape())
    for nbytes in measured:
        assert peak.total_bytes == pytest.approx(nbytes, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("length", [32768, 65536])
@pytest.mark.parametrize("side", ["ours", "ours, prompt twice"])
def test_preference_training_with_a_large_vocabulary(length: int, side: str) -> None:
    """Measured on one H200, like the runs above."""
    data = json.loads((RESULTS / f"preference-memory-{length // 1024}k.json").read_text())
    (measured,) = (r["peak_bytes"] for r in data["rows"] if r["side"] == side)
    shared = side == "ours"
    config, _ = compose_config(
        "plan",
        PlanConfig,
        [
            "experiment=dpo_32k",
            "model.init_from=null",
            "model.attention=triton",
            f"data.context_length={length}",
            f"data.tokens_per_batch={2 * length}",
            f"data.share_prompt={str(shared).lower()}",
        ],
    )
    run = FakeRun(config, config.model.mla_config(data["config"]["vocab_size"]))
    peak = run.training_step(1 if shared else 2, length)
    assert peak.total_bytes == pytest.approx(measured, rel=0.1)


def test_shared_prompt_and_frozen_reference() -> None:
    def peak(*overrides: str) -> int:
        config, _ = compose_config("plan", PlanConfig, ["experiment=dpo_tiny", *overrides])
        planner = Planner(config)
        return planner.training(*planner.batch_shape()).total_bytes

    shared = peak("data.context_length=1024", "data.tokens_per_batch=8192")
    apart = peak(
        "data.context_length=1024", "data.tokens_per_batch=8192", "data.share_prompt=false"
    )
    memory = peak(
        "data.context_length=1024",
        "data.tokens_per_batch=8192",
        "preference.precompute_ref_log_probs=false",
    )
    assert shared < 0.7 * apart
    with torch.device("meta"):
        model = MLAForCausalLM(tiny().model.mla_config(320))
    assert 0 <= memory - shared - 4 * sum(p.numel() for p in model.parameters()) < 10_000


def test_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"plan does not know LoRA \(model/adapter\)"):
        FakeRun(tiny("model/adapter=lora"), tiny().model.mla_config(320))


def test_an_indexer_at_work_is_refused() -> None:
    for options in (("mode=sparse",), ("mode=dense", "objective.indexer=alone")):
        config = tiny(f"model.indexer.{options[0]}", *options[1:])
        with pytest.raises(ValueError, match="plan does not know what an indexer takes"):
            FakeRun(config, config.model.mla_config(320))


def test_comparison_wants_files_of_scaling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no measured runs of `scaling`"):
        compare_file(RESULTS / "mla_32k-fit.json")
    with pytest.raises(ValueError, match=r"holds no measured runs of `scaling`"):
        compare_file(tmp_path / "missing.json")


def test_unknown_precision() -> None:
    config = tiny("trainer.precision=64-true")
    with pytest.raises(ValueError, match=r"trainer\.precision='64-true': plan knows 32-true"):
        FakeRun(config, config.model.mla_config(320))


def test_a_prefill_peaks_in_its_last_chunks() -> None:
    """Six chunks and a short one, of which two are simulated, against every whole chunk."""
    config = tiny("trainer.precision=bf16-mixed")
    fake = FakeRun(config, config.model.mla_config(320))
    tokens = 6 * 1024 + 512
    # 3 layers of 64 + 16 bf16 numbers, and the int64 ids.
    per_token = 2 * (3 * 80 * 2 + 8)
    highest = max(
        fake.prefill(2, chunks * 1024, 1024).total_bytes + (tokens - chunks * 1024) * per_token
        for chunks in range(1, 7)
    )
    assert fake.prefill(2, tokens, 1024).total_bytes == highest
