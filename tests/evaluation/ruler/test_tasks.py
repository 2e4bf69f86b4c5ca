"""Prompts and scores against those of NVIDIA/RULER's own scripts; words, and how many units fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ic.evaluation.ruler.effective_length import Summary
from ic.evaluation.ruler.fitting import TooShortError, largest_that_fits
from ic.evaluation.ruler.grid import TASKS, Config
from ic.evaluation.ruler.metrics import METRICS, cleaned
from ic.evaluation.ruler.task import COMMIT, Draw
from ic.evaluation.ruler.tasks import make_task
from ic.evaluation.ruler.texts import Texts
from ic.evaluation.ruler.words import WordPairs, single_words, word_pairs
from tests.evaluation.ruler.from_ruler import EXAMPLE_UNITS, EXPECTED, SEED
from tests.evaluation.ruler.texts import ESSAY, HOTPOTQA, SQUAD

THEIRS = json.loads(EXPECTED.read_text())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    for name, data in (("squad", SQUAD), ("hotpotqa", HOTPOTQA)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    (folder / "essay.txt").write_text(" ".join(ESSAY))
    return Texts(
        Config(
            haystack=str(folder),
            squad=str(folder / "squad.json"),
            hotpotqa=str(folder / "hotpotqa.json"),
        )
    )


def test_every_task_is_compared() -> None:
    assert COMMIT in THEIRS["about"]
    assert {case["task"] for case in THEIRS["prompts"]} == set(TASKS)


@pytest.mark.parametrize(
    "theirs", THEIRS["prompts"], ids=[f"{c['task']}-{c['units']}" for c in THEIRS["prompts"]]
)
def test_prompts_are_theirs_word_for_word(theirs: dict[str, Any], texts: Texts) -> None:
    is_vt = theirs["task"] == "vt"  # 500 characters hold no more than the least example
    task = make_task(theirs["task"], texts, len if is_vt else lambda text: len(text) // 4)
    assert getattr(task, "example_units", EXAMPLE_UNITS) == EXAMPLE_UNITS
    prompt = task.prompt(Draw(SEED, 1, theirs["max_seq_length"]), theirs["units"])
    assert prompt.text == theirs["input"]
    assert prompt.answer_prefix == theirs["answer_prefix"]
    assert prompt.outputs == theirs["outputs"]
    assert task.tokens_to_generate == theirs["tokens_to_generate"]
    assert METRICS[task.metric](cleaned(prompt.answer), prompt.outputs) == 1


@pytest.mark.parametrize("theirs", THEIRS["scores"])
def test_scores_are_theirs(theirs: dict[str, Any]) -> None:
    for name, metric in METRICS.items():
        score = metric(cleaned(theirs["text"]), theirs["outputs"])
        assert round(100 * score, 2) == theirs[name], name


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """What lm-evaluation-harness scores RULER with."""
    package = find_spec("lm_eval")
    if package is None:
        pytest.skip("pip install '.[harness]'")
    (folder,) = package.submodule_search_locations or ()
    spec = spec_from_file_location("ruler_scores", f"{folder}/tasks/ruler/common_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("answer", THEIRS["scores"])
def test_scores_are_those_of_the_harness(answer: dict[str, Any], harness: ModuleType) -> None:
    text, outputs = answer["text"], answer["outputs"]
    doc = {"outputs": outputs, "max_length": 4096}
    ours = {name: metric(cleaned(text), outputs) for name, metric in METRICS.items()}
    assert harness.process_results(doc, [text])["4096"] == ours["all"]
    # Of a question with several answers the harness takes the share; RULER takes the best.
    part = ours["part"] if len(outputs) == 1 else ours["all"]
    assert harness.process_results_part(doc, [text])["4096"] == part


def test_word_pairs_are_sorted_as_a_list_of_them_would_be() -> None:
    adjectives = ["well", "well-known", "we", "well-known", "ill", "well-kept", "far away", "A"]
    nouns = ["lamp", "known-ape", "kite", "sea lion", "kite"]
    pairs = WordPairs(adjectives, nouns)
    expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
    assert list(pairs) == expected == pairs[:]
    assert (pairs[-1], pairs[2:5]) == (expected[-1], expected[2:5])
    with pytest.raises(IndexError):
        pairs[len(expected)]


def test_the_package_holds_the_words_that_it_did() -> None:
    assert (len(single_words()), len(word_pairs())) == (8166, 6171620)


@dataclass
class _Made:
    tokens: int


@pytest.mark.parametrize("per_unit", [1, 7, 90])
@pytest.mark.parametrize("room", [200, 1000, 10**6])
@pytest.mark.parametrize("guess", [None, 1, 50, 10**6])
def test_as_many_units_as_fit(per_unit: int, room: int, guess: int | None) -> None:
    made = []

    def make(units: int) -> _Made:
        made.append(units)
        return _Made(100 + per_unit * units + units % 3)

    units, found = largest_that_fits(make, 1, room, guess)
    # No room for one more, or but a ten-thousandth; and few long ones were made.
    assert found.tokens <= room
    assert found.tokens == make(units).tokens
    assert room - found.tokens < max(per_unit + 2, room / 10_000)
    assert len([units for units in made if 2 * per_unit * units > room]) < 8


def test_units_that_add_nothing_for_a_while_are_no_endless_room() -> None:
    made = []

    def make(units: int) -> _Made:
        made.append(units)
        return _Made(100 + units // 40)

    assert largest_that_fits(make, 1, 1000)[1].tokens == 1000
    assert max(made) < 100_000


def test_too_short_says_what_it_takes() -> None:
    with pytest.raises(TooShortError) as error:
        largest_that_fits(lambda units: _Made(500 * units), 2, 999)
    assert error.value.tokens == 1000


# Three rows of the table in NVIDIA/RULER's README at that commit; no mean rises again.
LENGTHS = [4096 * 2**i for i in range(6)]


@pytest.mark.parametrize(
    ("means", "effective", "inc", "dec"),
    [
        ([96.7, 95.8, 96.0, 95.9, 95.9, 94.4], 131072, 95.5, 96.1),
        ([96.5, 95.8, 95.4, 94.8, 88.4, 66.6], 65536, 85.5, 93.7),
        ([82.3, 78.4, 73.7, 69.1, 68.1, 65.0], None, 69.9, 75.7),
    ],
)
def test_summaries_are_the_papers(
    means: list[float], effective: int | None, inc: float, dec: float
) -> None:
    shares = {at: mean / 100 for at, mean in zip(LENGTHS, means, strict=True)}
    summary = Summary(shares, 13)
    assert summary.effective_length == effective
    assert round(100 * summary.weighted_inc, 1) == inc
    assert round(100 * summary.weighted_dec, 1) == dec


def test_a_length_counts_only_if_every_shorter_one_does() -> None:
    assert Summary({4096: 0.856, 8192: 0.85, 16384: 0.9}, 13).effective_length == 4096
    assert Summary({4096: 0.2}, 13).length_text == "below 4k"
    assert Summary({4096: 0.9, 8192: 0.9}, 13).length_text == "at least 8k"


def test_shipped_questions_are_answered_by_their_paragraphs() -> None:
    texts = Texts(Config())
    assert len(texts.squad.questions) == len(texts.squad.documents) == 76
    assert len(texts.hotpotqa.questions) == 38
    for questions in (texts.squad, texts.hotpotqa):
        for question in questions.questions:
            own = " ".join(questions.documents[index] for index in question.documents)
            assert question.outputs[0] in own
        queries = [question.query for question in questions.questions]
        assert len(set(queries)) == len(queries)


def test_data_of_another_form(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    cases = {
        "{": r"squad=.*bad\.json: is not JSON of that form \(Expecting property name.*dev-v2\.0",
        '{"data": [{}]}': r"is JSON of another form \(no 'paragraphs'\)",
        "[1]": r"is JSON of another form \(",
        '{"data": []}': r"holds no question with an answer",
    }
    for content, said in cases.items():
        bad.write_text(content)
        with pytest.raises(ValueError, match=said):
            _ = Texts(Config(squad=str(bad))).squad
    bad.write_text('[{"question": "q", "answer": "", "context": []}]')
    with pytest.raises(ValueError, match=r"hotpotqa=.*holds no question with an answer"):
        _ = Texts(Config(hotpotqa=str(bad))).hotpotqa
    with pytest.raises(ValueError, match=r"squad=.*none: cannot be read \(No such file"):
        _ = Texts(Config(squad=str(tmp_path / "none"))).squad


def test_haystacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suite\.ruler\.haystack: no text in the folder"):
        _ = Texts(Config(haystack=str(tmp_path))).essay
    (tmp_path / "picture.png").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"picture\.png is neither text, JSON Lines nor parquet"):
        _ = Texts(Config(haystack=str(tmp_path / "picture.png"))).essay
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(ValueError, match=r"haystack=.*: holds no word"):
        _ = Texts(Config(haystack=str(tmp_path))).essay
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.jsonl").write_text('{"text": "One  two."}\n{"text": "Three."}\n')
    assert Texts(Config(haystack=str(tmp_path))).essay == ("One", "two.", "Three.")
