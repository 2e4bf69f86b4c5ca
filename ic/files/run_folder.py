"""Where everything of a run lies. Nothing else spells these names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_STEP_FOLDER = re.compile(r"step=(\d+)")


class RunFolder:
    """A run's folder, `<output_dir>/<name>/<run_id>`.

    Attributes:
        path: the folder itself.
        config: the whole configuration that the run began with.
        lock: who trains in the folder now (`ic.files.run_lock`).
        results: rows of everything it measured; there once it has ended.
        log: what a study's `fit` printed.
        throughput, gpu_utilisation, context_length: what the callbacks of these names wrote.
        guardrails: a line for each step that was skipped.
        reference: log-probabilities of a preference run's reference model.
        samples: texts that the callback of this name wrote while training.
        predictions: answers of the verb `predict`.
        csv, tensorboard: the loggers' folders.
        metrics: the CSV logger's file.
        tracking: what the trackers W&B and MLflow are told, and how far they have been.
        loss_curve: a picture of the losses in it.
        curves: a picture of whatever else it holds by step.
        report: one page about the run, to be sent.
        nccl: what NCCL's flight recorder left of a run that hung.
        profile: the profiler's folder.
        checkpoints: the folder of `step=<n>`, and of the links `last` and `best` to two of them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config = path / "config.yaml"
        self.lock = path / ".lock"
        self.results = path / "results.json"
        self.log = path / "log.txt"
        self.throughput = path / "throughput.json"
        self.gpu_utilisation = path / "gpu_utilisation.json"
        self.context_length = path / "context_length.json"
        self.guardrails = path / "guardrails.jsonl"
        self.reference = path / "reference.jsonl"
        self.samples = path / "samples.jsonl"
        self.predictions = path / "predictions.jsonl"
        self.csv = path / "csv"
        self.metrics = self.csv / "metrics.csv"
        self.tensorboard = path / "tensorboard"
        self.tracking = path / "tracking"
        self.loss_curve = path / "loss.png"
        self.curves = path / "curves.png"
        self.report = path / "report.html"
        self.nccl = path / "nccl"
        self.profile = path / "profile"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last"
        self.best = self.checkpoints / "best"

    @property
    def resume_command(self) -> str:
        """What goes on with the run, from any folder and without its settings."""
        return f"fit run={shlex.quote(str(self.path))}"

    def memory(self, verb: str = "fit") -> Path:
        """The memory profile of training, or of a verb that only evaluated the run."""
        name = "memory.json" if verb == "fit" else f"memory_{verb}.json"
        return self.path / "memory" / name

    def memory_plot(self, verb: str = "fit") -> Path:
        """The picture of `memory`."""
        return self.memory(verb).with_suffix(".png")

    def oom_snapshot(self, rank: int) -> Path:
        """What filled the GPU of a rank that ran out of memory."""
        name = f"oom_snapshot_rank{rank}" if rank else "oom_snapshot"
        return self.path / "memory" / f"{name}.pickle"

    def suite(self, name: str) -> SuiteFolder:
        """What an evaluation suite left."""
        return SuiteFolder(self.path / name)

    def evaluation(self, step: int) -> Path:
        """What the verb `evaluate` measured of a step's checkpoint: a folder for each suite.

        It stays when the checkpoint goes.
        """
        return self.path / "evaluate" / f"step={step}"

    def evaluated_steps(self) -> list[int]:
        """Steps that the verb `evaluate` measured, in order."""
        return _steps_in(self.path / "evaluate")

    def measured(self, verb: str, checkpoint: Path) -> Path:
        """Results of the verb `validate`, `test` or `predict` with a checkpoint."""
        return self.path / verb / f"{checkpoint.name}.json"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.checkpoints / f"step={step}"

    def saved_steps(self) -> list[int]:
        """Steps of the whole checkpoints, in order."""
        return _steps_in(self.checkpoints)

    def owns(self, checkpoint: Path) -> bool:
        """Whether this run wrote a checkpoint folder."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def resolve_checkpoint(self, ckpt_path: str) -> Path:
        """`last` or `best` of the run, or a path.

        Raises:
            ValueError: the run has no such checkpoint.
        """
        if ckpt_path not in ("last", "best"):
            return Path(ckpt_path)
        folder = self.checkpoints / ckpt_path
        if not folder.is_dir():
            raise ValueError(
                f"ckpt_path={ckpt_path}: {self.path} holds no such checkpoint; leave ckpt_path out "
                "to begin anew, or check name= and run_id="
            )
        return folder.resolve()


class SuiteFolder:
    """What the evaluation of a suite writes, in a run's folder or elsewhere.

    Attributes:
        path: the folder itself.
        samples: a line for each sample, as it is answered.
        earlier_cells: in its place, a line for each cell of an evaluation by an earlier version.
        results: rows of the cells; the verb `evaluate` writes them, a run's own are in its results.
        judgements: what a judge said of the answers, as it comes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.samples = path / "samples.jsonl"
        self.earlier_cells = earlier_cells_file(self.samples)
        self.results = path / "results.json"
        self.judgements = path / "judgements.jsonl"

    @property
    def holds_answers(self) -> bool:
        """Whether a suite was evaluated into it."""
        return self.samples.is_file() or self.earlier_cells.is_file()

    def samples_at(self, step: int) -> Path:
        """Samples of the cheap evaluation at a step of training."""
        return self.path / f"samples-step={step}.jsonl"

    def table(self, picture: str) -> Path:
        """The suite's CSV file, named as its picture."""
        return self.path / f"{picture}.csv"

    def picture(self, name: str) -> Path:
        """The suite's picture."""
        return self.path / f"{name}.png"


class ReportFolder:
    """What the verb `evaluate` writes of all suites; theirs lie below it, or in it.

    Attributes:
        path: the folder itself.
        document: a page with every suite's table and picture.
        table: the rows of every suite.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.document = path / "report.md"
        self.table = path / "report.csv"

    @property
    def suites(self) -> list[SuiteFolder]:
        """Those that hold answers, by their names."""
        inside = sorted(self.path.iterdir()) if self.path.is_dir() else []
        folders = [SuiteFolder(path) for path in (self.path, *inside) if path.is_dir()]
        return [folder for folder in folders if folder.holds_answers]


class ComparisonFolder:
    """What the verb `compare` writes.

    Attributes:
        path: the folder itself.
        results: rows of every task and length, and what was compared.
        document: the same in words and as a table.
        picture: its scores as a plot.
        perplexity: its perplexities by position as a plot.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.results = path / "comparison.json"
        self.document = path / "comparison.md"
        self.picture = path / "comparison.png"
        self.perplexity = path / "perplexity.png"


class ExperimentFolder:
    """What the verbs of `ab` write of one experiment.

    Attributes:
        path: the folder itself.
        outcomes: the router's log.
        state: the split that the router keeps to, and what was rolled back.
        results: rows of the report.
        document: the report, in words and as a table.
        picture: the differences over the requests.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.outcomes = path / "outcomes.jsonl"
        self.state = path / "split.json"
        self.results = path / "report.json"
        self.document = path / "report.md"
        self.picture = path / "report.png"


class ParityFolder:
    """What the verb `parity` writes of an original and its conversion.

    Attributes:
        path: the folder itself.
        models: which two models it is about.
        document: what came out, as a page.
        results: the same as rows.
        picture: the same as curves and bars.
        tokens: a file for each document, with what both models made of each of its tokens.
        answers: what both answered to instructions, a line each.
        answers_page: the same side by side, to be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.models = path / "models.json"
        self.document = path / "report.md"
        self.results = path / "parity.json"
        self.picture = path / "parity.png"
        self.tokens = path / "tokens"
        self.answers = path / "answers.jsonl"
        self.answers_page = path / "answers.md"

    @classmethod
    def within(cls, folder: Path) -> ParityFolder:
        """Where a model card looks for it: in the folder of the conversion, or of what the verb
        `evaluate` measured of a run's checkpoint.
        """
        return cls(folder / "parity")

    def suite(self, side: str, name: str) -> SuiteFolder:
        """Where a suite of one of the two, `original` or `converted`, lies."""
        return SuiteFolder(self.path / side / name)


def earlier_cells_file(samples: Path) -> Path:
    """Where an earlier version wrote what now goes to a file of samples."""
    return samples.with_name(samples.name.replace("samples", "cells", 1))


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint folder, or a link to one, lies in; None for any other folder."""
    folder = checkpoint.resolve()
    run = RunFolder(folder.parents[1]) if len(folder.parents) > 1 else None
    return run if run and folder.parent == run.checkpoints and _step_of(folder) else None


def saved_step(folder: Path) -> int:
    """The step of a checkpoint folder of a run, from its name."""
    step = _step_of(folder)
    assert step is not None, folder
    return step


def _steps_in(folder: Path) -> list[int]:
    """Steps of the folders `step=<n>` in it, in order."""
    found = (_step_of(path) for path in folder.glob("step=*"))
    return sorted(step for step in found if step is not None)


def _step_of(folder: Path) -> int | None:
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None
