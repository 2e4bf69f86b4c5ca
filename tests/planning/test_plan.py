"""`ic plan` as its user sees it: bytes against sums by hand, advice by following it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ic.config.compose import compose_config
from ic.planning.measurements import Measurements, MemoryCase, SpeedPoint
from ic.planning.options import PlanConfig
from ic.planning.plan import Planner
from ic.planning.report import plan_report, print_plan

# A quarter more than the tensors, and a gigabyte of context.
MEMORY = (MemoryCase("NVIDIA H100 80GB HBM3", 80 * 10**9, 10**9, 1000, 1250),)
ALLOCATION_BYTES = 512
GIB = 2**30
# mla_tiny: what its YAML says, and 320 tokens of bytes.
LAYERS, WIDTH, MLP, VOCABULARY, HEADS, NOPE, ROPE, V, RANK = 3, 128, 320, 320, 4, 32, 16, 32, 64
BLOCK_MATRICES = LAYERS * (
    WIDTH * HEADS * (NOPE + ROPE)  # queries
    + WIDTH * (RANK + ROPE)  # latent and rotated key
    + RANK * HEADS * (NOPE + V)  # keys and values out of the latent
    + HEADS * V * WIDTH  # output
    + 3 * WIDTH * MLP
)
# Two norms, the latent's and a scale for each head; embedding, head and the last norm.
VECTORS = LAYERS * (2 * WIDTH + RANK + HEADS) + WIDTH
EMBEDDINGS = 2 * VOCABULARY * WIDTH
PARAMETERS = BLOCK_MATRICES + VECTORS + EMBEDDINGS
TENSORS = LAYERS * 11 + 3


def planner(*overrides: str, measured: Measurements | None = None) -> Planner:
    config, _ = compose_config("plan", PlanConfig, [*overrides])
    return Planner(config, measured or Measurements((), MEMORY))


def report(*overrides: str) -> dict[str, Any]:
    return plan_report(planner(*overrides))


TINY = ("experiment=mla_tiny", "plan.gpu=a30", "evaluation.lengths=[512]")
LONG = (*TINY, "data.context_length=1048576", "data.tokens_per_batch=1048576")


def assert_rounded_up(nbytes: int, exact: int, shares: int = 1) -> None:
    """The allocator rounds each tensor up; the optimizer has two of its state and a counter."""
    assert 0 <= nbytes - exact <= 3 * TENSORS * ALLOCATION_BYTES // shares


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "number_bytes"), [("32-true", 4), ("bf16-mixed", 4), ("bf16-true", 2)]
)
@pytest.mark.parametrize(
    ("optimizer", "state_numbers"),
    [("adamw", 2 * PARAMETERS), ("muon", BLOCK_MATRICES + 2 * (VECTORS + EMBEDDINGS))],
)
def test_parts_are_what_a_hand_computes(
    precision: str, number_bytes: int, optimizer: str, state_numbers: int
) -> None:
    plan = planner(*TINY, f"optimizer={optimizer}", f"trainer.precision={precision}")
    peak = plan.training(*plan.batch_shape())
    parts = peak.parts_bytes
    assert_rounded_up(parts["parameters"], number_bytes * PARAMETERS)
    assert_rounded_up(parts["gradients"], number_bytes * PARAMETERS)
    assert_rounded_up(parts["optimizer"], number_bytes * state_numbers)
    # Autocast keeps a copy of each matrix that it multiplies with: not of the embedding.
    copies = 2 * (BLOCK_MATRICES + EMBEDDINGS // 2) if precision == "bf16-mixed" else 0
    assert parts.get("weight_copies", 0) == pytest.approx(copies, rel=0.03)
    assert peak.total_bytes == sum(parts.values())


@pytest.mark.slow
def test_parts_that_a_strategy_spreads_or_adds() -> None:
    alone, ddp, fsdp2 = (
        planner(*TINY, "optimizer=adamw", *layout).training(1, 1024).parts_bytes
        for layout in (
            ["plan.num_gpus=1"],
            ["plan.num_gpus=4", "plan.strategy=ddp"],
            ["plan.num_gpus=4", "plan.strategy=fsdp2"],
        )
    )
    for part in ("parameters", "gradients", "optimizer"):
        assert ddp[part] == alone[part]
        assert fsdp2[part] == -(-alone[part] // 4)
    assert fsdp2["activations"] == ddp["activations"] == alone["activations"]
    assert "communication" not in alone
    assert_rounded_up(ddp["communication"], 4 * PARAMETERS)
    # Two layers whole: gradients in fp32, weights in bf16, and what is outside the layers.
    layer = (BLOCK_MATRICES + VECTORS - WIDTH) // LAYERS
    assert fsdp2["communication"] == 2 * 4 * layer
    assert fsdp2["weight_copies"] == 2 * (2 * layer + EMBEDDINGS + WIDTH)


@pytest.mark.slow
def test_cache_by_its_formula() -> None:
    """Four prompts together: 65,536 tokens; eight more each for the answer."""
    parts = report(*TINY, "evaluation.lengths=[16384]")["evaluation_parts_bytes"]
    assert parts["cache"] == 4 * (16384 + 8) * LAYERS * (RANK + ROPE) * 4


@pytest.mark.slow
def test_what_is_needed_and_whether_it_fits() -> None:
    plan = planner(*TINY)
    peak = plan.training(*plan.batch_shape())
    assert plan.needed_bytes(peak) == int(1.25 * peak.total_bytes + 10**9)
    assert plan.memory_bytes == 24 * 10**9  # the datasheet's: the measurement is of another GPU
    assert planner(*TINY, "plan.gpu=h100").memory_bytes == 80 * 10**9
    share = (24 * 10**9 - 10**9) / peak.total_bytes - 1
    for slack, expected in ((share * 0.999, True), (share * 1.001, False)):
        case = MemoryCase("NVIDIA L40S", 1, 10**9, 10**9, int((1 + slack) * 10**9))
        assert planner(*TINY, measured=Measurements((), (case,))).fits(peak) is expected


def fits(*overrides: str) -> bool:
    """Whether a run fits, by a plan of its own."""
    plan = planner(*overrides)
    peaks = plan.training(*plan.batch_shape()), plan.evaluation()
    return all(plan.fits(peak) for peak in peaks if peak is not None)


def fits_if_followed(base: tuple[str, ...], line: str) -> bool:
    """The same with the settings that a line of advice names."""
    settings, _, reason = line.partition(": ")
    assert reason
    return fits(*base, *settings.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ([], ["model.gradient_checkpointing=true"]),
        (
            ["data.context_length=262144"],
            ["data.tokens_per_batch=262144", "model.gradient_checkpointing=true"],
        ),
        (
            ["data.tokens_per_batch=8388608"],
            ["data.tokens_per_batch=1048576 model.gradient_checkpointing=true"],
        ),
        (
            ["model.hidden_size=512", "model.gradient_checkpointing=true"],
            [
                "plan.strategy=fsdp2 plan.num_gpus=2 plan.context_parallel_size=2",
                "plan.strategy=fsdp2 plan.num_gpus=4 plan.context_parallel_size=4",
            ],
        ),
    ],
    ids=["recompute", "either", "both", "more GPUs"],
)
def test_advice_makes_the_run_fit(overrides: list[str], settings: list[str]) -> None:
    """One change, before two, before more GPUs; the longest context comes last."""
    base = (*LONG, *overrides)
    plan = report(*base)
    assert not plan["fits"]
    *lines, longest = plan["advice"]
    assert [line.partition(": ")[0] for line in lines] == settings
    assert longest.startswith(f"data.context_length={plan['largest_context_tokens']} ")
    for line in plan["advice"]:
        assert fits_if_followed(base, line), line


@pytest.mark.slow
def test_advice_for_an_evaluation_that_does_not_fit() -> None:
    base = (*TINY, "evaluation.lengths=[4096,1040384]", "evaluation.tokens_per_batch=8388608")
    base = (*base, "evaluation.prefill_chunk_tokens=1048576")
    plan = report(*base)
    assert not plan["fits"]
    names = [line.partition("=")[0] for line in plan["advice"]]
    assert names[0] == "evaluation.tokens_per_batch"
    assert len(set(names)) == len(names)
    for line in plan["advice"]:
        assert fits_if_followed(base, line), line


@pytest.mark.slow
def test_what_a_run_could_do_without() -> None:
    recomputing = "model.gradient_checkpointing=true"
    (line,) = report(*TINY, recomputing)["advice"]
    assert line.startswith("model.gradient_checkpointing=false: fits too")
    assert fits_if_followed((*TINY, recomputing), line)
    needs_it = report(*LONG, recomputing)
    assert needs_it["fits"]
    assert needs_it["advice"] == []
    assert report(*TINY)["advice"] == []


@pytest.mark.slow
def test_a_model_that_no_context_fits() -> None:
    """1.6e9 parameters of 16 bytes each; then six times as many, which eight GPUs cannot hold."""
    sizes = ("optimizer=adamw", "model.num_hidden_layers=2", "model.hidden_size=8192")
    base = (*TINY, *sizes, "model.intermediate_size=32768", "evaluation.tokens_per_batch=512")
    plan = report(*base)
    assert not plan["fits"]
    assert plan["largest_context_tokens"] == 0
    assert plan["advice"]
    for line in plan["advice"]:
        assert "plan.num_gpus=4" in line
        assert fits_if_followed(base, line), line
    sizes = ("model.hidden_size=16384", "model.intermediate_size=65536")
    (line,) = report(*base, *sizes, "model.num_hidden_layers=3")["advice"]
    assert line.startswith("no context fits: ")


@pytest.mark.slow
def test_advice_where_no_evaluation_fits() -> None:
    """A million tokens of 12 layers' cache, and no shorter prompt."""
    cache = ("model.num_hidden_layers=12", "model.kv_lora_rank=512")
    base = (*TINY, *cache, "evaluation.lengths=[1040384]")
    plan = report(*base)
    assert plan["evaluation_parts_bytes"]["cache"] > 24 * 10**9
    (line,) = plan["advice"]
    assert line == "callbacks.passkey=null: no evaluation of this grid fits"
    assert fits_if_followed(base, line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["data.context_length=65536", "data.tokens_per_batch=65536"],
        ["data.context_length=1024"],
        ["trainer.precision=bf16-mixed", "model.num_hidden_layers=6"],
        ["model.num_hidden_layers=9", "plan.num_gpus=2", "plan.strategy=fsdp2"],
    ],
)
def test_the_largest_context_fits_and_the_next_does_not(overrides: list[str]) -> None:
    base = (*TINY, *overrides)
    tokens = report(*base)["largest_context_tokens"]
    assert 2048 < tokens < 1048576
    assert tokens % 1024 == 0
    for length, expected in ((tokens, True), (tokens + 1024, False)):
        settings = (f"data.context_length={length}", f"data.tokens_per_batch={length}")
        assert fits(*base, *settings) is expected, length


@pytest.mark.slow
def test_the_largest_context_ends_with_the_positions() -> None:
    overrides = ("plan.gpu=h200", "model.max_position_embeddings=100000")
    lengths = ("data.max_position=100000", "evaluation.lengths=[512]")
    assert report(*TINY, *overrides, *lengths)["largest_context_tokens"] == 97 * 1024


@pytest.mark.slow
def test_a_pair_counts_as_two_sequences_unless_they_share_the_prompt() -> None:
    base = ("experiment=dpo_tiny", "plan.gpu=a30", "model.init_from=null", "callbacks.passkey=null")
    base = (*base, "data.context_length=524288", "data.share_prompt=false")
    plan = report(*base, "data.tokens_per_batch=2097152")
    assert not plan["fits"]
    for line in plan["advice"]:
        assert fits_if_followed(base, line), line


SPEED = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "attention": "torch",
}


@pytest.mark.parametrize("recompute", [False, True])
def test_speed(recompute: bool) -> None:
    """Recomputation is work that MFU does not count: four forward passes' worth instead of three."""
    points = (
        SpeedPoint("a-fit.json", preference=False, **SPEED, context_length_tokens=1024, share=0.4),
    )
    plan = planner(
        *TINY,
        "plan.gpu=h100",
        "plan.num_gpus=4",
        f"model.gradient_checkpointing={recompute}",
        measured=Measurements(points, ()),
    ).speed()
    matrices = BLOCK_MATRICES + EMBEDDINGS // 2
    # Scores and values over half of the tokens on the average.
    attention = LAYERS * 2 * HEADS * (NOPE + ROPE + V) * (1024 + 1) / 2
    flops = 3 * (2 * matrices + attention)
    assert plan["train_flops_per_token"] == pytest.approx(flops)
    assert plan["attention_share_of_flops"] == pytest.approx(3 * attention / flops, rel=2e-3)
    mfu = 0.4 * 3 / 4 if recompute else 0.4
    assert plan["mfu"] == pytest.approx(mfu)
    assert plan["tokens_per_s"] == pytest.approx(4 * mfu * 989.4e12 / flops)
    cache = LAYERS * (RANK + ROPE) * 2 * 1024
    assert plan["decode_tokens_per_s_at_most"] == pytest.approx(3.35e12 / (2 * PARAMETERS + cache))


@pytest.mark.slow
def test_the_command_prints_what_json_says(
    ic: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert ic("plan", *LONG, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert ic("plan", *LONG) == 0
    text = capsys.readouterr().out
    title = "1 x NVIDIA A30, ddp, 1 x 1,048,576 tokens per batch and replica"
    assert title in " ".join(text.split())  # the title is as wide as its table

    def row(name: str) -> list[str]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
        return [cell.strip() for cell in line.strip("│").split("│")][1:]

    overhead = Measurements.packaged().overhead()
    training, evaluation = plan["training_peak_bytes"], plan["evaluation_peak_bytes"]
    peaks = training, evaluation
    parts = plan["training_parts_bytes"], plan["evaluation_parts_bytes"]
    assert [sum(of.values()) for of in parts] == list(peaks)
    assert row("tensors") == [f"{peak / GIB:.2f}" for peak in peaks]
    assert row("activations") == [f"{of['activations'] / GIB:.2f}" for of in parts]
    needed = [peak * (1 + overhead.slack_share) + overhead.context_bytes for peak in peaks]
    assert row("CUDA context") == [f"{overhead.context_bytes / GIB:.2f}"] * 2
    assert row("needed") == [f"{size / GIB:.2f}" for size in needed]
    assert plan["needed_bytes"] == int(max(needed))
    assert plan["fits"] is False
    assert f"does NOT fit {24e9 / GIB:.2f} GiB (slack and context: {overhead.source})" in text
    assert f"longest training context that fits: {plan['largest_context_tokens']:,} tokens" in text
    for line in plan["advice"]:
        assert line in text


@pytest.mark.slow
def test_the_report_says_whether_the_overhead_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for measured, words in (
        (Measurements((), ()), "assumed, not measured"),
        (Measurements((), MEMORY), "median of 1 cases in plan-memory.json"),
    ):
        print_plan(plan_report(planner(*TINY, measured=measured)))
        text = capsys.readouterr().out
        assert f"(slack and context: {words}); longest" in text
        assert "fits 22.35 GiB" in text
        assert "linear scaling" not in text
        assert "tokens/s: unknown, no run of this model yet" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.gpu=h900", "plan.gpu='h900': choose one of h100, h200"),
        ("plan.strategy=zero", "plan.strategy='zero': choose one of ddp, fsdp, fsdp2"),
        ("plan.num_gpus=0", "plan.num_gpus=0: must be at least 1"),
        ("plan.output=table.csv", "plan.output='table.csv': must end in .json"),
        ("model/adapter=lora", "plan does not know LoRA"),
    ],
)
def test_bad_options(
    ic: Callable[..., int], capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert ic("plan", "experiment=mla_tiny", override) == 2
    assert message in capsys.readouterr().err


def test_a_layout_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="must be a multiple of the context parallel size 2"):
        planner(*TINY, "strategy=fsdp2", "strategy.context_parallel_size=2", "plan.num_gpus=3")


@pytest.mark.slow
def test_a_speed_on_several_gpus_says_that_it_is_scaled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    points = (
        SpeedPoint("a-fit.json", preference=False, **SPEED, context_length_tokens=1024, share=0.4),
    )
    for gpus, words in ((1, ")"), (4, "; linear scaling assumed)")):
        layout = (*TINY, "plan.gpu=h100", f"plan.num_gpus={gpus}")
        plan = plan_report(planner(*layout, measured=Measurements(points, MEMORY)))
        print_plan(plan)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "tokens/s, MFU" in line]
        assert line == (
            f"{plan['tokens_per_s']:,.0f} tokens/s, MFU 40 % ({plan['utilisation_source']}{words}"
        )


def test_without_an_evaluation_its_column_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """Not even a CUDA context, which no evaluation would need."""
    print_plan(report(*TINY, "callbacks.passkey=null"))
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:4]] for row in rows}
    assert {"tensors", "CUDA context", "needed"} < cells.keys()
    for training, evaluation in cells.values():
        assert float(training) >= 0
        assert evaluation == "-"
