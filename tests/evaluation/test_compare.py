"""The verb `compare`: what it matches, what it says, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ic.config.flags import split_flags
from ic.errors import UsageError
from ic.evaluation.comparison.compare import Comparison, Group
from ic.evaluation.comparison.words import sentences
from ic.evaluation.paired import paired_difference
from ic.files.json_lines import read_rows, write_rows
from ic.files.results import read_json

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]

OPTIONS = {"num_needles": 4, "split": "test", "seed": 1234}


def write_cells(
    folder: Path,
    scores: Mapping[int, list[float | None]],
    *,
    model: str = "a",
    settings: str = "s",
    expected: str = "key",
    tokenizer: str | None = "t",
    **options: Any,
) -> Path:
    """A folder of the suite passkey: a cell for each length, and a control that nobody answers."""
    rows = []
    identity = {"model": model, "settings": settings, "tokenizer": tokenizer}
    for length, of_length in scores.items():
        for depth, of_cell in ((0.5, of_length), (-1.0, [0.0] * 5)):
            answers = [
                {"expected": [f"{expected}{length}{index}"], "text": "", "correct": score}
                for index, score in enumerate(of_cell)
            ]
            place = {"task": "single", "length_tokens": length, "depth": depth, "filler": "noise"}
            counts = {"n": len(of_cell), "samples": len(of_cell), "correct": 0, "seconds": 1.0}
            rows.append({**identity, **place, **counts, "answers": answers})
    write_rows(folder / "cells.jsonl", rows)
    config = {"suite": "passkey", "evaluation": {**OPTIONS, **options}}
    (folder / "results.json").write_text(json.dumps({"config": config}))
    return folder


def ones(right: int, n: int) -> list[float | None]:
    return [1.0] * right + [0.0] * (n - right)


def test_who_is_better_where_by_how_much_how_sure(
    ic: Run, capsys: Capture, tmp_path: Path, figures: list[Figure]
) -> None:
    first = write_cells(tmp_path / "a/passkey", {4096: ones(45, 50), 32768: ones(19, 100)})
    second = write_cells(
        tmp_path / "b/passkey", {32768: ones(31, 100), 4096: ones(44, 50)}, model="b"
    )
    assert ic("compare", str(first), str(second), "output=out") == 0
    out = " ".join(capsys.readouterr().out.split())
    # 12 samples changed for the better, none for the worse: 2 / 2^12, times three comparisons.
    assert (
        "single: B answers 12 of 100 more at 32k (31 against 19, 95 % between 7 and 20 more, p = 0.001)"
        in out
    )
    assert "at 4k no difference can be seen (n = 50; at most " in out
    assert "adjusted for 3 comparisons by Holm's method" in out
    rows = read_json(tmp_path / "out/comparison.json")["rows"]
    assert [(row["task"], row["length_tokens"], row["n"], row["better"]) for row in rows] == [
        (None, None, 150, "B"),
        ("single", 4096, 50, None),
        ("single", 32768, 100, "B"),
    ]
    assert rows[2]["p_adjusted"] == pytest.approx(3 * 2 / 2**12)
    assert rows[2]["difference"] == pytest.approx(0.12)
    document = (tmp_path / "out/comparison.md").read_text()
    assert "| single | 32,768 | 100 | 19.0 | 31.0 | +12.0 | +7 to +20 | 0.001 | B |" in document
    assert "B answers 12 of 100 more at 32k" in document
    assert (tmp_path / "out/comparison.png").stat().st_size > 0
    scores, apart = figures[0].axes
    assert [label.get_text() for label in scores.get_yticklabels()] == [
        "all of passkey (n = 150)",
        "single, 4k (n = 50)",
        "single, 32k (n = 100)",
    ]
    dots = [line for line in apart.lines if line.get_marker() in ("o", "s", "D")]
    assert [(float(dot.get_xdata()[0]), dot.get_marker()) for dot in dots[:3]] == [
        (pytest.approx(100 * 11 / 150), "o"),
        (pytest.approx(-2), "D"),
        (pytest.approx(12), "o"),
    ]
    # Again, and the other way round.
    assert ic("compare", f"first={first}", f"second={second}", "output=out") == 0
    capsys.readouterr()
    assert ic("compare", str(second), str(first)) == 0
    assert "A answers 12 of 100 more at 32k" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "runs/compare/b_vs_a/comparison.md").is_file()


def test_the_last_step_of_a_run_counts(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "runs/one/default"
    write_cells(run / "passkey", {512: ones(0, 20)})
    for step, right in ((900, 10), (1000, 18)):
        write_cells(run / f"evaluate/step={step}/passkey", {512: ones(right, 20)}, model=f"{step}")
    (run / "config.yaml").write_text("name: one\n")
    # A folder whose file holds answers of two models: the last one measured counts.
    rows = [
        row
        for model, right in (("x", 20), ("y", 3))
        for row in read_rows(
            write_cells(tmp_path / model, {512: ones(right, 20)}, model=model) / "cells.jsonl"
        )
    ]
    write_rows(tmp_path / "other/passkey/cells.jsonl", rows)
    assert ic("compare", "runs/one/default", "other") == 0
    assert "A answers 15 of 20 more at 512 (18 against 3" in " ".join(
        capsys.readouterr().out.split()
    )
    assert ic("compare", "runs/one/default/evaluate/step=900", "other/passkey/cells.jsonl") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "A answers 7 of 20 more at 512 (10 against 3, " in out
    assert "p = 0.016)" in out  # 2 / 2^7; one comparison alone is not adjusted
    assert ic("compare", "runs/one/default/evaluate/step=900/passkey", "other") == 0


def test_what_has_no_pair_is_left_out_and_counted(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    write_cells(tmp_path / "a/passkey", {512: [1.0, None, 0.0, 1.0], 1024: ones(1, 1)})
    write_cells(tmp_path / "b/passkey", {512: [1.0, 1.0, 0.0]}, model="b")
    assert ic("compare", "a", "b", "output=out") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "Left out, because A alone was asked: passkey single at 512 tokens (1 of 4 samples); passkey "
        "single at 1,024 tokens (1 sample)."
    ) in out
    assert "1 sample without a score of one of the two is left out." in out
    compared = read_json(tmp_path / "out/comparison.json")
    (row,) = compared["rows"]
    assert (row["n"], row["first"], row["second"]) == (2, 0.5, 0.5)
    assert len(compared["only_first"]) == 2
    assert compared["only_second"] == []


def test_what_one_side_alone_measured_is_named(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    for name, suites in (("a", ["passkey", "mrcr"]), ("b", ["passkey", "graph", "niah"])):
        for suite in suites:
            lengths = (512, 1024, 2048) if name == "b" else (512,)
            folder = write_cells(
                tmp_path / name / suite, {length: ones(5, 9) for length in lengths}, model=name
            )
            (folder / "results.json").write_text(json.dumps({"config": {"suite": suite}}))
    assert ic("compare", "a", "b", "output=out") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Left out, because A alone was asked: mrcr." in out
    alone = "graph; niah; passkey single at 1,024, 2,048 tokens (18 samples)."
    assert f"Left out, because B alone was asked: {alone}" in out
    assert f"B alone was asked: {alone}" in (tmp_path / "out/comparison.md").read_text()
    compared = read_json(tmp_path / "out/comparison.json")
    assert compared["only_first"] == ["mrcr"]
    assert compared["only_second"] == alone.rstrip(".").split("; ")
    # Who names the suites does not hear of the others.
    assert ic("compare", "a", "b", "suites=[passkey]", "output=other") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "B alone was asked: passkey single at 1,024, 2,048 tokens (18 samples)." in out
    assert "mrcr" not in out


def test_suites_that_cannot_be_compared_are_left_out(
    ic: Run, capsys: Capture, tmp_path: Path
) -> None:
    """Unless they are asked for by name."""
    for name in "ab":
        write_cells(tmp_path / name / "passkey", {512: ones(5, 9)}, model=name)
        for suite, changes in (("graph", {"settings": name}), ("mrcr", {})):
            scores = {512 if name == "a" or suite == "graph" else 1024: ones(5, 9)}
            folder = write_cells(tmp_path / name / suite, scores, model=name, **changes)
            about = {"config": {"suite": suite, "evaluation": {}}}
            (folder / "results.json").write_text(json.dumps(about))
    assert ic("compare", "a", "b", "output=out") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Left out: graph: A and B were measured with other settings" in out
    assert "Left out: mrcr: nothing in common: A answered single at 512 tokens, B single at" in out
    compared = read_json(tmp_path / "out/comparison.json")
    assert {row["suite"] for row in compared["rows"]} == {"passkey"}
    assert list(compared["left_out"]) == ["graph", "mrcr"]
    assert "Left out: graph" in (tmp_path / "out/comparison.md").read_text()
    assert ic("compare", "a", "b", "suites=[passkey,graph]", "output=other") == 2
    assert "graph: A and B were measured with other settings" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "other settings": (
        {"settings": "t", "seed": 5},
        [],
        "passkey: A and B were measured with other settings, so on other samples (seed 1234 and 5)",
    ),
    "other rules": (
        {"settings": "t"},
        [],
        "passkey: A and B were measured with the same options, but the suite's rules or a file have",
    ),
    "other samples": (
        {"expected": "word"},
        [],
        "sample 0 of task single, length_tokens 512, depth 0.5, filler noise asked A for ['key5120'] "
        "and B for ['word5120']; evaluate both with the same tokenizer",
    ),
    "other tokenizer": (
        {"tokenizer": "u"},
        [],
        "passkey: A and B have other tokenizers, and so many tokens are another text to each",
    ),
    "other lengths": (
        {"scores": {1024: [1.0]}},
        [],
        "nothing in common: A answered single at 512 tokens, B single at 1,024 tokens",
    ),
    "no score": ({"scores": {512: [None] * 9}}, [], "passkey: no sample has a score of both"),
    "suite": ({}, ["suites=[niah]"], "suites: A was not measured on 'niah'; it has passkey"),
    "seed": ({}, ["seed=-1"], "seed=-1: must be at least 0"),
    "resamples": ({}, ["resamples=3"], "resamples=3: must be from 100"),
    "a path too many": ({}, ["c"], "'c' is one path too many; give 2"),
    "a path twice": ({}, ["first=c"], "first=: the path 'a' is given, too"),
    "a key": ({}, ["sead=3"], "unknown key 'sead'; did you mean seed"),
    "output is a run": ({}, ["output=a"], "output=a: holds other files than a comparison's"),
    "output is a file": ({}, ["output=a/passkey/cells.jsonl"], "cells.jsonl: is a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(ic: Run, capsys: Capture, tmp_path: Path, case: str) -> None:
    changes, args, message = REFUSED[case]
    scores = {512: ones(5, 9)}
    write_cells(tmp_path / "a/passkey", scores)
    write_cells(tmp_path / "b/passkey", **{"scores": scores, "model": "b", **changes})
    before = sorted(tmp_path.rglob("*"))
    assert ic("compare", "a", "b", *args) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a"], "compare needs second=..."),
        ([], "compare needs first=..."),
        (["a", "gone"], "gone: no such file or folder; give what `evaluate` wrote"),
        (["a", "empty"], "empty: holds no answers of an evaluation (samples.jsonl)"),
        (["a", "a/passkey"], "passkey: A and B are the same folder, a/passkey"),
        (["a", "nameless"], "nameless: cannot tell which suite this is"),
    ],
)
def test_refuses_what_is_no_evaluation(
    ic: Run, capsys: Capture, tmp_path: Path, args: list[str], message: str
) -> None:
    write_cells(tmp_path / "a/passkey", {512: ones(5, 9)})
    (tmp_path / "empty").mkdir()
    (write_cells(tmp_path / "nameless", {512: ones(5, 9)}) / "results.json").unlink()
    assert ic("compare", *args) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_refuses_the_folder_of_another_comparison(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    for name in "abc":
        write_cells(tmp_path / name / "passkey", {512: ones(5, 9)}, model=name)
    assert ic("compare", "a", "b", "output=out") == 0
    before = (tmp_path / "out/comparison.json").read_text()
    assert ic("compare", "a", "c", "output=out") == 2
    assert (
        "output=out: holds another comparison, of a/passkey and b/passkey; choose another output="
    ) in capsys.readouterr().err
    assert (tmp_path / "out/comparison.json").read_text() == before
    # So does a folder whose weights are others by now.
    write_cells(tmp_path / "b/passkey", {512: ones(5, 9)}, model="later")
    assert ic("compare", "a", "b", "output=out") == 2


def test_suites_with_nothing_in_common(ic: Run, capsys: Capture, tmp_path: Path) -> None:
    write_cells(tmp_path / "a/passkey", {512: ones(5, 9)})
    results = write_cells(tmp_path / "b/copy", {512: ones(5, 9)}) / "results.json"
    results.write_text(json.dumps({"config": {"suite": "words"}}))
    assert ic("compare", "a", "b") == 2
    assert "cannot tell which suite this is" in capsys.readouterr().err


def group(first: list[float], second: list[float], length: int, p: float) -> Group:
    paired = paired_difference(first, second)
    whole = {*first, *second} <= {0.0, 1.0}
    return Group("s", "t", length, paired, whole, p_adjusted=p)


def test_words_for_shares_and_for_what_nobody_or_everybody_answers() -> None:
    groups = [
        group([1.0] * 9, [1.0] * 9, 1024, 1.0),
        group([1.0] * 9, [1.0] * 9, 2048, 1.0),
        group([0.0] * 9, [0.0] * 9, 4096, 1.0),
        group([0.75, 0.5] * 20, [0.25, 0.25] * 20, 8192, 0.0004),
        group([1.0, 0.0], [0.0, 1.0], 16384, 1.0),
        group([1.0, 0.0] * 4, [0.0, 1.0] * 4, 1000, 1.0),
    ]
    (said,) = sentences(Comparison(groups))
    assert said.startswith(
        "t: A scores 37.5 points more at 8k (62.5 against 25.0 %, 95 % between 33.8 and 41.2 more, "
        "n = 40, p < 0.001); at 1k and 2k both answer all; at 4k neither answers any; at 16k and "
        "1,000 no difference can be seen (n = 2 to 8; at most 100 points either way)."
    )


def test_paths_stand_without_their_names() -> None:
    keys = ("first", "second")
    args = ["runs/a/evaluate/step=6", "--seed", "3", "b", "output=c"]
    assert split_flags(args, keys) == (
        set(),
        ["seed=3", "output=c", "first=runs/a/evaluate/step=6", "second=b"],
    )
    with pytest.raises(UsageError, match="'b' is neither key=value nor a flag"):
        split_flags(["b"])


def test_help_says_where_the_paths_stand(ic: Run, capsys: Capture) -> None:
    assert ic("compare", "--help") == 0
    assert capsys.readouterr().out.startswith(
        "usage: python -m ic compare FIRST SECOND [overrides]"
    )
