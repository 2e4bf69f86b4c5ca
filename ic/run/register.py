"""A model on its way into the registry: its files, their signature and digests, and the upload."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ic.checkpoint.export import copy_tokenizer, export_checkpoint
from ic.checkpoint.export_folder import MANIFEST
from ic.checkpoint.folder import load_config
from ic.checkpoint.hugging_face import CONFIG, INDEX, weight_files
from ic.checkpoint.source import Source, find_source
from ic.errors import UsageError
from ic.evaluation.comparison.answers import find_answers
from ic.files.results import commit, read_json
from ic.files.run_folder import RunFolder, run_of
from ic.inference.model_facts import positions_of
from ic.inference.transformers_model import is_ours, read_config
from ic.run.registry_options import RegisterOptions
from ic.tracking.registry import (
    CARD,
    DIGEST_TAG,
    EVALUATION,
    SIGNATURE,
    Registry,
    Version,
    digest_of,
    write_listing,
)
from ic.tracking.spool import SpoolFolder

# What `evaluate` and `fit` write of a suite.
_OF_A_SUITE = ("samples.jsonl", "cells.jsonl", "results.json", "*.csv", "*.png")


def register(config: RegisterOptions) -> Version:
    """Make a new version of a model.

    Raises:
        UsageError: the registry does not answer; a folder without a card; no such evaluation.
        CheckpointError: the source is none, or one that cannot be registered.
    """
    registry = Registry("uri", config.uri)
    source = find_source(config.run or config.source or "")
    evaluation = _evaluation(config, source)
    run_id = _mlflow_run(registry, config, run_of(source.path))
    with tempfile.TemporaryDirectory(prefix="ic-register-") as temporary:
        folder = Path(temporary) / config.name
        ours = is_ours(source)
        (_write_model if ours else _copy_model)(source, folder)
        for name, answered in evaluation.items():
            _copy_suite(answered, folder / EVALUATION / name)
        _write_signature(folder, run_id, ours)
        write_listing(folder)
        digest = digest_of(folder)
        inside = f"registered/{digest[:16]}"
        _upload(registry, run_id, folder, inside)
        tags = {DIGEST_TAG: digest, "ic.commit": commit(), "ic.source": source.name}
        tags["ic.suites"] = ", ".join(evaluation) or "none"
        version = registry.create(config.name, run_id, inside, tags)
    registry.point(config.alias, version)
    return version


def _evaluation(config: RegisterOptions, source: Source) -> dict[str, Path]:
    """Folders of suites by their names."""
    if config.evaluation is not None:
        return {name: each.folder for name, each in find_answers(config.evaluation).items()}
    run = run_of(source.path)
    for given in () if run is None else (source.path, run.path):
        try:
            return {name: each.folder for name, each in find_answers(given).items()}
        except (UsageError, FileNotFoundError):
            continue  # nothing was measured there
    return {}


def _write_model(source: Source, folder: Path) -> None:
    """The files of an export: its own, or made now."""
    if not source.is_gguf and (source.path / MANIFEST).is_file():
        if not (source.path / CARD).is_file():
            raise _without_card(source, "export it anew")
        shutil.copytree(source.path, folder, ignore=shutil.ignore_patterns("parity", EVALUATION))
    else:
        export_checkpoint(source, folder)


def _copy_model(source: Source, folder: Path) -> None:
    """The files of a model that others made, such as a Llama that is to be converted: its weights
    as safetensors, what it says of itself, and no code.
    """
    path = source.path
    if source.is_gguf:
        raise UsageError(
            f"{path} holds a model of others' as GGUF: register its Hugging Face folder, with "
            f"safetensors and a {CARD}"
        )
    read_config(source)  # refuses what cannot be loaded
    weights = weight_files(path)
    if not (path / CARD).is_file():
        raise _without_card(source, "take its publisher's, or write one")
    folder.mkdir()
    own = [path / CONFIG, path / CARD, path / INDEX, *path.glob("LICEN[CS]E*")]
    for file in (*weights, *own):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    copy_tokenizer(path, folder)


def _without_card(source: Source, what_to_do: str) -> UsageError:
    return UsageError(f"{source.path} is unsigned: it has no model card {CARD}; {what_to_do}")


def _copy_suite(suite: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for pattern in _OF_A_SUITE:
        for file in suite.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _write_signature(folder: Path, run_id: str, ours: bool) -> None:
    """`MLmodel`: text goes in, text comes out; and which model of which vocabulary it is."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    cache = {}
    config: Any
    if ours:
        config = load_config(folder, quantised=True)
        cache = {each: getattr(config, each) for each in ("kv_lora_rank", "qk_rope_head_dim")}
    else:
        config = read_config(Source(folder))
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "completion")]),
    )
    model = Model(run_id=run_id, signature=signature)
    model.add_flavor(
        "infinite_context",
        format="safetensors",
        model_type=config.model_type,
        vocabulary_tokens=config.get_text_config().vocab_size,
        positions_tokens=positions_of(config),
        **cache,
    )
    model.save(str(folder / SIGNATURE))


def _mlflow_run(registry: Registry, config: RegisterOptions, run: RunFolder | None) -> str:
    """The MLflow run that the files belong to: that of the training, if it was logged there."""
    sent = {} if run is None else read_json(SpoolFolder(run, "mlflow").sent)
    if sent.get("uri") == registry.uri and sent.get("run_id"):
        return str(sent["run_id"])
    return registry.new_run(config.experiment, f"register {config.name}")


def _upload(registry: Registry, run_id: str, folder: Path, inside: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    columns: tuple[Any, ...] = (TextColumn("upload"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(file.stat().st_size for file in files))
        for file in files:
            below = file.parent.relative_to(folder).as_posix()
            registry.upload(run_id, file, inside if below == "." else f"{inside}/{below}")
            progress.advance(task, file.stat().st_size)
