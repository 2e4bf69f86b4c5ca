"""evaluation suites on any model: needles in text, RULER, perplexity and more"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ic.checkpoint.source import Source, find_source
from ic.errors import UsageError
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.evaluation.registry import check_chosen, suite_names
from ic.files.run_folder import ReportFolder, SuiteFolder, run_of, saved_step
from ic.inference.options import InferenceOptions

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from transformers import PreTrainedTokenizerBase

    from ic.evaluation.suite import Suite


@dataclass
class Config(InferenceOptions):
    """The verb `evaluate`: suites on a model.

    Attributes:
        run: a run's folder: its last checkpoint, unless `checkpoint` names another, with the run's
            own options of `evaluation`, accelerator, attention and devices. What is given beside
            it wins; `evaluation=NAME` replaces all of the run's own options.
        suite: suites by name, each with its options; choose with suite=NAME or suite=[NAME,...].
            With `run` these are by default passkey and the run's own, with the run's options.
        evaluation: options of the suite passkey.
        output: folder of the files, with several suites of a folder for each; by default beside
            the checkpoints in the run's folder, `evaluate/step=<n>/<suite>`, and for a model of no
            run `runs/evaluate/<name>/<suite>`.
        sample_cache: folder that keeps samples of suites that draw slowly, for the next evaluation;
            `auto` is `infinite-context/samples` in $XDG_CACHE_HOME or ~/.cache; null keeps none.
        trained_length: marked in pictures; default from the checkpoint.
        devices: processes of a host, each with the whole model, which share the samples; `auto`
            is all GPUs of the host. In a SLURM job it is the job's.
        num_nodes: hosts, whose processes share the samples; in a SLURM job it is the job's.
        context_parallel_size: 1, or the number of processes: they then share each prompt and its
            cache instead of the samples, for prompts that are too long for one.
        rendezvous_timeout_s: how long the processes wait for each other at the very start.
    """

    run: str | None = None
    suite: dict[str, Any] = field(default_factory=dict)
    evaluation: PasskeyGridConfig = field(default_factory=PasskeyGridConfig)
    output: str | None = None
    sample_cache: str | None = "auto"
    trained_length: int | None = None
    devices: Any = 1
    num_nodes: int = 1
    context_parallel_size: int = 1
    rendezvous_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices != "auto" and not (type(self.devices) is int and self.devices >= 1):
            raise ValueError(f"devices={self.devices}: must be auto or a number of at least 1")
        for name in ("num_nodes", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.context_parallel_size > 1 and self.cache_dtype != "auto":
            raise ValueError(
                f"cache_dtype={self.cache_dtype}: a cache that context_parallel_size="
                f"{self.context_parallel_size} processes share is not quantised; leave one out"
            )
        if not self.rendezvous_timeout_s > 0:
            raise ValueError(f"rendezvous_timeout_s={self.rendezvous_timeout_s}: must be above 0")
        if not self.suite:
            raise ValueError("suite: choose at least one, for example suite=passkey")
        check_chosen(self.suite)


def complete(overrides: list[str]) -> list[str]:
    """`run=FOLDER` stands for what the run was configured with; what is given beside it wins.

    Without a choice of suites, those are passkey and the run's own; a suite of the run's that is
    chosen by name has the run's options.

    Raises:
        UsageError: no run in the folder; a suite that is given twice.
    """
    from hydra.core.config_store import ConfigStore

    from ic.config.from_run import config_of_run, given_values
    from ic.config.typed_values import quoted
    from ic.files.saved_config import forgotten_keys

    given_here = given_values(overrides)
    if isinstance(suites := given_here.get("suite"), list):
        for name in suites:
            if suites.count(name) > 1:
                raise UsageError(f"suite: {name} is given twice; give each suite once")
    asked = given_here.get("suite", "passkey")
    of_passkey = [key for key in given_here if key.partition(".")[0] == "evaluation"]
    if of_passkey and "passkey" not in ([asked] if isinstance(asked, str) else asked):
        raise UsageError(
            f"{of_passkey[0]}: an option of the suite passkey, which suite={asked} leaves out; "
            f"options of another suite are suite.NAME.{of_passkey[0].partition('.')[2] or 'KEY'}"
        )
    if "run" not in given_here:
        return overrides
    folder = str(given_here["run"])
    saved = config_of_run("run", folder, ", or a model with checkpoint=")
    given = [
        f"{key}={saved[part][key]}"
        for part, key in (
            ("trainer", "accelerator"),
            ("model", "attention"),
            ("trainer", "devices"),
        )
        if key in (saved.get(part) or {})  # a key of a later version has its default
    ]
    if "checkpoint" not in given_here:
        given.append(f"checkpoint={quoted(folder)}")
    if "evaluation" not in given_here:
        own: dict[str, Any] = saved.get("evaluation") or {}
        for forgotten in forgotten_keys(own, PasskeyGridConfig(), "evaluation."):
            print(f"run={folder}: this version has no {forgotten}: left out", file=sys.stderr)
        names = {each.name for each in fields(PasskeyGridConfig)}
        kept = {name: value for name, value in own.items() if name in names}
        node = {"defaults": ["grid_schema", "_self_"], **kept}
        ConfigStore.instance().store(group="evaluation", name="of_run", node=node)
        given.append("evaluation=of_run")
    own_suites = dict(saved.get("suite") or {})
    own_suites.pop("passkey", None)  # its options are `evaluation`
    for gone in own_suites.keys() - set(suite_names()):
        print(f"run={folder}: this version has no suite {gone}: left out", file=sys.stderr)
        del own_suites[gone]
    chosen = given_here.get("suite", ["passkey", *own_suites])
    suites = [chosen] if isinstance(chosen, str) else chosen
    groups = [
        _as_in_run(name, own_suites[name], folder) if own_suites.get(name) else name
        for name in suites
    ]
    others = [override for override in overrides if not override.startswith("suite=")]
    return [*given, f"suite=[{','.join(groups)}]", *others]


def _as_in_run(suite: str, own: dict[str, Any], folder: str) -> str:
    """Store a run's options of a suite -> their name in Hydra's group `suite`."""
    from hydra.core.config_store import ConfigStore

    from ic.evaluation.registry import suite_config
    from ic.files.saved_config import forgotten_keys

    kind = suite_config(suite)
    for forgotten in forgotten_keys(own, kind(), f"suite.{suite}."):
        print(f"run={folder}: this version has no {forgotten}: left out", file=sys.stderr)
    kept = {each.name: own[each.name] for each in fields(kind) if each.name in own}
    node = {"defaults": [f"{suite}_schema", "_self_"], **kept}
    name = f"{suite}_of_run"
    ConfigStore.instance().store(group="suite", name=name, node=node, package=f"suite.{suite}")
    return name


def check(config: Config) -> None:
    """Refuse a source that is none, before PyTorch is loaded.

    Raises:
        CheckpointError: naming it.
        UsageError: the registry does not have it, or does not answer.
    """
    find_source(config.checkpoint)


def run(config: Config) -> int:
    """Evaluate each suite: its cells, CSV file, picture and results file, and a table."""
    import torch

    from ic.evaluation.registry import build_suite
    from ic.parallel.launch import launched_ranks

    suites = [build_suite(name, options) for name, options in config.suite.items()]
    source, sharing = find_source(config.checkpoint), config.context_parallel_size
    for suite in suites:
        suite.connect()
    gpus = torch.cuda.device_count() if config.accelerator != "cpu" else 0
    devices = max(1, gpus) if config.devices == "auto" else config.devices
    with launched_ranks(
        config.accelerator,
        devices,
        config.num_nodes,
        exchange_tensors=sharing > 1,
        rendezvous_timeout_s=config.rendezvous_timeout_s,
    ) as ranks:
        _evaluate(config, suites, source, ranks)
    return 0


def _evaluate(config: Config, suites: list[Suite[Any]], source: Source, ranks: Fabric) -> None:
    from rich.console import Console

    from ic.evaluation.progress import suite_progress
    from ic.evaluation.report import write_report
    from ic.evaluation.report_page import Measured, check_folder, shown, write_page
    from ic.evaluation.runner import identity_of, run_suite
    from ic.evaluation.sample_cache import FOLDER
    from ic.files.cache_folder import cache_folder
    from ic.files.results import write_results
    from ic.inference.loading import open_source
    from ic.model.fingerprint import fingerprint
    from ic.parallel.context_parallel import ContextParallel

    sharing = config.context_parallel_size
    if sharing not in (1, ranks.world_size):
        raise ValueError(
            f"context_parallel_size={sharing} with {ranks.world_size} processes: choose 1 or "
            f"{ranks.world_size}, or change devices or num_nodes"
        )
    # The link `last` moves while a run trains: all processes take what the first of them found.
    source = ranks.broadcast(source)
    opened = open_source(replace(config, checkpoint=str(source.path)))
    if sharing > 1 and not opened.ours:
        raise ValueError(
            f"context_parallel_size={sharing}: {source.path} is no model of ours, and only ours "
            "can share a prompt; leave it out, and devices share the samples"
        )
    # Before the weights are loaded, and before the first suite takes hours.
    _check(suites, opened.tokenizer, opened.positions)
    loaded = opened.load()
    weights = fingerprint(loaded.model)
    report = _report_folder(config, source)
    if config.output is not None:
        check_folder(report, weights, [suite.name for suite in suites])
    if sharing > 1:
        loaded.model.model.context_parallel = ContextParallel()
    trained = config.trained_length or loaded.trained_length
    console = Console()
    for suite in suites:
        single = config.output is not None and len(suites) == 1
        folder = SuiteFolder(report.path if single else report.path / suite.name)
        processes = ranks.world_size if sharing == 1 else 1
        with suite_progress(suite, quiet=ranks.global_rank > 0, processes=processes) as on_sample:
            cells = run_suite(
                loaded.model,
                loaded.tokenizer,
                suite,
                folder.samples,
                on_sample,
                ranks=ranks if sharing == 1 else None,
                sharded=sharing > 1,
                sample_cache=cache_folder(config.sample_cache, FOLDER),
            )
        if ranks.global_rank > 0:
            continue
        picture = write_report(
            suite, cells, folder, title=f"{loaded.name}: {suite.title}", trained_length=trained
        )
        about = {
            "suite": suite.name,
            "evaluation": asdict(config.suite[suite.name]),
            "identity": identity_of(loaded.model, weights, loaded.tokenizer, suite),
            "model": asdict(Measured(loaded.name, str(source.path), weights, trained)),
        }
        rows = suite.rows(cells)
        write_results(folder.results, {**asdict(config), **about}, rows, shown=shown(suite, cells))
        write_page(report, weights)  # after each, should the next one be stopped
        console.print(suite.table(cells))
        console.print(f"{suite.picture}: {picture}", soft_wrap=True, highlight=False)
    if ranks.global_rank == 0:
        console.print(f"report: {report.document}", soft_wrap=True, highlight=False)


def _check(suites: list[Suite[Any]], tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
    """Raises:
    ValueError: what suites refuse, of all of them at once.
    """
    refusals = []
    for suite in suites:
        try:
            suite.check(tokenizer, positions)
        except ValueError as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:
        raise ValueError("; ".join(map(str, refusals)))


def _report_folder(config: Config, source: Source) -> ReportFolder:
    """Where the files of all suites go."""
    if config.output is not None:
        return ReportFolder(config.output)
    owner = run_of(source.path)
    if owner is None:
        return ReportFolder(Path("runs/evaluate") / source.name)
    return ReportFolder(owner.evaluation(saved_step(source.path.resolve())))
