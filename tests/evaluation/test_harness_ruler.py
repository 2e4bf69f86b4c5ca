"""lm-evaluation-harness's scoring of RULER gives our scores, on the same samples and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", minversion="0.4.13", reason="pip install '.[harness]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import common_utils

from ic.evaluation.harness.language_model import DecoderLM
from ic.evaluation.options import TaskCell
from ic.evaluation.ruler.grid import TASKS, Config
from ic.evaluation.ruler.metrics import cleaned, string_match_all, string_match_part
from ic.evaluation.ruler.suite import RulerSuite
from ic.evaluation.suite import Decoder
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.ruler.solver import Silent, Solver

TOKENIZER = ByteTokenizer()
LENGTH = 2304
SAMPLES = 2
# As lm_eval/tasks/ruler has it, with documents of ours.
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs}}}}"
gen_prefix: "{{{{gen_prefix}}}}"
target_delimiter: " "
process_results: !function scoring.{scoring}
metric_list:
  - {{metric: "{length}", aggregation: !function scoring.aggregate_metrics, higher_is_better: true}}
generation_kwargs: {{do_sample: false, temperature: 0.0, max_gen_toks: {tokens}, until: []}}
"""


class Half(Solver):
    """Knows the first half of every answer."""

    def solve(self, prompt: str) -> str:
        whole = super().solve(prompt)
        return whole[: len(whole) // 2]


@pytest.fixture(scope="module")
def suite() -> RulerSuite:
    return RulerSuite(Config(tasks=list(TASKS), lengths=[LENGTH], samples=SAMPLES))


@pytest.fixture(scope="module")
def folder(suite: RulerSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our samples as tasks of the harness, with its own scoring."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "scoring.py").write_text(
        "from lm_eval.tasks.ruler.common_utils import (\n"
        "    aggregate_metrics, process_results, process_results_part)\n"
    )
    for task in TASKS:
        file, new_tokens = folder / f"{task}.jsonl", 0
        with file.open("w") as lines:
            for index in range(SAMPLES):
                made = suite.prompt(TOKENIZER, TaskCell(task, LENGTH, SAMPLES), index)
                document = {
                    "input": made.prompt.text,
                    "gen_prefix": made.prompt.answer_prefix,
                    "outputs": made.prompt.outputs,
                    "max_length": LENGTH,
                }
                lines.write(json.dumps(document) + "\n")
                new_tokens = max(new_tokens, made.new_tokens)
        values = {
            "scoring": "process_results_part" if "qa" in task else "process_results",
            "cache": folder / "cache",
            "tokens": new_tokens,
        }
        text = TASK.format(name=f"ours_{task}", file=file, length=LENGTH, **values)
        (folder / f"{task}.yaml").write_text(text)
    return folder


def their_scores(decoder: Decoder, folder: Path, tasks: list[str]) -> dict[str, Any]:
    # Room for the longest answer of a task; a prompt has room for its own.
    model = DecoderLM(decoder, TOKENIZER, LENGTH + 512, quiet=True)
    found = simple_evaluate(
        model,
        tasks=[f"ours_{task}" for task in tasks],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {task: found["samples"][f"ours_{task}"] for task in tasks}


def our_scores(decoder: Decoder, suite: RulerSuite, task: str) -> list[Any]:
    cell = TaskCell(task, LENGTH, SAMPLES)
    samples = [suite.sample(TOKENIZER, cell, index) for index in range(SAMPLES)]
    return suite.answer(decoder, TOKENIZER, samples)


@pytest.mark.parametrize("decoder", [Solver, Half, Silent])
def test_the_harness_gives_our_scores(
    decoder: Callable[..., Decoder], suite: RulerSuite, folder: Path
) -> None:
    answers = decoder(TOKENIZER)
    theirs = their_scores(answers, folder, list(TASKS))
    shares = set()
    for task in TASKS:
        for ours, logged in zip(our_scores(answers, suite, task), theirs[task], strict=True):
            assert logged["resps"][0][0] == ours.text
            # Of several allowed answers the harness takes the mean; see the last test.
            several = "qa" in task and len(logged["doc"]["outputs"]) > 1
            assert logged[str(LENGTH)] == ours.correct or (several and ours.correct > 0)
            shares.add(ours.correct)
    if decoder is Half:
        assert any(0 < share < 1 for share in shares)
    else:
        assert shares == {1.0 if decoder is Solver else 0.0}


def test_a_model_answers_both_alike(
    make_model: Callable[..., MLAForCausalLM], suite: RulerSuite, folder: Path
) -> None:
    decoder = GreedyDecoder(make_model(vocab_size=320), 1000)
    tasks = ["vt", "qa_1"]
    theirs = their_scores(decoder, folder, tasks)
    for task in tasks:
        for ours, logged in zip(our_scores(decoder, suite, task), theirs[task], strict=True):
            assert logged["resps"][0][0].startswith(ours.text[:20])
            assert logged[str(LENGTH)] == ours.correct


def test_scoring_of_the_same_answers() -> None:
    for text, outputs in (
        ("  The words are: Apple, pear\x00.", ["apple", "pear", "plum"]),
        ("none of them", ["apple"]),
        ("APPLE", ["apple"]),
        ("\x01 1234, 5678", ["5678", "1234"]),
        ("", ["x"]),
    ):
        document = {"max_length": LENGTH, "outputs": outputs}
        ours, one = string_match_all(cleaned(text), outputs), outputs[:1]
        assert common_utils.process_results(document, [text])[str(LENGTH)] == ours
        part = common_utils.process_results_part({**document, "outputs": one}, [text])
        assert part[str(LENGTH)] == string_match_part(cleaned(text), one)
    # RULER's own string_match_part takes the best of several allowed answers. The harness takes
    # their mean, so that one of two allowed answers is half right.
    document = {"max_length": LENGTH, "outputs": ["in 1066", "1066"]}
    assert common_utils.process_results_part(document, ["It was 1066."])[str(LENGTH)] == 0.5
    assert string_match_part("It was 1066.", document["outputs"]) == 1
