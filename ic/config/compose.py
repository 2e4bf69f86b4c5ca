"""Flags and overrides, composed by Hydra, turned into dataclasses, with errors that name the
nearest valid key.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ic.config.groups import register_schemas
from ic.errors import UsageError

CONF = Path(__file__).absolute().parents[1] / "conf"
_SWEEP_SETTINGS = [
    # Not `disabled`: that silences every logger that exists, Lightning's and ours too.
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra.output_subdir=null",
    "hydra.sweep.dir=runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.job.config.override_dirname.exclude_keys=[experiment,run_id,name,output_dir]",
]


def compose_config(
    verb: str, schema: type, overrides: list[str], *, check: bool = True
) -> tuple[Any, str]:
    """Compose a verb's configuration -> checked dataclass (None without `check`), and its YAML.

    Args:
        verb: names `conf/<verb>.yaml`.
        schema: its dataclass.

    Raises:
        ValueError: an unknown group, option or key, a value of the wrong type or out of range.
    """
    register_schemas(verb, schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            cfg = compose(verb, overrides)
        except MissingConfigException as error:
            raise _unknown_option(error) from error
        except HydraException as error:
            known = _known_keys(verb, overrides)
            extended = _extend_tables(overrides, known)
            if extended != overrides:
                return compose_config(verb, schema, extended, check=check)
            raise _explain(error, known) from error
        except OmegaConfBaseException as error:
            raise _wrong_value(error) from error
        except AssertionError as error:  # OmegaConf's, for a key below null
            raise _below_null(verb, overrides) or error from error
    _refuse_additions(cfg)
    return (to_dataclasses(verb, cfg) if check else None), OmegaConf.to_yaml(cfg)


def to_dataclasses(verb: str, cfg: DictConfig) -> Any:
    """The composed configuration as the verb's dataclass, its checks run."""
    try:
        return OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        key = re.findall(r"full_key: (\S+)", str(error))[0]
        raise UsageError(f"{verb} needs {key}=...; see python -m ic {verb} --help") from error
    except OmegaConfBaseException as error:
        raise _wrong_value(error) from error


def describe_groups(verb: str) -> list[tuple[str, list[str]]]:
    """Every group that the verb's configuration chooses from, each with its options."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        chosen = loader.compute_defaults_list(verb, [], RunMode.RUN).overrides.known_choices
        groups = sorted(group for group in chosen if not group.startswith("hydra/"))
        return [(group, _options(loader.get_group_options(group))) for group in groups]


def sweep(verb: str, schema: type, overrides: list[str], job: Callable[[Any], None]) -> None:
    """Run `job` with each configuration of Hydra's own sweep over comma-separated values.

    Raises:
        ValueError: a wrong key or value, before anything starts.
    """

    def configured(cfg: DictConfig) -> None:
        # The folder must not depend on the order of the sweep: a requeued job looks for its own.
        named = HydraConfig.get().job.override_dirname
        if "run_id" in cfg and named:
            cfg.run_id = f"{cfg.run_id},{named}".replace("/", "-").replace(" ", "")
        job(to_dataclasses(verb, cfg))

    for alone in _each_value(overrides):
        compose_config(verb, schema, alone)
    sys.argv = [f"ic {verb}", "--multirun", *overrides, *_SWEEP_SETTINGS]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=verb)(configured)()


def _each_value(overrides: list[str]) -> Iterator[list[str]]:
    """Lists of overrides without a sweep: each value once, beside the first of the others."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [given]
        for o, given in zip(parsed, overrides, strict=True)
        if not o.is_hydra_override()
    ]
    firsts = [each[0] for each in values]
    yield firsts
    for place, each in enumerate(values):
        for value in each[1:]:
            yield [*firsts[:place], value, *firsts[place + 1 :]]


def _options(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.endswith("schema")]


def _extend_tables(overrides: list[str], known: list[str]) -> list[str]:
    """`key={new: 1}` of a table that is there: Hydra takes new entries only with `++`."""
    return [
        f"++{override}" if override.partition("={")[0] in known else override
        for override in overrides
    ]


def _refuse_additions(node: DictConfig, path: str = "") -> None:
    """`++key=value` adds whatever it is given; a key that no dataclass has would be ignored."""
    kind = OmegaConf.get_type(node)
    if is_dataclass(kind):
        known = [f"{path}{field.name}" for field in fields(kind)]
        for key in node:
            if (full := f"{path}{key!s}") not in known:
                raise UsageError.unknown("key", full, known)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _refuse_additions(child, f"{path}{key!s}.")


def _unknown_option(error: MissingConfigException) -> UsageError:
    group, _, given = (error.missing_cfg_file or "").rpartition("/")
    options = _options(error.options or [])
    return UsageError.unknown(group or "configuration", given, options)


def _explain(error: HydraException, known: list[str]) -> ValueError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = str(error)
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", message):
        key = match.group(1).partition("=")[0].lstrip("+~@")
        if "struct" in message or "No match" in message or "Key" in str(cause):
            return UsageError.unknown("key", key, known)
    if isinstance(cause, OmegaConfBaseException):
        return _wrong_value(cause)
    return UsageError(message.partition("\nSee ")[0])


def _known_keys(verb: str, overrides: list[str]) -> list[str]:
    """Keys of the configuration that the group choices alone give, and the groups."""
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    choices = [o for o in overrides if o.partition("=")[0] in groups]
    try:
        keys = _flatten(compose(verb, choices))
    except HydraException:
        keys = []
    return sorted({*keys, *groups})


def _below_null(verb: str, overrides: list[str]) -> UsageError | None:
    """The first override of a key below one that is null."""
    for place, override in enumerate(overrides):
        try:
            compose(verb, overrides[: place + 1])
        except AssertionError:
            key = override.partition("=")[0].lstrip("+~")
            *parents, last = key.split(".")[:-1]
            group = CONF.joinpath(*parents)
            switch = ""
            if (group / f"{last}.yaml").is_file():
                switch = f" or choose {'/'.join(parents)}={last}"
            elif options := sorted(path.stem for path in (group / last).glob("*.yaml")):
                switch = f" or choose {'/'.join([*parents, last])}={'|'.join(options)}"
            return UsageError(
                f"{override}: {'.'.join([*parents, last])} is null (switched off) here, so there "
                f"is nothing to set; leave it out{switch}"
            )
    return None


def _flatten(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none():
        return [prefix]
    keys = [prefix] if prefix else []
    for key in node:
        keys += _flatten(node._get_node(key), f"{prefix}.{key!s}" if prefix else str(key))
    return keys


def _wrong_value(error: OmegaConfBaseException) -> ValueError:
    cause = error.__cause__
    if isinstance(cause, ValueError) and not isinstance(cause, OmegaConfBaseException):
        return cause
    key = f"{error.full_key}: " if error.full_key else ""
    return UsageError(f"{key}{(error.msg or str(error)).splitlines()[0]}")
