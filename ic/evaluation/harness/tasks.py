"""Tasks of lm-evaluation-harness: which there are, what they ask, how answers to them are scored.

The harness loads tasks, writes prompts and scores answers; nothing of that is done here again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from transformers import PreTrainedTokenizerBase

from ic.errors import UsageError, one_line
from ic.evaluation.harness.grid import Config

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from ic.evaluation.harness.language_model import DecoderLM

# Older ones loop for ever where a RULER task is shorter than 4,096 tokens.
OLDEST = "0.4.13"
INSTALL = "pip install '.[harness]'"

# Resamples for the standard error of metrics that are no means.
_BOOTSTRAPS = 1000

# What answers can be made of. One request has one: a text, or a likelihood and whether it is the
# greedy answer, or the likelihood of a whole text.
Response = Any


def check_installed() -> str:
    """The harness's version.

    Raises:
        UsageError: it is missing, or too old.
    """
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        raise UsageError(f"suite=harness needs lm-evaluation-harness: {INSTALL}") from None
    if Version(found) < Version(OLDEST):
        raise UsageError(f"lm_eval {found}: suite=harness needs {OLDEST} or later: {INSTALL}")
    return found


@dataclass(frozen=True)
class Answered:
    """One document, scored.

    Attributes:
        target: what was expected.
        text: what was answered: generated, or the likeliest of the given continuations.
        correct: the task's first metric, where it is between 0 and 1.
        metrics: those that are numbers, by `<metric>,<filter>`.
    """

    target: Any
    text: str
    correct: float | None
    metrics: dict[str, float]


class LoadedTasks:
    """Tasks with their documents.

    Args:
        tokenizer: what tasks measure their own documents with.

    Raises:
        UsageError: an unknown name, documents that cannot be loaded, a task that runs code that the
            model writes without consent, or one that asks for pictures.
    """

    def __init__(self, options: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options = options
        self._loaded = _load(options, tokenizer)
        self.tasks: dict[str, Task] = self._loaded["tasks"]
        for name, task in self.tasks.items():
            self._configure(name, task)
        self._instances: dict[str, list[list[Instance]]] = {}

    def documents(self, name: str) -> int:
        """How many documents of a task are asked."""
        from lm_eval.evaluator_utils import get_sample_size

        task = self.tasks[name]
        most = get_sample_size(task, self.options.limit)
        return len(task.eval_docs) if most is None else min(most, len(task.eval_docs))

    def num_fewshot(self, name: str) -> int:
        return int(self.tasks[name].config.num_fewshot or 0)

    def identity(self, name: str) -> str:
        """Of a task's documents and of how they are asked and scored."""
        task = self.tasks[name]
        config = {key: value for key, value in task.dump_config().items() if key != "metadata"}
        told = {**self.options.metadata, "version": task.VERSION}
        text = json.dumps([config, told, list(task.eval_docs)], sort_keys=True, default=str)
        without_addresses = re.sub(r" at 0x[0-9a-f]+", "", text)
        return hashlib.sha256(without_addresses.encode()).hexdigest()[:12]

    def build_requests(self, model: DecoderLM) -> None:
        """Write every prompt, in a conversation of the model's if that was asked for."""
        options = self.options
        for name, task in self.tasks.items():
            task.set_fewshot_seed(seed=options.seed)
            task.build_all_requests(
                limit=self.documents(name),
                system_instruction=options.system_instruction,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.fewshot_as_multiturn,
                chat_template=model.apply_chat_template if options.apply_chat_template else None,
                tokenizer_name=model.tokenizer_name if options.apply_chat_template else "",
            )
            by_document: list[list[Instance]] = [[] for _ in range(self.documents(name))]
            for instance in task.instances:
                by_document[instance.doc_id].append(instance)
            for instances in by_document:
                instances.sort(key=lambda instance: instance.idx)
            self._instances[name] = by_document

    def requests(self, name: str, document: int | None = None) -> list[Instance]:
        """What is asked about a document, or about all of a task."""
        of_task = self._instances[name]
        wanted = of_task if document is None else [of_task[document]]
        return [instance for instances in wanted for instance in instances]

    def target(self, name: str, document: int) -> Any:
        """What is expected of a document's answer, as it is written."""
        return _plain(self.tasks[name].doc_to_target(self.requests(name, document)[0].doc))

    def score(self, name: str, document: int, responses: Sequence[Response]) -> Answered:
        """How the responses to a document's requests did."""
        task, instances = self.tasks[name], self.requests(name, document)
        metrics: dict[str, Any] = {}
        for instance, response in zip(instances, responses, strict=True):
            instance.resps = [response] * (instance.repeats or 1)
        for ensemble in task._filters:
            ensemble.apply(instances)
            given = [instance.filtered_resps[ensemble.name] for instance in instances]
            for metric, value in task.process_results(instances[0].doc, given).items():
                metrics[f"{metric},{ensemble.name}"] = value
        numbers = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        shares = [value for value in numbers.values() if 0 <= value <= 1]
        return Answered(
            target=self.target(name, document),
            text=_answer_text(instances, responses),
            correct=shares[0] if shares else None,
            metrics=numbers,
        )

    def results(self, responses: Mapping[tuple[str, int], Sequence[Response]]) -> dict[str, Any]:
        """What the harness's own `evaluate` makes of the responses, by task and document.

        Groups and standard errors are the harness's too.
        """
        from lm_eval import evaluate

        from ic.evaluation.harness.recorded import RecordedLM

        for task in self.tasks.values():
            task.set_fewshot_seed(seed=self.options.seed)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # so few bootstraps need no processes
        found: dict[str, Any] = evaluate(
            lm=RecordedLM(responses),
            task_dict=self._loaded,
            limit=self.options.limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            confirm_run_unsafe_code=self.options.confirm_run_unsafe_code,
        )
        return found

    def _configure(self, name: str, task: Task) -> None:
        """As the harness's `simple_evaluate` does."""
        options = self.options
        if getattr(task, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
            raise UsageError(
                f"suite.harness.tasks: {name} executes code that the model writes; allow it with "
                "suite.harness.confirm_run_unsafe_code=true"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"suite.harness.tasks: {name} asks about pictures or sound")
        if options.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", dict(options.gen_kwargs), update=True)
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and options.num_fewshot is not None):
            task.set_config("num_fewshot", options.num_fewshot or 0)


def _load(options: Config, tokenizer: PreTrainedTokenizerBase) -> Any:
    from lm_eval.tasks import TaskManager

    if not options.tasks:
        raise UsageError(
            "suite.harness.tasks=[]: name at least one, such as suite.harness.tasks=[arc_easy]; "
            "`lm_eval ls tasks` lists them"
        )
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UsageError(f"suite.harness.include_path={options.include_path}: no such folder")
    with tempfile.TemporaryDirectory() as folder:
        told = {"tokenizer": _saved(tokenizer, Path(folder)), **options.metadata}
        # The harness's own thousands of task files take half a minute to look through.
        for with_defaults in (False, True) if options.include_path else (True,):
            manager = TaskManager(
                include_path=options.include_path,
                include_defaults=with_defaults,
                metadata=dict(told),
            )
            names = {given: manager.match_tasks([given]) for given in options.tasks}
            if all(names.values()):
                break
        for given, found in names.items():
            if not found:
                raise UsageError.unknown("task in suite.harness.tasks", given, manager.all_tasks)
        wanted = list(dict.fromkeys(name for found in names.values() for name in found))
        try:
            return manager.load(wanted)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AssertionError) as error:
            raise UsageError(
                f"suite.harness.tasks={wanted}: cannot be loaded: {one_line(error)}"
            ) from error


def _saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """A folder of the tokenizer without code: tasks load it with `trust_remote_code=True`."""
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    values.pop("auto_map", None)
    settings.write_text(json.dumps(values))
    for code in folder.glob("*.py"):
        code.unlink()
    return str(folder)


def _answer_text(instances: Sequence[Instance], responses: Sequence[Response]) -> str:
    if instances[0].request_type == "generate_until":
        return str(responses[0])
    if instances[0].request_type == "loglikelihood":
        best = max(range(len(responses)), key=lambda index: responses[index][0])
        return str(instances[best].args[1])
    return ""


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _plain(value: Any) -> Any:
    """A target as JSON takes it."""
    return json.loads(json.dumps(value, default=str))
