"""Published tables and pictures: the figures of the results files, and fresh."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from ic.studies.tables import pictures
from ic.studies.tables.diagrams import DIAGRAMS
from ic.studies.tables.headline import headline_table
from ic.studies.tables.pictures import PICTURES, Picture

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.file)
def test_pictures_are_fresh(picture: Picture) -> None:
    with Image.open(IMAGES / picture.file) as image:
        assert image.text["Comment"] == picture.fingerprint(), "run make tables"


def test_every_image_of_the_documents_is_drawn_by_the_command() -> None:
    drawn = [*(picture.file for picture in PICTURES), *DIAGRAMS]
    assert sorted(path.name for path in IMAGES.iterdir()) == sorted(drawn)


def test_the_readme_names_the_model_in_its_picture() -> None:
    name = "infinitecontext_1b-passkey.png"
    assert name in [p.file for p in PICTURES if p.title.startswith("InfiniteContext-1B")]
    assert f"](docs/images/{name})" in (ROOT / "README.md").read_text()
    with Image.open(IMAGES / name) as image:
        assert image.width <= 1100  # a page shows 800 or so: its letters stay legible


def test_what_is_drawn_decides_the_fingerprint() -> None:
    """An answer, the title and the mark do; columns that no cell shows do not."""
    row = {"what": "passkey", "task": "a", "length_tokens": 512, "depth": 0.5, "n": 2, "correct": 1}
    picture = Picture("a.png", "title", lambda: [row], trained_length=512)
    others = [
        dataclasses.replace(picture, title="another"),
        dataclasses.replace(picture, trained_length=None),
        dataclasses.replace(picture, rows=lambda: [row | {"correct": 2}]),
        dataclasses.replace(picture, rows=lambda: [row | {"depth": 1.0}]),
        dataclasses.replace(picture, rows=lambda: [row, row]),
    ]
    assert len({p.fingerprint() for p in [picture, *others]}) == 6
    same = dataclasses.replace(picture, rows=lambda: [row | {"low_95": 0.1}])
    assert same.fingerprint() == picture.fingerprint()


def test_a_drawn_picture_carries_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the same picture: every cell right, so yellow everywhere but in the grey control."""
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    picture = next(p for p in PICTURES if p.file == "mla_tiny-passkey.png")
    picture.draw()
    path = tmp_path / "docs" / "images" / picture.file
    with Image.open(path) as image:
        assert image.text["Comment"] == picture.fingerprint()
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    shares = [
        (np.abs(pixels - color).max(-1) <= 2).mean() for color in ([253, 231, 37], [226, 226, 226])
    ]
    # Three depths and the control; letters and margins take the rest.
    assert shares[0] / shares[1] == pytest.approx(3, rel=0.1)


def rows_of(file: str) -> list[dict]:
    return json.loads((RESULTS / file).read_text())["rows"]


OWN_32K = ("own_words", 32768)


def test_headline() -> None:
    """Eight rows, each figure against its file."""
    lines = headline_table().splitlines()
    assert len(lines) == 2 + 8
    needles, healed, retrieval, training, cache, decode, served, demo = lines[2:]
    for line in lines[2:]:
        files = [part for part in line.split("`") if part.endswith(".json")]
        assert files
        assert all((RESULTS / file).is_file() for file in files)

    half, whole = "smollm2_mla-h200-98k-niah-4k-32k.json", "smollm2_mla-h200-98k-niah-128k.json"
    assert half in needles
    assert whole in needles
    rows = [row for row in rows_of(half) if (row["task"], row["length_tokens"]) == OWN_32K]
    assert len(rows) == 5
    assert f"{sum(row['correct'] for row in rows)}/60 at 32k, " in needles
    rows = [row for row in rows_of(whole) if row["task"] == OWN_32K[0]]
    assert f", {sum(row['correct'] for row in rows)}/60 at 128k |" in needles

    long = [
        row
        for row in rows_of("infinitecontext_1b-passkey.json")
        if row["length_tokens"] == 2**20 and row["depth"] != "control"
    ]
    one = next(
        row
        for row in rows_of("serving-mla_1b.json")
        if (row["batch"], row["context_tokens"]) == (1, 4096)
    )
    assert (
        f"{one['decode_tokens_per_s']:,.0f} at 4k, batch 1 ({100 * one['share_of_bound']:.0f} %)"
        in served
    )
    correct, n = sum(row["correct"] for row in long), sum(row["n"] for row in long)
    assert "1,048,576 tokens, 32 times" in retrieval
    # Wilson's interval of 19 of 20, as R's binom.confint gives it: 0.7639 to 0.9911.
    assert (correct, n) == (19, 20)
    assert "| 19/20 exact answers (95 % interval 76-99 %); of 131,072 tokens: 200/200" in retrieval

    fit = json.loads((RESULTS / "infinitecontext_1b-fit.json").read_text())
    assert fit["config"]["trainer"]["max_time"] == "00:00:05:20"
    assert f"| 5 min 20 s on {fit['device']}, 441 steps, " in training
    texts = {
        row["length_tokens"]: row
        for row in rows_of("smollm2_mla-h200-healed-rank128-books-parity.json")
        if row["what"] == "logits" and row["position"] == "all"
    }
    assert round(texts[8192]["perplexity_converted"], 1) == 31.9
    assert round(texts[8192]["ratio_high_95"], 4) == 1.0087
    assert "as MLA with 0.5 of its cache" in healed
    assert "31.9 at 8k (original 31.8, -0.3 to +0.9 %); paired" in healed
    per_token = {row["cache"]: row["bytes_per_token"] for row in rows_of("cache-memory.json")}
    sizes = [per_token[name] for name in ("MLA, bf16", "GQA, 8 heads of 64, bf16", "MHA, bf16")]
    assert sizes == [8 * 1024, 32 * 1024, 128 * 1024]
    assert "8 KiB with MLA, 32 KiB with GQA (8 heads of 64), 128 KiB with MHA" in cache
    (ours,) = [
        row["median_us"]
        for row in rows_of("kernels-decode.json")
        if row["case"] == "(1, 1M) 16 h 192+64 bf16" and row["by"] == "ours"
    ]
    assert f"| {ours:.0f} µs, " in decode
    assert "60/60 at 4,096, 6/6 at 16,384 tokens" in demo


def test_without_a_checkout_tables_is_refused(
    ic: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ic.verbs.tables.RESULTS", tmp_path / "docs/results")
    assert ic("tables") == 2
    assert "tables rewrites the documents of a checkout" in capsys.readouterr().err
