"""The suite judge: from instructions to a report, with a server that grades by what it reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ic.errors import UsageError
from ic.evaluation.judge.grid import Config
from ic.evaluation.judge.instructions import read_instructions
from ic.evaluation.judge.suite import JudgeSuite
from ic.evaluation.runner import run_suite
from ic.files.json_lines import rank_file, read_rows, write_rows
from ic.files.results import read_json
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.judge.server import Answer, judge_server
from tests.evaluation.oracle import OneByOne
from tests.evaluation.test_share_haystack import ThreadRanks

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
TOKENIZER = ByteTokenizer()
UNLIKE = {"result": 3, "times_asked": 1, "text": "of another evaluation"}
# Grades of the instructions; None never gets one.
GRADES = (5, 1, None, 3, 4, 4)
# Of each instruction, what is better: the answer, its rival, or whatever is shown first.
BETTER = ("answer", "rival", "first", None, "answer", "answer")


def grade(body: dict[str, Any], number: int) -> Answer:
    """A judge that knows the instructions by their numbers and a rival by its words."""
    prompt = body["messages"][1]["content"]
    index = int(re.findall(r"Instruction (\d)", prompt)[0])
    if "###Response A:" not in prompt:
        score = GRADES[index]
        return "I cannot say." if score is None else f"So so. [RESULT] {score}"
    rival = "A" if "###Response A:\nthe rival" in prompt else "B"
    answer = {"A": "B", "B": "A"}[rival]
    found = {"answer": answer, "rival": rival, "first": "A", None: None}[BETTER[index]]
    return f"So so. [RESULT] {found}"


def write_instructions(file: Path, count: int = len(GRADES), **also: str) -> Path:
    rows = (
        {"instruction": f"Instruction {n}: hello", "rival": "the rival", **also}
        for n in range(count)
    )
    write_rows(file, rows)
    return file


@pytest.fixture
def model(make_model: Callable[..., MLAForCausalLM], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_model(vocab_size=320, max_position_embeddings=512).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def arguments(url: str, model: Path, *more: str) -> list[str]:
    options = {"url": url, "model": "judge", "instructions": "instructions.jsonl"}
    options |= {"max_new_tokens": "8", "times_asked": "2", "attempts": "1"}
    given = [f"suite.judge.{name}={value}" for name, value in options.items()]
    return ["evaluate", f"checkpoint={model}", "suite=judge", "accelerator=cpu", *given, *more]


def test_from_instructions_to_a_report(
    ic: Run, capsys: Capture, tmp_path: Path, model: Path, figures: list[Figure]
) -> None:
    write_instructions(tmp_path / "instructions.jsonl")
    with judge_server(grade) as server:
        both = arguments(
            server.url, model, "suite.judge.gradings=[absolute,relative]", "output=out"
        )
        assert ic(*both) == 0
        out = " ".join(capsys.readouterr().out.split())
        asked = len(server.requests)
        # One a score and two a comparison; twice where there is none.
        assert asked == (6 + 1) + (12 + 2)
        assert ic(*both) == 0  # nothing is asked again, nor answered
        assert len(server.requests) == asked
    absolute, relative = read_json(tmp_path / "out/results.json")["rows"]
    assert (absolute["n"], absolute["unjudged"], absolute["won"]) == (5, 1, None)
    assert [absolute[f"score_{score}"] for score in range(1, 6)] == [1, 0, 1, 2, 1]
    assert absolute["mean_score"] == pytest.approx((5 + 1 + 3 + 4 + 4) / 5)
    assert absolute["accuracy"] == pytest.approx((absolute["mean_score"] - 1) / 4)
    assert absolute["low_95"] < absolute["accuracy"] < absolute["high_95"]
    assert (relative["n"], relative["unjudged"]) == (5, 1)
    assert [relative[name] for name in ("won", "lost", "flipped")] == [3, 1, 1]
    assert relative["accuracy"] == pytest.approx(3.5 / 5)
    assert "graded by judge, rubric: helpfulness" in out
    assert re.search(r"absolute 5 3\.40 \S+ to \S+ 1 1 to 5: 1 0 1 2 1", out)
    assert re.search(r"relative 5 0\.70 \S+ to \S+ 1 lost 1, by order 1, won 3", out)
    with (tmp_path / "out/grades.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["unjudged"], row["score_4"], row["flipped"]) for row in rows] == [
        ("1", "2", ""),
        ("1", "", "1"),
    ]
    shown = figures[0].axes
    assert [bar.get_height() for bar in shown[0].patches] == [1, 0, 1, 2, 1, 1]
    assert [bar.get_height() for bar in shown[1].patches] == [1, 1, 3, 1]
    assert "the order decides 20 %" in shown[1].get_title()

    samples = {
        (row["task"], row["index"]): row for row in read_rows(tmp_path / "out/samples.jsonl")
    }
    assert len(samples) == 12
    assert samples["absolute", 0]["correct"] == 1.0
    assert samples["absolute", 2]["correct"] is None
    assert samples["absolute", 2]["measured"] == {
        "times_asked": 2,
        "score": None,
        "feedback": "I cannot say.",
    }
    measured = samples["relative", 2]["measured"]
    assert (measured["first"], measured["second"], samples["relative", 2]["correct"]) == (
        "A",
        "A",
        0.5,
    )
    # Both gradings saw the same answer.
    assert samples["absolute", 4]["text"] == samples["relative", 4]["text"]
    assert len(read_rows(tmp_path / "out/judgements.jsonl")) == 6 + 12

    # Another model's answers on the same instructions are compared by their scores.
    write_rows(
        tmp_path / "other/judge/samples.jsonl", [{**row, "model": "b"} for row in samples.values()]
    )
    assert ic("compare", "out", "other", "output=compared") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "absolute: over all samples" not in out
    assert "2 samples without a score of one of the two are left out" in out


def said(err: str) -> str:
    """The one line of ours; the server's thread may have told of a broken connection beside it."""
    (line,) = [line for line in err.splitlines() if line.startswith("ic: ")]
    return line


def test_a_judge_that_is_not_there(ic: Run, capsys: Capture, tmp_path: Path, model: Path) -> None:
    """Found before the model is loaded: one line, and nothing is written."""
    write_instructions(tmp_path / "instructions.jsonl")
    with judge_server(grade) as server:
        pass  # and gone
    before = sorted(tmp_path.rglob("*"))
    assert ic(*arguments(server.url, model)) == 2
    told = capsys.readouterr()
    assert "no judge answers there" in said(told.err)
    assert "loading model" not in told.out + told.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_judge_that_goes_is_taken_up_again(
    ic: Run, capsys: Capture, tmp_path: Path, model: Path
) -> None:
    write_instructions(tmp_path / "instructions.jsonl")
    one = "suite.judge.concurrency=1"

    def goes(body: dict[str, Any], number: int) -> Answer:
        return grade(body, number) if number < 2 else (502, {}, "gone")

    with judge_server(goes) as server:
        assert ic(*arguments(server.url, model, one, "output=out")) == 1
    assert "answers 502: gone" in said(capsys.readouterr().err)
    assert len(read_rows(tmp_path / "out/judgements.jsonl")) == 2
    with judge_server(grade) as server:
        assert ic(*arguments(server.url, model, one, "output=out")) == 0
    asked = [re.findall(r"Instruction (\d)", prompt)[0] for prompt in server.prompts]
    assert asked == ["2", "2", "3", "4", "5"]
    (row,) = read_json(tmp_path / "out/results.json")["rows"]
    assert (row["n"], row["unjudged"]) == (5, 1)


def test_a_judge_that_only_babbles(ic: Run, capsys: Capture, tmp_path: Path, model: Path) -> None:
    """Nothing is judged, nothing is dropped, and there is no mean."""
    write_instructions(tmp_path / "instructions.jsonl", 2)
    with judge_server(lambda body, number: "(Score 5)") as server:
        both = "suite.judge.gradings=[absolute,relative]"
        assert ic(*arguments(server.url, model, both, "output=out")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "absolute 0 - - 2 1 to 5: 0 0 0 0 0" in out
    rows = read_json(tmp_path / "out/results.json")["rows"]
    assert [(row["n"], row["unjudged"], row["accuracy"]) for row in rows] == [(0, 2, None)] * 2
    assert (tmp_path / "out/grades.png").stat().st_size > 0
    assert len((tmp_path / "out/grades.csv").read_text().splitlines()) == 3


BAD: dict[str, tuple[list[str], str]] = {
    "no url": (
        ["suite.judge.url=null"],
        "suite.judge.url: the judge is not named; give suite.judge.url=http",
    ),
    "no model": (["suite.judge.model=null"], "suite.judge.model: the judge is not named"),
    "no file": (["suite.judge.instructions=gone.jsonl"], "instructions=gone.jsonl: no such file"),
    "no instructions": (
        ["suite.judge.instructions=null"],
        "suite.judge.instructions: give a JSONL file",
    ),
    "url": (
        ["suite.judge.url=localhost:8000"],
        "suite.judge.url='localhost:8000': must begin with http",
    ),
    "password": (
        ["suite.judge.url=http://me:secret@host/v1"],
        "suite.judge.url: must hold no name and password",
    ),
    "grading": (["suite.judge.gradings=[absolut]"], "did you mean absolute?"),
    "rubric": (["suite.judge.rubric=help"], "suite.judge.rubric='help': choose one of helpfulness"),
    "samples": (
        ["suite.judge.samples=9"],
        "suite.judge.samples=9: instructions.jsonl holds 6 instru",
    ),
    "request": (
        ["suite.judge.request={model: x}"],
        "suite.judge.request: model cannot be set there",
    ),
    "length": (["suite.judge.length=20"], "instruction 1 and its answer come to "),
    "positions": (["suite.judge.max_new_tokens=600"], "but the model has 512 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(ic: Run, capsys: Capture, tmp_path: Path, model: Path, case: str) -> None:
    write_instructions(tmp_path / "instructions.jsonl")
    args, message = BAD[case]
    with judge_server(grade) as server:
        assert ic(*arguments(server.url, model, *args)) == 2
    told = said(capsys.readouterr().err)
    assert message in told
    assert "secret" not in told
    assert not server.requests


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: [1]: a line has the keys instruction, reference, rubric, rival"),
        ('{"instruction": "x", "refrence": "y"}', "line 2: refrence: a line has the keys"),
        ('{"reference": "x"}', "line 2: has no instruction"),
        ('{"instruction": " "}', "line 2: instruction must be text that is not empty"),
        (
            '{"instruction": "x", "rival": "y", "rubric": "nice"}',
            "line 2: rubric 'nice': choose one of",
        ),
        ('{"instruction": "x"}', "line 2: has no rival"),
    ],
)
def test_bad_instructions(tmp_path: Path, line: str, message: str) -> None:
    file = write_instructions(tmp_path / "instructions.jsonl", 1)
    file.write_text(f"{file.read_text()}{line}\n")
    config = Config(instructions=str(file), gradings=["relative"])
    with pytest.raises(UsageError, match=re.escape(message)):
        read_instructions(config)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no instruction"):
        read_instructions(Config(instructions=str(tmp_path / "empty.jsonl")))


class Writes(OneByOne):
    """A model that answers every prompt with the same text."""

    def __init__(self, text: str) -> None:
        self.tokens = [*text.encode(), TOKENIZER.eos_token_id]

    def answers(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        return torch.tensor([(self.tokens + [0] * new_tokens)[:new_tokens]] * len(ids_BT))


def strict(body: dict[str, Any], number: int) -> str:
    """The best grade for the reference, the worst for anything else."""
    prompt = body["messages"][1]["content"]
    reference = re.findall(r"###Reference Answer.*:\n(.*)", prompt)[0]
    right = f"Response to evaluate:\n{reference}\n" in prompt
    if "###Response A:" in prompt:
        return f"[RESULT] {'A' if f'Response A:{chr(10)}{reference}{chr(10)}' in prompt else 'B'}"
    return f"[RESULT] {5 if right else 1}"


@pytest.mark.parametrize(("text", "scores"), [("the answer", [1.0, 1.0]), ("", [0.0, 0.0])])
def test_an_oracle_and_a_silent_model(tmp_path: Path, text: str, scores: list[float]) -> None:
    # Beside a silent model the rival has the reference.
    rival = "wrong" if text else "the answer"
    file = write_instructions(tmp_path / "i.jsonl", 3, reference="the answer", rival=rival)
    with judge_server(strict) as server:
        options = {"url": server.url, "model": "judge", "instructions": str(file)}
        suite = JudgeSuite(Config(**options, gradings=["absolute", "relative"], max_new_tokens=16))
        suite.begin(tmp_path / "samples.jsonl")
        for cell, expected in zip(suite.cells(), scores, strict=True):
            samples = [suite.sample(TOKENIZER, cell, index) for index in range(3)]
            answered = suite.answer(Writes(text), TOKENIZER, samples)
            assert [(score.text, score.correct) for score in answered] == [(text, expected)] * 3
        # A process that writes no answers, as all but one that share a prompt, asks nobody.
        asked = len(server.requests)
        suite.begin(None)
        assert [s.correct for s in suite.answer(Writes("new"), TOKENIZER, samples)] == [None] * 3
        assert len(server.requests) == asked
    # A plain prompt is continued; a chat is the model's own template.
    plain = JudgeSuite(Config(**options, prompt="plain")).sample(TOKENIZER, cell, 1)
    assert bytes(plain.ids[plain.ids < 256].tolist()) == b"Instruction 1: hello\n\n"
    chat = str(TOKENIZER.decode(suite.sample(TOKENIZER, cell, 1).ids))
    turn = [{"role": "user", "content": "Instruction 1: hello"}]
    assert chat == TOKENIZER.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def test_judgements_of_several_ranks_are_merged(
    make_model: Callable[..., MLAForCausalLM], tmp_path: Path
) -> None:
    """Those of ranks that were interrupted, too; and nothing that one of them knows is asked."""
    instructions = write_instructions(tmp_path / "i.jsonl", 6)
    model = make_model(vocab_size=320, max_position_embeddings=512)
    file, whole = tmp_path / "samples.jsonl", tmp_path / "judgements.jsonl"
    with judge_server(grade) as server:
        options = {"url": server.url, "model": "judge", "instructions": str(instructions)}
        options |= {"max_new_tokens": 8, "times_asked": 1, "length": 1024, "attempts": 1}
        # So that two prompts are a batch, and ranks have batches to share.
        config = Config(**options, tokens_per_batch=2048)
        write_rows(rank_file(whole, 7), [{"key": "old", **UNLIKE}])
        with ThreadPoolExecutor(2) as threads:
            list(
                threads.map(
                    lambda rank: run_suite(
                        model, TOKENIZER, JudgeSuite(config), file, ranks=ThreadRanks(rank)
                    ),
                    range(2),
                )
            )
        assert len(server.requests) == 6
        rows = read_rows(whole)
        assert rows[0] == {"key": "old", **UNLIKE}
        assert len({row["key"] for row in rows}) == 7
        assert sorted(tmp_path.glob("*.rank*")) == []
        file.unlink()  # the answers are gone, what the judge said of them is not
        run_suite(model, TOKENIZER, JudgeSuite(config), file)
        assert len(server.requests) == 6
