"""Dollars by hand from docs/results, the loss by interruptions, and prices that are none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ic.serving.cost.interruptions import best_interval, expected_seconds

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
RESULTS = Path(__file__).resolve().parents[3] / "docs/results"
ONE = "{h100:{gpu:h100,gpus:1,dollars_per_hour:3.6,interruptions_per_hour:0,source:test}}"
SPOT = "{spot:{gpu:h200,gpus:2,dollars_per_hour:3.6,interruptions_per_hour:0.5,source:test}}"


def cost(ic: Run, folder: Path, offers: str, *args: str, code: int = 0) -> dict[str, Any]:
    """What `cost` writes of these offers alone."""
    output = folder / "cost.json"
    given = ["cost=none", f"cost.offers={offers}", f"output={output}"]
    results = [] if any(each.startswith("results=") for each in args) else [f"results=[{RESULTS}]"]
    assert ic("cost", *given, *results, *args) == code
    return json.loads(output.read_text()) if output.exists() else {}


def rows(found: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in found["rows"] if all(r.get(key) == each for key, each in wanted.items())]


def test_figures_by_hand(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    """$3.60 per hour is a tenth of a cent per second: a million tokens at n per second cost
    1000 / n dollars.
    """
    found = cost(ic, tmp_path, ONE, "tokens=1e9")
    (cell,) = rows(found, what="serving", batch=64, context_tokens=4096)
    # docs/results/serving-mla_1b.json: 201,004.9 prefill, 32,394.99 decode, 9,629.39 answer
    assert cell["prefill_dollars_per_million"] == pytest.approx(0.00497500, rel=1e-5)
    assert cell["decode_dollars_per_million"] == pytest.approx(0.0308690, rel=1e-5)
    assert cell["answer_dollars_per_million"] == pytest.approx(0.103849, rel=1e-5)
    assert cell["file"].endswith("docs/results/serving-mla_1b.json")
    assert (cell["first_token_p95_s"], cell["per_token_p95_s"]) == (1.2526, 0.0060559)
    # docs/results/mla_32k-fit.json, at 32k: 30,045.456 tokens per second on one H100
    file = str(RESULTS / "mla_32k-fit.json")
    (run,) = rows(found, what="training", file=file, context_tokens=32768)
    assert run["dollars_per_million"] == pytest.approx(0.0332829, rel=1e-5)
    assert run["run_dollars"] == pytest.approx(33.2829, rel=1e-5)
    assert run["run_hours"] == pytest.approx(9.24524, rel=1e-5)
    # Cheapest: 64 at once at 4k; with a longer context and a limit on the first token, another one.
    assert (found["cheapest_serving"]["batch"], found["cheapest_serving"]["context_tokens"]) == (
        64,
        4096,
    )
    assert "measured in" in " ".join(capsys.readouterr().out.split())
    found = cost(ic, tmp_path, ONE, "context_tokens=32768", "first_token_s=1")
    best = found["cheapest_serving"]
    assert (best["batch"], best["context_tokens"], best["first_token_p95_s"] <= 1) == (
        1,
        32768,
        True,
    )
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_several_gpus_take_several_machines(ic: Run, tmp_path: Path) -> None:
    """docs/results/scaling.json: ddp over NCCL, 128,908.568 tokens per second on four H200."""
    offers = "{pair:{gpu:h200,gpus:2,dollars_per_hour:7.2,interruptions_per_hour:0,source:test}}"
    found = cost(ic, tmp_path, offers, "model_name=mla_1b")
    run = next(r for r in rows(found, what="training", gpus=4) if "ddp over NCCL" in r["model"])
    assert run["machines"] == 2
    # Two machines at 0.2 cents per second.
    assert run["dollars_per_million"] == pytest.approx(0.0310297, rel=1e-5)


@pytest.mark.slow
def test_spot_by_hand(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    """Four GPUs are two machines, taken once per hour together; 30 s for a checkpoint, 300 s to
    begin again.
    """
    args = ("model_name=mla_1b", "checkpoint_s=30", "restart_s=300", "tokens=1e9")
    found = cost(ic, tmp_path, SPOT, *args)
    run = next(r for r in rows(found, what="training", gpus=4) if "ddp over NCCL" in r["model"])
    ratio = 30 / 7200
    best = math.sqrt(2 * 30 * 3600) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 30
    assert run["best_checkpoint_every_s"] == pytest.approx(best)
    assert run["best_checkpoint_every_s"] == pytest.approx(444.97, abs=0.01)
    slower = 3600 * math.exp(300 / 3600) * math.expm1((best + 30) / 3600) / best
    assert run["loss_share"] == pytest.approx(1 - 1 / slower)
    assert run["dollars_per_million"] == pytest.approx(slower * 0.002 / 128908.568 * 1e6, rel=1e-5)
    worse = cost(ic, tmp_path, SPOT, *args, "checkpoint_every_s=3600")
    other = next(r for r in rows(worse, what="training", gpus=4) if "ddp over NCCL" in r["model"])
    assert other["run_dollars"] > 1.3 * run["run_dollars"]
    # Nothing is guessed: without the two times a spot offer has no price.
    capsys.readouterr()
    cost(ic, tmp_path / "b", SPOT, "model_name=mla_1b", code=2)
    assert "spot: a spot offer: give checkpoint_s= and restart_s=" in capsys.readouterr().err


def test_the_loss_is_that_of_simulated_runs() -> None:
    """Interruptions drawn one by one, also while a checkpoint is saved and a restart is under way."""
    work, every, save, restart, between = 36_000.0, 900.0, 60.0, 200.0, 4000.0
    draw = np.random.default_rng(0)
    total = []
    for _ in range(2000):
        clock, done = 0.0, 0.0
        next_one = draw.exponential(between)
        while done < work:
            end = clock + every + save
            while next_one < end:  # what was not saved is lost, and the restart may fail, too
                clock = next_one
                next_one = clock + draw.exponential(between)
                while next_one < clock + restart:
                    clock = next_one
                    next_one = clock + draw.exponential(between)
                clock += restart
                end = clock + every + save
            clock, done = end, done + every
        total.append(clock)
    expected = expected_seconds(work, every, save, restart, between)
    assert np.mean(total) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("between", [300.0, 3600.0, 86_400.0])
def test_the_best_interval_is_nearly_the_best(between: float) -> None:
    """Against a search of Daly's expected time."""
    found = best_interval(20.0, between)
    grid = np.geomspace(1, 20 * between, 4000)
    least = min(expected_seconds(1, each, 20, 60, between) for each in grid)
    assert expected_seconds(1, found, 20, 60, between) <= 1.001 * least
    assert best_interval(20.0, 5.0) == 5.0  # more time for a checkpoint than there is


def test_what_is_not_measured_has_no_price(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    b200 = "{b:{gpu:b200,gpus:1,dollars_per_hour:5,interruptions_per_hour:0,source:test}}"
    cost(ic, tmp_path, b200, code=2)
    assert "b: no serving was measured on b200" in capsys.readouterr().err
    assert not (tmp_path / "cost.json").exists()
    both = ONE[:-1] + "," + b200[1:]
    found = cost(ic, tmp_path, both)
    assert [r["what"] for r in rows(found, offer="b")] == ["serving", "training"]
    assert "Without a price: b: no serving was measured on b200." in " ".join(
        capsys.readouterr().out.split()
    )
    # The targets are met by none of the cells.
    cost(ic, tmp_path, ONE, "context_tokens=8388608", code=2)
    assert "no measured cell meets the targets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("offers", "args", "says"),
    [
        ("{a:{gpu:h100,gpus:1,dollars_per_hour:null,interruptions_per_hour:0,source:x}}", (), "cost.offers.a.dollars_per_hour is missing"),
        ("{a:{gpu:h100,gpus:1,dollars_per_hour:2,source:x}}", (), "cost.offers.a.interruptions_per_hour is missing"),
        ("{a:{gpu:h100,gpus:1,dollars_per_hour:2,interruptions_per_hour:0}}", (), "cost.offers.a.source is missing"),
        ("{a:{gpu:h10,gpus:1,dollars_per_hour:2,interruptions_per_hour:0,source:x}}", (), "cost.offers.a.gpu='h10': did you mean h100"),
        ("{a:{gpu:h100,gpus:1,dollars_per_hour:-2,interruptions_per_hour:0,source:x}}", (), "cost.offers.a.dollars_per_hour=-2.0"),
        ("{a:{gpu:h100,gpus:0,dollars_per_hour:2,interruptions_per_hour:0,source:x}}", (), "cost.offers.a.gpus=0"),
        ("{}", (), "give at least one offer"),
        (ONE, ("results=[nowhere]",), "nowhere: no such file or folder"),
        (ONE, ("model_name=gpt",), "no measurement of a model with 'gpt' in its name"),
        (ONE, ("by=night",), "by='night'"),
        (ONE, ("first_token_s=0",), "first_token_s=0.0: must be above 0"),
    ],
)  # fmt: skip
def test_bad_input(
    ic: Run, tmp_path: Path, capsys: Capture, offers: str, args: tuple[str, ...], says: str
) -> None:
    assert cost(ic, tmp_path, offers, *args, code=2) == {}
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"output_tokens_per_s": 1.0}, "context_tokens=None, which must be a number"),
        ({"output_tokens_per_s": "fast", "context_tokens": 1, "batch": 1}, "output_tokens_per_s='fast'"),
        ({"what": "training", "tokens_per_s": 5.0}, "context_length_tokens=None"),
        ({"status": "measured", "device": "NVIDIA H100 80GB HBM3", "tokens_per_s": 5.0}, "num_gpus=None"),
        ({"what": "training", "tokens_per_s": -5.0, "context_length_tokens": 1}, "tokens_per_s=-5.0"),
    ],
)  # fmt: skip
def test_a_measurement_with_a_hole(
    ic: Run, tmp_path: Path, capsys: Capture, row: dict[str, Any], says: str
) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "config": ["x"], "rows": [row]}))
    assert cost(ic, tmp_path, ONE, f"results=[{file}]", code=2) == {}
    told = capsys.readouterr().err
    assert f"{file}: a measurement has" in told
    assert says in told


def test_the_example_has_a_source_for_every_price(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "cost.json"
    times = ("checkpoint_s=20", "restart_s=300", "tokens=1e9")
    assert ic("cost", f"results=[{RESULTS}]", *times, f"output={output}") == 0
    out = " ".join(capsys.readouterr().out.split())
    found = json.loads(output.read_text())
    assert {r["offer"] for r in found["rows"] if "refused" not in r} == {
        "h100_on_demand", "h100_spot", "h200_on_demand", "h200_spot",
    }  # fmt: skip
    assert out.count("dollars per hour (RunPod, ") == 4
    assert all(Path(r["file"]).is_file() for r in found["rows"] if "refused" not in r)
