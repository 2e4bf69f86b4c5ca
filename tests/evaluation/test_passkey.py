"""Prompts, greedy answers, resume, and what the heatmap shows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from ic.datamodules.needle_names import TASKS
from ic.datamodules.needles import answer_keys
from ic.evaluation.by_depth import depth_rows, pool_cells
from ic.evaluation.by_depth_figure import COLORS, CONTROL_COLOR, draw_by_depth
from ic.evaluation.options import CONTROL
from ic.evaluation.passkey.grid import Cell, PasskeyGridConfig
from ic.evaluation.passkey.prompts import build_prompt
from ic.evaluation.passkey.suite import PasskeySuite
from ic.evaluation.report import write_csv
from ic.evaluation.runner import run_suite, settings_hash
from ic.files.json_lines import read_rows
from ic.inference.greedy import GreedyDecoder
from ic.model.byte_tokenizer import ByteTokenizer
from ic.model.fingerprint import fingerprint
from tests.evaluation.oracle import Oracle

TOKENIZER = ByteTokenizer()
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def text_of(prompt) -> str:
    return bytes(prompt.ids.tolist()).decode()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("filler", ["noise", "random"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_has_exact_length_and_depth(task: str, filler: str, depth: float) -> None:
    grid = PasskeyGridConfig(tasks=[task], num_needles=3)
    prompt = build_prompt(TOKENIZER, grid, Cell(task, 2000, depth, filler, 1), 7)
    text = text_of(prompt)
    assert len(text) == 2000
    assert "What" in text[-140:]
    assert set(prompt.expected) <= set(answer_keys(text))
    if task == "single":
        start = text.index(" The pass key is " + prompt.expected[0])
        room = (
            2000
            - len(" What is the pass key? The pass key is")
            - len(f" The pass key is {'0' * 5}. Remember it. {'0' * 5} is the pass key. ")
        )
        assert start == round(depth * room)
    assert (
        prompt.expected
        == build_prompt(TOKENIZER, grid, Cell(task, 2000, depth, filler, 1), 7).expected
    )
    assert (
        prompt.expected
        != build_prompt(TOKENIZER, grid, Cell(task, 2000, depth, filler, 1), 8).expected
    )


def test_control_has_no_needle() -> None:
    grid = PasskeyGridConfig(tasks=["multi_key"], num_needles=3)
    for task, others in (("single", 0), ("multi_key", 3)):
        prompt = build_prompt(TOKENIZER, grid, Cell(task, 1000, CONTROL, "noise", 1), 0)
        stated = answer_keys(text_of(prompt))
        assert prompt.expected[0] not in stated
        assert len(stated) == others


def test_too_short_for_its_needles() -> None:
    grid = PasskeyGridConfig(tasks=["multi_key"], num_needles=8)
    with pytest.raises(ValueError, match="128 tokens cannot hold the task multi_key"):
        build_prompt(TOKENIZER, grid, Cell("multi_key", 128, 0.5, "noise", 1), 0)


@pytest.mark.parametrize("chunk", [1000, 64, 7])
def test_answers_equal_generate(make_model, chunk: int) -> None:
    model = make_model(length_temperature="ssmax")
    ids = torch.randint(3, 97, (3, 150), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[:, 150:]
    assert GreedyDecoder(model, chunk).answers(ids, 9).equal(expected)


@pytest.fixture
def oracle(make_model) -> Oracle:
    return Oracle(make_model(vocab_size=320).config)


GRID = {"lengths": [256, 512], "depths": [0.0, 0.5, 1.0], "samples": 3, "control_samples": 2}


def test_scores_and_control(oracle: Oracle, tmp_path: Path) -> None:
    suite = PasskeySuite(PasskeyGridConfig(**GRID))
    rows = run_suite(oracle, TOKENIZER, suite, tmp_path / "samples.jsonl")
    for cell in pool_cells(rows):
        assert str(cell.accuracy) == ("0/4" if cell.is_control else "6/6")
    assert len(rows) == 2 * 2 * 4


def test_resumes_sample_by_sample(oracle: Oracle, tmp_path: Path) -> None:
    file, suite = tmp_path / "samples.jsonl", PasskeySuite(PasskeyGridConfig(**GRID))

    class Stop(Exception):
        pass

    def stop_after_five(cell: Cell, row: dict, before: bool) -> None:
        if len(file.read_text().splitlines()) >= 5:
            raise Stop

    with pytest.raises(Stop):
        run_suite(oracle, TOKENIZER, suite, file, stop_after_five)
    before = file.read_text()
    file.write_text(before + '{"cut sho')  # a crash in the middle of a line
    rows = run_suite(oracle, TOKENIZER, suite, file)
    assert file.read_text().startswith(before)
    assert sum(row["n"] for row in rows) == len(read_rows(file)) == 44
    assert run_suite(oracle, TOKENIZER, suite, file) == rows
    assert len(read_rows(file)) == 44  # nothing was computed again
    with torch.no_grad():
        oracle.lm_head.weight[0, 0] += 1e-3
    run_suite(oracle, TOKENIZER, suite, file)
    assert len(read_rows(file)) == 88  # other weights, other samples


def test_damaged_results_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"a": 1}\n{oops}\n{"b": 2}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_rows(file)


def test_fingerprint_sees_a_swap(make_model) -> None:
    model = make_model()
    before = fingerprint(model)
    assert fingerprint(make_model()) == before
    weight = model.lm_head.weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()
    assert fingerprint(model) != before


ROWS = [
    {
        "task": "single",
        "length_tokens": length,
        "depth": depth,
        "filler": filler,
        "n": 10,
        "correct": c,
    }
    for length, depth, c in [
        (512, 0.0, 10),
        (512, 1.0, 0),
        (4096, 0.0, 5),
        (4096, 1.0, 10),
        (512, CONTROL, 0),
        (4096, CONTROL, 0),
    ]
    for filler in ("noise", "random")
]


def test_csv_pools_the_fillers(tmp_path: Path) -> None:
    write_csv(depth_rows(ROWS, "passkey"), tmp_path / "heatmap.csv")
    rows = list(csv.DictReader((tmp_path / "heatmap.csv").open()))
    by_cell = {(row["length_tokens"], row["depth"]): row for row in rows}
    assert len(rows) == 6
    assert by_cell["512", "0.0"]["correct"] == "20"
    assert by_cell["512", "0.0"]["low_95"] == "0.8389"
    assert by_cell["4096", "0.0"]["accuracy"] == "0.5000"
    assert by_cell["4096", "control"]["accuracy"] == "0.0000"


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "validation"},
        {"seed": 1},
        {"num_needles": 5},
        {"prompt": "chat", "tasks": ["multi_key"]},
        {"share_haystack": True},
    ],
)
def test_cells_of_other_settings_are_not_reused(changes: dict) -> None:
    """Whatever shapes a prompt without being a field of its cell is part of the cell's identity."""
    base = {"lengths": [512], "depths": [0.5], "samples": 1, "control_samples": 0}
    plain, other = (PasskeySuite(PasskeyGridConfig(**{**base, **given})) for given in ({}, changes))
    assert settings_hash(plain) != settings_hash(other)
    assert settings_hash(plain) == settings_hash(PasskeySuite(PasskeyGridConfig(**base)))


def test_depth_grows_downwards(figures: list[Figure], tmp_path: Path) -> None:
    """The cells at depth 0 are drawn above those at depth 1, each beside its own label."""
    draw_by_depth(ROWS, tmp_path / "heatmap.png", title="t")
    (figure,) = figures
    axis = figure.axes[0]
    top, bottom = (axis.transData.transform((1024, y))[1] for y in (0, 1))
    assert top > bottom
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0 %", "100 %"]
    shown = {
        (round(text.get_position()[0]), text.get_position()[1]): text.get_text().split("\n")[0]
        for text in axis.texts
    }
    expected = {
        (cell.length_tokens, float(cell.depth == 1.0)): str(cell.accuracy)
        for cell in pool_cells(ROWS)
        if not cell.is_control
    }
    assert len(set(expected.values())) > 2
    assert {key[1]: value for key, value in shown.items() if key[0] == 512} == {
        key[1]: value for key, value in expected.items() if key[0] == 512
    }


def test_png_shows_the_fixed_colours(tmp_path: Path) -> None:
    """Zero, one half and one in the colours of the scale, whatever else is in the picture; the
    control in one of its own, although it was answered as badly as the worst cell.
    """
    draw_by_depth(ROWS, tmp_path / "heatmap.png", title="t", trained_length=512)
    pixels = (imread(tmp_path / "heatmap.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
    scale = matplotlib.colormaps[COLORS]
    for color in (*(scale(share)[:3] for share in (0.0, 0.5, 1.0)), to_rgb(CONTROL_COLOR)):
        wanted = (np.array(color) * 255).round()
        near = (np.abs(pixels - wanted).max(-1) <= 2).mean()
        assert near > 0.02, color
    assert len(set(to_rgb(CONTROL_COLOR))) == 1  # grey, which the scale does not hold
    assert min(np.ptp(scale(share)[:3]) for share in np.linspace(0, 1, 101)) > 0.2
    assert not list(tmp_path.glob("*.partial*"))


def test_the_scale_grows_lighter_all_the_way() -> None:
    """Which every kind of colour vision, and a printer without colours, can tell."""
    red, green, blue = np.array(matplotlib.colormaps[COLORS](np.linspace(0, 1, 101)))[:, :3].T
    lightness = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    assert (np.diff(lightness) > 0).all()


@pytest.mark.parametrize(
    ("trained", "says", "marks"),
    [
        (512, "dashed: trained to 512 tokens", 1),
        (128, "trained to 128 tokens; every length here is beyond that", 0),
        (2**20, "", 0),
    ],
)
def test_the_picture_says_what_was_trained(
    trained: int, says: str, marks: int, figures: list[Figure], tmp_path: Path
) -> None:
    assert min(row["length_tokens"] for row in ROWS) > 128
    draw_by_depth(ROWS, tmp_path / "heatmap.png", title="t", trained_length=trained)
    axis = figures[0].axes[0]
    assert axis.get_title(loc="right") == says
    assert len(axis.lines) == marks


def test_the_picture_says_what_its_cells_hold(figures: list[Figure], tmp_path: Path) -> None:
    draw_by_depth(ROWS, tmp_path / "heatmap.png", title="mla_tiny, step 5: passkeys")
    (figure,) = figures
    assert figure.get_suptitle() == "mla_tiny, step 5: passkeys"
    legend = figure.get_supxlabel()
    assert "exact answers of n prompts, and their 95 % interval" in legend
    assert "grey: the same questions with no needle" in legend
    texts = [text for axis in figure.axes for text in axis.texts]
    by_text = {text.get_text(): text.get_color() for text in texts}
    assert by_text["20/20\n[84-100]"] != by_text["10/20\n[30-70]"]  # legible on light and on dark


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "evaluation.lengths"),
        ({"lengths": [64]}, "at least 128"),
        ({"depths": [1.2]}, r"evaluation.depths=\[1.2\]"),
        ({"tasks": ["double"]}, "evaluation.tasks"),
        (
            {"fillers_by_length": {512: ["words"]}},
            r"fillers_by_length.512=\['words'\]: one or more",
        ),
        ({"split": "train"}, "choose validation or test"),
        ({"samples": 0}, "evaluation.samples=0"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PasskeyGridConfig(**changes)


def test_lengths_may_have_their_own_fillers_and_samples() -> None:
    grid = PasskeyGridConfig(
        lengths=[1024, 512],
        depths=[0.5],
        samples=3,
        samples_by_length={1024: 1},
        fillers_by_length={1024: ["noise"], 4096: ["random"]},
        tasks=["single", "multi_key"],
        control_samples=0,
    )
    assert list(grid.cells()) == [
        Cell(task, length, 0.5, filler, samples)
        for length, samples, fillers in ((512, 3, ("noise", "random")), (1024, 1, ("noise",)))
        for task in ("single", "multi_key")
        for filler in fillers
    ]


def test_longer_than_the_model(oracle: Oracle, tmp_path: Path) -> None:
    for length in (4096, 4090):  # the answer takes seven: a prompt that fits is not enough
        grid = PasskeyGridConfig(lengths=[512, length])
        with pytest.raises(ValueError, match=f"{length} tokens and 7 .* model has 4096 positions"):
            run_suite(oracle, TOKENIZER, PasskeySuite(grid), tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_rows_hold_what_was_answered(oracle: Oracle, tmp_path: Path) -> None:
    grid = PasskeyGridConfig(lengths=[256], depths=[0.5], samples=1, control_samples=0)
    run_suite(oracle, TOKENIZER, PasskeySuite(grid), tmp_path / "c.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(rows) == 2  # a sample each of noise and random words
    for row in rows:
        assert row["text"].strip(" .") == row["expected"][0]


@pytest.mark.parametrize(
    ("cells", "results"),
    [
        ("infinitecontext_1b-base-distractors-cells", "infinitecontext_1b-base-distractors"),
        ("infinitecontext_1b-sft-distractors-cells", "infinitecontext_1b-sft-distractors"),
        ("mla_10m-cells", "mla_10m-passkey"),  # depths that share a haystack
    ],
)
def test_published_cells_stay_valid(cells: str, results: str) -> None:
    """Their settings are still what the grid gives, and their rows what was published."""
    rows = read_rows(RESULTS / f"{cells}.jsonl")
    published = json.loads((RESULTS / f"{results}.json").read_text())
    options = published["config"]["evaluation"]
    for name in ("samples_by_length", "fillers_by_length"):  # JSON has no keys that are numbers
        options[name] = {int(length): value for length, value in options[name].items()}
    suite = PasskeySuite(PasskeyGridConfig(**options))
    assert {row["settings"] for row in rows} == {settings_hash(suite)}
    assert len(rows) == len(list(suite.cells()))
    assert suite.rows(rows) == [row for row in published["rows"] if row["what"] == "passkey"]


def test_controls_count_for_no_accuracy(oracle: Oracle, tmp_path: Path) -> None:
    suite = PasskeySuite(PasskeyGridConfig(**GRID))
    rows = suite.rows(run_suite(oracle, TOKENIZER, suite, tmp_path / "a" / "b" / "cells.jsonl"))
    assert {row["depth"] for row in suite.counted(rows)} == {0.0, 0.5, 1.0}
    heads, lines = suite.published(rows)
    shown = [dict(zip(heads, line, strict=True)) for line in lines]
    assert [(line["tokens"], line["exact answers"], line["no needle"]) for line in shown] == [
        ("256", "18/18", "0/4"),
        ("512", "18/18", "0/4"),
    ]


def test_the_length_that_a_refusal_names_is_enough() -> None:
    grid = PasskeyGridConfig(tasks=["multi_key"], num_needles=8)
    with pytest.raises(ValueError, match="it takes") as refused:
        build_prompt(TOKENIZER, grid, Cell("multi_key", 128, 0.5, "noise", 1), 0)
    enough = int(str(refused.value).rsplit(" ", 1)[1])
    prompt = build_prompt(TOKENIZER, grid, Cell("multi_key", enough, 0.5, "noise", 1), 0)
    assert len(prompt.ids) == enough
    with pytest.raises(ValueError, match=f"it takes {enough}"):
        build_prompt(TOKENIZER, grid, Cell("multi_key", enough - 1, 0.5, "noise", 1), 0)
