"""lm-evaluation-harness on our models: equal to its own model `hf`, from our command line and theirs.

Nothing is downloaded: the tasks are files of this test's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", minversion="0.4.13", reason="pip install '.[harness]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ic.checkpoint.folder import FolderCheckpointIO
from ic.errors import UsageError
from ic.evaluation.answered import cells_of, read_samples
from ic.evaluation.harness.__main__ import main as harness_main
from ic.evaluation.harness.grid import Config
from ic.evaluation.harness.language_model import DecoderLM
from ic.evaluation.harness.suite import HarnessSuite
from ic.evaluation.runner import run_suite
from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.deepseek import deepseek_twin

TOKENIZER = ByteTokenizer()
WORDS = ("red", "a green one", "blue", "yellow and black", "grey")
CHOICES = [
    {
        "question": f"Which colour has number {n}?",
        "choices": list(WORDS[: 2 + n % 3]),
        "gold": n % 2,
    }
    for n in range(5)
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
fewshot_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
fewshot_split: test
num_fewshot: 1
generation_kwargs: {until: ["q", "zz"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
filter_list:
  - name: short
    filter: [{function: regex, regex_pattern: "(..)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks, and a group of two of them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder, TASKS, CHOICES)
    (folder / "tiny_group.yaml").write_text(
        "group: tiny_both\ntask: [tiny_choice, tiny_answer]\n"
        "aggregate_metric_list: [{metric: acc, filter_list: none, weight_by_size: true}]\n"
    )
    return folder


def write_tasks(folder: Path, tasks: dict[str, str], documents: list[dict[str, Any]]) -> None:
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}\n"
            f"metadata: {{version: 1.0}}\n{text}"
        )


@pytest.fixture
def model(make_model: Callable[..., MLAForCausalLM]) -> MLAForCausalLM:
    """Random; its sequence ends are the tokenizer's."""
    return make_model(
        vocab_size=320,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )


def our_lm(model: MLAForCausalLM, positions: int = 4096, **options: Any) -> DecoderLM:
    return DecoderLM(GreedyDecoder(model, 64), TOKENIZER, positions, **{"quiet": True, **options})


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, 0) for given in arguments]


def test_likelihoods_and_answers_are_those_of_the_harness_own_model(model: MLAForCausalLM) -> None:
    theirs = HFLM(pretrained=deepseek_twin(model), tokenizer=TOKENIZER, batch_size=2, max_length=60)
    long = "a text that is longer than sixty bytes, so that it is read in windows, one by one"
    scored = asked(
        "loglikelihood",
        *[("The question is which colour", f" {word}") for word in WORDS],
        ("Another context", " green"),
        ("", "with nothing in front"),
        ("which ends in a space ", "and goes on"),
        ("<|bos|>begins with the first token", " b"),
    )
    texts = asked("loglikelihood_rolling", (long,), ("short",), ("",))
    until = {"until": ["q", "#"], "max_gen_toks": 16, "do_sample": False}
    prompts = ("Which colour?", "Which number?", "A longer question, which?", "Which place?!")
    answers = asked("generate_until", *[(prompt, until) for prompt in prompts])
    for batch in ({"rows_per_batch": 1}, {"tokens_per_batch": 70}, {}):
        ours = our_lm(model, 60, **batch)
        for kind, requests in (("loglikelihood", scored), ("loglikelihood_rolling", texts)):
            found, expected = getattr(ours, kind)(requests), getattr(theirs, kind)(requests)
            likelihoods = torch.tensor(expected, dtype=torch.float64)
            assert torch.allclose(
                torch.tensor(found, dtype=torch.float64), likelihoods, atol=1e-4, rtol=0
            )
        assert ours.generate_until(answers) == theirs.generate_until(answers)
    assert ours.max_gen_toks == theirs.max_gen_toks
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "It is"}]
    for generation in (True, False):
        rendered = ours.apply_chat_template(chat, add_generation_prompt=generation)
        assert rendered == theirs.apply_chat_template(chat, add_generation_prompt=generation)


def evaluated(model: MLAForCausalLM, options: Config, file: Path) -> tuple[HarnessSuite, list[Any]]:
    suite = HarnessSuite(options)
    return suite, run_suite(model, TOKENIZER, suite, file)


def test_the_suite_reports_what_the_harness_itself_does(
    model: MLAForCausalLM, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # theirs bootstraps in as many processes as cores
    options = Config(tasks=["tiny_both", "*_text"], include_path=str(tasks), limit=4, num_fewshot=2)
    suite, cells = evaluated(model, options, tmp_path / "samples.jsonl")
    theirs = simple_evaluate(
        our_lm(model),
        tasks=["tiny_both", "tiny_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=2,
        limit=4,
        bootstrap_iters=1000,
    )
    rows = suite.rows(cells)
    assert {row["task"] for row in rows} == {"tiny_both", "tiny_choice", "tiny_answer", "tiny_text"}
    for row in rows:
        expected = theirs["results"][row["task"]]
        error = expected[f"{row['metric']}_stderr,{row['filter']}"]
        assert row["value"] == expected[f"{row['metric']},{row['filter']}"]
        assert row["stderr"] == (None if error == "N/A" else error)
    numbers = [
        sum("," in key and "_stderr" not in key for key in of) for of in theirs["results"].values()
    ]
    assert len(rows) == sum(numbers)
    by_name = {(row["task"], row["metric"], row["filter"]): row for row in rows}
    assert by_name["tiny_both", "acc", "none"]["n"] == 4
    assert by_name["tiny_answer", "exact_match", "whole"]["num_fewshot"] == 2
    # The samples are those that the harness logs.
    of_choice = next(cell for cell in cells if cell["task"] == "tiny_choice")
    logged = theirs["samples"]["tiny_choice"]
    assert [answer["correct"] for answer in of_choice["answers"]] == [
        each["acc"] for each in logged
    ]
    assert [answer["expected"]["target"] for answer in of_choice["answers"]] == [0, 1, 0, 1]
    # What was written serves as well as what was just answered.
    again = HarnessSuite(options)
    again.check(TOKENIZER, 4096)
    assert again.rows(cells_of(read_samples(tmp_path / "samples.jsonl"))) == rows
    assert suite.published(rows)[1] == suite.published(cells)[1]
    suite.draw(rows, tmp_path / "tasks.png", title="a test")
    assert (tmp_path / "tasks.png").stat().st_size > 5000


def test_a_stopped_evaluation_goes_on_and_other_documents_are_asked_anew(
    model: MLAForCausalLM, tasks: Path, tmp_path: Path
) -> None:
    file, options = tmp_path / "samples.jsonl", Config(tasks=list(TASKS), include_path=str(tasks))
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    whole = evaluated(model, replace(options, tasks=["tiny_choice"]), file)[1]
    assert read
    read.clear()
    cells = evaluated(model, options, file)[1]
    assert whole[0] in cells
    assert len(cells) == 3
    read.clear()
    assert evaluated(model, options, file)[1] == cells
    assert not read
    write_tasks(tasks, {"tiny_choice": TASKS["tiny_choice"]}, CHOICES[::-1])
    again = evaluated(model, replace(options, tasks=["tiny_choice"]), file)[1]
    assert read
    assert again[0]["data"] != whole[0]["data"]


def test_a_prompt_that_does_not_fit_is_refused_or_cut_and_counted(
    model: MLAForCausalLM, tasks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long, short = asked(
        "generate_until",
        *[(text, {"until": [], "max_gen_toks": 8}) for text in ("a" * 50, "b" * 20)],
    )
    with pytest.raises(UsageError, match="1 of 2 prompts do not fit.*has 58 tokens.*takes 40"):
        our_lm(model, 40).generate_until([long, short])
    cut = our_lm(model, 40, too_long="truncate", quiet=False)
    kept = asked("generate_until", ("a" * 32, {"until": [], "max_gen_toks": 8}))
    assert cut.generate_until([long, short])[0] == our_lm(model).generate_until(kept)[0]
    assert cut.truncated == 1
    assert "1 of 2 prompts do not fit" in caplog.text
    with pytest.raises(UsageError, match="an answer alone may take 8"):
        our_lm(model, 8, too_long="truncate").generate_until([short])
    # The suite refuses before the first answer, with every task's prompts.
    suite = HarnessSuite(Config(tasks=["tiny_choice"], include_path=str(tasks), max_length=33))
    with pytest.raises(UsageError, match="6 of 14 prompts do not fit"):
        suite.check(TOKENIZER, 4096)
    cut_suite = HarnessSuite(replace(suite.options, too_long="truncate"))
    rows = cut_suite.rows(run_suite(model, TOKENIZER, cut_suite, tasks / "samples.jsonl"))
    assert {row["truncated_prompts"] for row in rows} == {6}
    assert cut_suite.published(rows)[1][0][-1] == "5 (6 prompts cut)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"tasks=\[\]: name at least one"),
        ({"tasks": ["tiny_choise"]}, "did you mean tiny_choice"),
        ({"include_path": "nowhere"}, "include_path=nowhere: no such folder"),
        ({"max_length": 5000}, "max_length=5000: the model has 4096 positions"),
        ({"tasks": ["tiny_unsafe"]}, "confirm_run_unsafe_code=true"),
        ({"tasks": ["tiny_sampled"]}, "answers here are greedy"),
        ({"tasks": ["tiny_missing"]}, "cannot be loaded: .*nowhere.jsonl"),
        (
            {"gen_kwargs": {"repetition_penalty": 1.5}, "tasks": ["tiny_answer"]},
            "repetition_penalty=1.5",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(
    tasks: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness's own thousands of task files take half a minute to look through.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "own/manager.py"))
    generated = TASKS["tiny_answer"]
    more = {
        "tiny_unsafe": f"unsafe_code: true\n{generated}",
        "tiny_sampled": generated.replace("do_sample: false", "do_sample: true, temperature: 1.0"),
    }
    write_tasks(tasks, more, CHOICES)
    missing = (tasks / "tiny_choice.yaml").read_text().replace("documents.jsonl", "nowhere.jsonl")
    (tasks / "tiny_missing.yaml").write_text(missing.replace("tiny_choice", "tiny_missing"))
    given = {"tasks": ["tiny_choice"], "include_path": str(tasks), **options}
    with pytest.raises(UsageError, match=message):
        HarnessSuite(Config(**given)).check(TOKENIZER, 4096)


def test_two_models_are_compared_document_by_document(
    model: MLAForCausalLM,
    tasks: Path,
    tmp_path: Path,
    ic: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = Config(tasks=["tiny_choice", "tiny_answer"], include_path=str(tasks))
    first = evaluated(model, wanted, tmp_path / "A/harness/samples.jsonl")[1]
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(5, 0))
    second = evaluated(model, wanted, tmp_path / "B/harness/samples.jsonl")[1]
    assert ic("compare", "A", "B", "output=both") == 0
    assert "tiny_choice" in capsys.readouterr().out
    rows = {
        row["task"]: row for row in json.loads(Path("both/comparison.json").read_text())["rows"]
    }
    assert list(rows) == [None, "tiny_choice", "tiny_answer"]
    assert rows["tiny_choice"]["n"] == 5
    assert rows["tiny_choice"]["first"] == first[0]["correct"] / 5
    assert rows["tiny_choice"]["second"] == second[0]["correct"] / 5


@pytest.fixture
def checkpoint(model: MLAForCausalLM, tmp_path: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    io = FolderCheckpointIO(model.config, TOKENIZER)
    io.save_checkpoint({"state_dict": state, "context_length": 2048}, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_both_command_lines_report_the_same(
    checkpoint: Path,
    tasks: Path,
    ic: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    given = [f"checkpoint={checkpoint}", "accelerator=cpu", "suite=harness"]
    wanted = [
        "suite.harness.tasks=[tiny_choice,tiny_answer]",
        f"suite.harness.include_path={tasks}",
    ]
    chat = ["suite.harness.apply_chat_template=true", "suite.harness.num_fewshot=1"]
    assert ic("evaluate", *given, *wanted, *chat, "output=ours") == 0
    printed = capsys.readouterr().out
    assert "tiny_choice" in printed
    assert "acc_norm" in printed
    rows = json.loads(Path("ours/results.json").read_text())["rows"]
    assert Path("ours/tasks.png").is_file()
    assert len(Path("ours/tasks.csv").read_text().splitlines()) == 1 + len(rows) == 7

    model_args = f"checkpoint={checkpoint},attention=torch,norm=torch,accelerator=cpu"
    command = ["lm_eval", "run", "--model", "ic", "--model_args", model_args]
    command += ["--tasks", "tiny_choice,tiny_answer", "--include_path", str(tasks)]
    command += ["--num_fewshot", "1", "--apply_chat_template", "--output_path", "theirs.json"]
    monkeypatch.setattr(sys, "argv", command)
    # Its own thousands of task files take half a minute to look through.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "own/manager.py"))
    harness_main()
    (file,) = Path().glob("theirs*.json")
    theirs = json.loads(file.read_text())["results"]
    for row in rows:
        assert row["value"] == theirs[row["task"]][f"{row['metric']},{row['filter']}"]

    for place, wrong, message in (
        (5, "checkpoint=nowhere", "ic: no checkpoint folder nowhere"),
        (5, "pretrained=x", "ic: unknown option in --model_args 'pretrained'"),
        (5, "attention=torch", "ic: --model_args: name a model source, checkpoint=PATH"),
        (-1, "cuda:1", "ic: device=cuda:1: give cpu or cuda"),
    ):
        refused = [*command, "--device", "cpu"]
        refused[place] = wrong
        monkeypatch.setattr(sys, "argv", refused)
        with pytest.raises(SystemExit) as left:
            harness_main()
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_without_the_harness_one_line_says_what_to_install(
    checkpoint: Path,
    ic: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("evaluate", f"checkpoint={checkpoint}", "accelerator=cpu", "suite=harness")
    for found, message in (
        ("0.4.12", "lm_eval 0.4.12: suite=harness needs 0.4.13"),
        (None, "needs"),
    ):

        def version(name: str, found: str | None = found) -> str:
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr("ic.evaluation.harness.tasks.version", version)
        assert ic(*command, "suite.harness.tasks=[arc_easy]") == 2
        assert message in (error := capsys.readouterr().err)
        assert "pip install '.[harness]'" in error
