"""What is wrong with flags and overrides, in one line that names the nearest valid key."""

from __future__ import annotations

import re
from typing import Any

from hydra import compose
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ic.config.groups import groups_of, options_of
from ic.errors import UsageError


def unknown_option(error: MissingConfigException) -> UsageError:
    """An option that its group does not have."""
    group, _, given = (error.missing_cfg_file or "").rpartition("/")
    return UsageError.unknown(group or "configuration", given, options_of(group))


def explain(error: HydraException, known: list[str]) -> ValueError:
    """A key that is not there, or whatever else Hydra refused.

    Args:
        known: every key that is there.
    """
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = str(error)
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", message):
        key = match.group(1).partition("=")[0].lstrip("+~@")
        if "struct" in message or "No match" in message or "Key" in str(cause):
            return UsageError.unknown("key", key, known)
    if isinstance(cause, OmegaConfBaseException):
        return wrong_value(cause)
    given = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
    return UsageError(given + message.partition("\nSee ")[0])


def known_keys(verb: str, overrides: list[str]) -> list[str]:
    """Keys of the configuration that the group choices alone give, and the groups."""
    groups = groups_of(verb)
    choices = [o for o in overrides if o.partition("=")[0] in groups]
    try:
        keys = _flatten(compose(verb, choices))
    except HydraException:
        keys = []
    return sorted({*keys, *groups})


def _flatten(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none():
        return [prefix]
    keys = [prefix] if prefix else []
    for key in node:
        keys += _flatten(node._get_node(key), f"{prefix}.{key!s}" if prefix else str(key))
    return keys


def wrong_value(error: OmegaConfBaseException) -> ValueError:
    """A value of the wrong type, or one that a dataclass refused."""
    cause = error.__cause__
    if isinstance(cause, ValueError) and not isinstance(cause, OmegaConfBaseException):
        return cause
    key = f"{error.full_key}: " if error.full_key else ""
    return UsageError(f"{key}{(error.msg or str(error)).splitlines()[0]}")
