"""Overrides, composed by Hydra and turned into checked dataclasses."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ic.config.explain import explain, known_keys, unknown_option, wrong_value
from ic.config.groups import CONF, groups_of, register_schemas
from ic.config.numbers import check_numbers
from ic.config.switched_off import below_null, below_value, switch_on
from ic.config.typed_values import field_type, is_single, spell_values
from ic.errors import UsageError


def compose_config(
    verb: str, schema: type, overrides: list[str], *, check: bool = True
) -> tuple[Any, str]:
    """Compose a verb's configuration -> checked dataclass (None without `check`), and its YAML.

    Args:
        verb: names `conf/<verb>.yaml`.
        schema: its dataclass.
        overrides: as they were typed.

    Raises:
        ValueError: an unknown group, option or key, a value of the wrong type or out of range.
    """
    register_schemas(verb, schema)
    for override in overrides:
        if override.lstrip("+~").startswith(("hydra.", "hydra/")):
            raise UsageError(
                f"{override}: Hydra's own settings have no effect here; a run's folder is "
                "output_dir=, name= and run_id="
            )
    overrides, named = _like_groups(schema, spell_values(schema, overrides))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = switch_on(verb, schema, overrides)
        try:
            cfg = compose(verb, overrides)
            for each in OverridesParser.create().parse_overrides(named):
                OmegaConf.update(cfg, each.key_or_group, each.value())
        except MissingConfigException as error:
            raise unknown_option(error) from error
        except HydraException as error:
            known = known_keys(verb, overrides)
            extended = _extend_tables(overrides, known)
            if extended != overrides:
                return compose_config(verb, schema, [*extended, *named], check=check)
            raise below_value(schema, overrides, known) or explain(error, known) from error
        except OmegaConfBaseException as error:
            known = known_keys(verb, overrides)
            raise below_value(schema, overrides, known) or wrong_value(error) from error
        except AssertionError as error:  # OmegaConf's, for a key below null
            raise below_null(verb, overrides) or error from error
    _refuse_additions(cfg)
    return (to_dataclasses(verb, cfg) if check else None), OmegaConf.to_yaml(cfg)


def to_dataclasses(verb: str, cfg: DictConfig) -> Any:
    """The composed configuration as the verb's dataclass, its checks run."""
    try:
        check_numbers(cfg)
        return OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        key = re.findall(r"full_key: (\S+)", str(error))[0]
        other = " or run=FOLDER" if key == "checkpoint" and "run" in cfg else ""
        raise UsageError(
            f"{verb} needs {key}=...{other}; see python -m ic {verb} --help"
        ) from error
    except OmegaConfBaseException as error:
        raise wrong_value(error) from error


def describe_groups(verb: str) -> dict[str, list[str]]:
    """Every group that the verb's configuration chooses from, each with its options."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return groups_of(verb)


def _like_groups(schema: type, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides, and apart from them those of fields with a group's name, such as `evaluation`
    of `register`: Hydra would take their values for a choice of the group's options.
    """
    names = [each.name for each in fields(schema) if (CONF / each.name).is_dir()]
    names = [name for name in names if is_single(field_type(schema, [name]))]
    apart = [each for each in overrides if each.lstrip("+").partition("=")[0] in names]
    return [each for each in overrides if each not in apart], apart


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
