"""`run=FOLDER` and `from=FOLDER`: the configuration that a run saved, in place of `conf/`.

It becomes the experiment `of_run` of Hydra's store, on top of the bare schemas. So overrides given
beside it win, and a group chosen beside it, such as `optimizer=adamw`, replaces the run's own part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from ic.config.data import DATA_SCHEMAS
from ic.config.groups import model_schema, part_schemas
from ic.config.run import RunConfig
from ic.errors import UsageError
from ic.evaluation.registry import suite_names
from ic.files.run_folder import RunFolder
from ic.files.saved_config import read_config

# How a run was started, which is no part of what it is.
_OF_THE_START = ("ckpt_path", "overwrite", "allow_config_change")
_OF_THE_FOLDER = ("name", "run_id", "output_dir")
_PARTS = ("model", "optimizer", "strategy", "trainer", "callbacks", "logger")


def complete_run(overrides: list[str]) -> list[str]:
    """`run=FOLDER` is that run: its configuration, its folder and its checkpoint `last`.

    Raises:
        UsageError: no run in the folder, or something beside it that would name another run.
    """
    given = given_values(overrides)
    if "checkpoint" in given:
        raise UsageError(
            f"unknown key 'checkpoint': name the run by run={given['checkpoint']} (its folder), "
            "and a checkpoint other than its last by ckpt_path="
        )
    if "run" not in given:
        return overrides
    folder = Path(str(given["run"])).absolute()
    for key in ("experiment", *_OF_THE_FOLDER):
        if key in given:
            raise UsageError(
                f"{key}={given[key]}: run={given['run']} says which run it is; leave {key}= out"
            )
    place = dict(zip(_OF_THE_FOLDER, (folder.parent.name, folder.name), strict=False))
    saved = {**_saved("run", folder), **place, "output_dir": str(folder.parents[1])}
    last = [] if "ckpt_path" in given else ["ckpt_path=last"]
    return [*_as_experiment(saved, given), *last, *_without("run", overrides)]


def complete_from(overrides: list[str]) -> list[str]:
    """`from=FOLDER` begins a new run with the configuration of that one.

    Raises:
        UsageError: no run in the folder, or no name for the new one.
    """
    given = given_values(overrides)
    if "from" not in given:
        return overrides
    for key in ("run", "experiment"):
        if key in given:
            raise UsageError(f"from={given['from']} and {key}={given[key]}: give one of the two")
    if not {"run_id", "name"} & given.keys():
        raise UsageError(
            f"from={given['from']} begins a new run: give it a run_id=, or continue that run with "
            f"run={given['from']}"
        )
    saved = _saved("from", Path(str(given["from"])))
    if "shape" in (model := saved.get("model") or {}):
        model["shape"] = {}  # read anew, from the folder that the weights come from
    return [*_as_experiment(saved, given), *_without("from", overrides)]


def given_values(overrides: list[str]) -> dict[str, Any]:
    """What Hydra reads on a command line, by key: a path without its quotes, a list as one."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group: override.value() for override in parsed}


def _without(key: str, overrides: list[str]) -> list[str]:
    return [override for override in overrides if not override.startswith(f"{key}=")]


def config_of_run(key: str, folder: str | Path, otherwise: str = "") -> dict[str, Any]:
    """What the `config.yaml` in a run's folder says.

    Args:
        key: by which the folder was given.
        otherwise: what else could be given, for the error.

    Raises:
        UsageError: no run in the folder.
    """
    file = RunFolder(folder).config
    if not file.is_file():
        raise UsageError(
            f"{key}={folder}: no run has written {file}; give a run's folder such as "
            f"runs/mla_tiny/default{otherwise}"
        )
    return read_config(file)


def _saved(key: str, folder: Path) -> dict[str, Any]:
    whole = config_of_run(key, folder)
    saved = {key: value for key, value in whole.items() if key not in _OF_THE_START}
    for path in _prune(saved, RunConfig):
        print(f"{key}={folder}: this version has no {path}: left out", file=sys.stderr)
    return saved


def _as_experiment(saved: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Store the configuration -> the override that chooses it."""
    data = {kind.name: schema for schema, kind in DATA_SCHEMAS.items()}
    name = saved["data"]["name"]
    if name not in data:
        raise UsageError(f"config.yaml: data.name={name}: this version knows {', '.join(data)}")
    schemas: dict[str, Any] = {part: f"{part}_schema" for part in _PARTS}
    schemas |= {"data": data[name], "evaluation": "grid_schema"}
    schemas["model"] = model_schema(saved.get("model") or {})
    if suites := [suite for suite in saved.get("suite") or {} if suite in suite_names()]:
        schemas["suite"] = suites
    node = dict(saved)
    for group in (*schemas, "preference", "distillation"):
        if group in given:
            del node[group]
            schemas.pop(group, None)
    if "model/adapter" in given and "model" in node:
        node["model"] = {**node["model"]}
        del node["model"]["adapter"]
    defaults = [{f"override /{group}": schema} for group, schema in schemas.items()]
    ConfigStore.instance().store(
        group="experiment",
        name="of_run",
        package="_global_",
        node={"defaults": [*defaults, "_self_"], **node},
    )
    return ["experiment=of_run"]


def _prune(saved: dict[str, Any], kind: type, prefix: str = "") -> Iterator[str]:
    """Take keys that this version does not have out of `saved` -> their paths."""
    types = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    for name in [name for name in saved if name not in known]:
        del saved[name]
        yield f"{prefix}{name}"
    for name, value in saved.items():
        if not isinstance(value, dict):
            continue
        part = types[name]
        if prefix == "":
            part = part_schemas(saved).get(name, part)
        for each in (part, *get_args(part)):
            if is_dataclass(each) and isinstance(each, type):
                yield from _prune(value, each, f"{prefix}{name}.")
