"""Flags and overrides, composed by Hydra, turned into dataclasses, with errors that name the
nearest valid key.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

FLAGS = {
    "--help": "help", "-h": "help", "--print_config": "print_config", "--multirun": "multirun",
    "-m": "multirun",
}  # fmt: skip


class UsageError(ValueError):
    """Something on the command line that does not exist or does not fit."""

    @classmethod
    def unknown(cls, kind: str, given: str, known: list[str]) -> UsageError:
        """`given` is not among `known`; name the nearest ones."""
        near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
        if not near:  # a key may be right but for its path
            last = given.rpartition(".")[2]
            near = [key for key in known if key.rpartition(".")[2] == last][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        return cls(f"unknown {kind} {given!r}; {hint}")


def split_flags(args: list[str]) -> tuple[set[str], list[str]]:
    """Arguments -> our flags, and Hydra overrides made from `--key=value`, `--key value` and
    `key=value`.

    Raises:
        UsageError: an argument that is none of these.
    """
    flags: set[str] = set()
    overrides: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg in FLAGS:
            flags.add(FLAGS[arg])
        elif arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:
                has_value = rest and not rest[0].startswith("--") and rest[0] not in FLAGS
                value = rest.pop(0) if has_value else "true"
            overrides.append(f"{key}={value}")
        elif "=" in arg or arg.startswith("~"):
            overrides.append(arg)
        else:
            raise UsageError(
                f"{arg!r} is neither key=value nor a flag; write key=value or --key value"
            )
    return flags, [_quote(override, "multirun" in flags) for override in overrides]


def _quote(override: str, multirun: bool) -> str:
    """Quote a value that Hydra's grammar would stumble over: a path with `step=2`, a sentence."""
    key, _, value = override.partition("=")
    special = "=!?;'\"&<>#()" + ("" if multirun else ",")
    if value[:1] in ("'", '"', "[", "{", "$") or not any(c in value for c in special):
        return override
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def compose_config(
    conf: Path, verb: str, overrides: list[str], *, check: bool = True
) -> tuple[Any, str]:
    """Compose a verb's configuration -> checked dataclass (None without `check`), and its YAML.

    Raises:
        ValueError: an unknown group, option or key, a value of the wrong type or out of range.
    """
    from ic.config import register_schemas

    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        try:
            cfg = compose(verb, overrides)
        except MissingConfigException as error:
            raise _unknown_option(error) from error
        except HydraException as error:
            known = _known_keys(conf, verb, overrides)
            extended = _extend_tables(overrides, known)
            if extended != overrides:
                return compose_config(conf, verb, extended, check=check)
            raise _explain(error, known) from error
        except OmegaConfBaseException as error:
            raise _wrong_value(error) from error
        except AssertionError as error:  # OmegaConf's, for a key below null
            raise _below_null(conf, verb, overrides) or error from error
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


def describe_groups(conf: Path, verb: str) -> list[tuple[str, list[str]]]:
    """Groups that the verb's defaults list names, each with its options."""
    text = (conf / f"{verb}.yaml").read_text()
    defaults = text[: text.index("_self_")] if "_self_" in text else text
    groups = re.findall(r"^  - (?:optional )?(\w+):", defaults, re.M)
    return [
        (group, sorted(p.stem for p in (conf / group).glob("*.yaml")))
        for group in groups
        if (conf / group).is_dir()
    ]


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
    options = [name for name in error.options or [] if not name.endswith("schema")]
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


def _known_keys(conf: Path, verb: str, overrides: list[str]) -> list[str]:
    """Keys of the configuration that the group choices alone give, and the groups."""
    groups = [path.name for path in conf.iterdir() if path.is_dir()]
    choices = [o for o in overrides if o.partition("=")[0] in groups]
    try:
        keys = _flatten(compose(verb, choices))
    except HydraException:
        keys = []
    return sorted({*keys, *groups})


def _below_null(conf: Path, verb: str, overrides: list[str]) -> UsageError | None:
    """The first override of a key below one that is null."""
    for place, override in enumerate(overrides):
        try:
            compose(verb, overrides[: place + 1])
        except AssertionError:
            key = override.partition("=")[0].lstrip("+~")
            *parents, last = key.split(".")[:-1]
            group = conf.joinpath(*parents)
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
