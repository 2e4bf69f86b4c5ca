"""Values out of every field's type and range: one line that names the key, never a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ic.cli import find_verbs
from ic.config.compose import to_dataclasses
from ic.config.explain import wrong_value
from ic.config.groups import CONF, register_schemas
from ic.config.run import RunConfig
from ic.config.typed_values import spell_values
from ic.errors import one_line
from tests.config.schema import walk

LONG = "x" * 5000
NESTED = '{"a": {"b": [1, {"c": null}]}}'
VALUES: dict[Any, tuple[str, ...]] = {
    int: ("-1", "0", "1", "1" + "0" * 30, "9" * 5000, "nan", "1.5", "", "x", "null", "[1]", NESTED),
    float: ("-1", "0", "1", "nan", "-inf", "1e300", "1e-300", "", "x", "null", "[1]", NESTED),
    bool: ("2", "", "x", "null", "[true]", NESTED),
    str: ("", " ", LONG, "../x", "größe", "null", "two\nlines", "[1]", NESTED, "${seed}", "a/b"),
    list: ("[]", "[[1]]", "x", "null", "[null]", "[-1]", "[1e30]", "[nan]", "[x,x]", NESTED, "[a"),
    dict: ("{}", "{a: 1}", "x", "null", "[1]", "{1: -1}", "{1: nan}", "{1: [x]}", NESTED, "{a"),
    Any: ("-1", "0", "nan", "", LONG, "null", "[]", "[-1]", "[[1]]", "{}", NESTED, "[a"),
}
DATA = {
    "passkey": ["data=passkey"],
    "text": ["data=text", "callbacks.context_length=null"],
    "sft": ["data=sft", "callbacks.context_length=null"],
    "preference": ["data=preference", "preference=dpo", "callbacks.context_length=null"],
}


def values_of(declared: Any) -> tuple[str, ...]:
    """What is tried on a field of this type."""
    kinds = [kind for kind in (get_args(declared) or (declared,)) if kind is not type(None)]
    kind = declared if get_origin(declared) in (list, dict) else kinds[0]
    return VALUES.get(get_origin(kind) or kind, VALUES[Any])


def composed(verb: str, schema: type, choices: list[str]) -> DictConfig:
    register_schemas(verb, schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, choices)


def complaint(verb: str, schema: type, cfg: DictConfig, override: str) -> str | None:
    """What the command line would say to an override of one key: as `compose_config`, without
    composing anew.
    """
    cfg = cfg.copy()
    try:
        for spelled in spell_values(schema, [override]):
            parsed = OverridesParser.create().parse_override(spelled)
            OmegaConf.update(cfg, parsed.key_or_group, parsed.value(), merge=True)
        config = to_dataclasses(verb, cfg)
        if isinstance(config, RunConfig):
            config.model.mla_config(320)
    except HydraException as error:
        return one_line(error)
    except OmegaConfBaseException as error:
        return one_line(wrong_value(error))
    except ValueError as error:
        return one_line(error)
    except OSError as error:  # a path that no file system takes; the command line names it
        if error.errno != errno.ENAMETOOLONG:
            raise
        return override.partition("=")[0]
    return None


def check(verb: str, schema: type, choices: list[str], keys: Iterator[tuple[str, Any]]) -> int:
    cfg, tried, faults = composed(verb, schema, choices), 0, []
    for key, declared in keys:
        for value in values_of(declared):
            tried += 1
            shown = f"{key}={value[:40]}"
            try:
                said = complaint(verb, schema, cfg, f"{key}={value}")
            except Exception as error:  # what the command line would show as a traceback
                faults.append(f"{shown}: {type(error).__name__}: {error}")
                continue
            if said is not None and key.rpartition(".")[2] not in said:
                faults.append(f"{shown}: the key is not named: {said}")
            if said is not None and len(said) > 1000:
                faults.append(f"{shown}: {len(said)} characters")
    assert faults == [], "\n".join(map(str, faults))
    return tried


ON = ["model/adapter=lora", "logger=wandb", "callbacks=profiler", "callbacks.prometheus={}"]


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_every_key_of_a_run(data: str) -> None:
    choices = [*DATA[data], *ON]
    cfg = composed("fit", RunConfig, choices)
    # The parts that do not depend on the data are tried once.
    parts = ("data.",) if data != "passkey" else ("",)
    parts = (*parts, "preference.") if data == "preference" else parts
    there = (
        (key, declared)
        for key, declared in walk(RunConfig)
        if key.startswith(parts)
        and (key.startswith("preference.") == (data == "preference" and "data." not in key))
        and OmegaConf.select(cfg, key.rpartition(".")[0] or "trainer") is not None
        and key.rpartition(".")[2] in (OmegaConf.select(cfg, key.rpartition(".")[0]) or cfg)
    )
    assert check("fit", RunConfig, choices, there) > 80


# What a verb asks for beside its required keys, or in a required key other than a file.
GIVEN = {
    "ab_route": ["++versions={a:{urls:[http://x],weight:50},b:{urls:[http://y],weight:50}}"],
    "benchmark_serving": ["checkpoint=x"],
    "promote": ["name=x", "judged_by=passkey", "at_least=0.5"],
    "quantize": ["scheme=int8"],
    "register": ["name=x", "run=x"],
}
OTHERS = [name for name, verb in find_verbs().items() if verb.module.Config is not RunConfig]


@pytest.mark.parametrize("name", OTHERS)
def test_every_key_of_a_verb(name: str) -> None:
    schema = find_verbs()[name].module.Config
    needed = [
        f"{key}=x.jsonl"
        for key, field in schema.__dataclass_fields__.items()
        if field.default == "???" and field.type in ("str", str)
    ]
    needed += GIVEN.get(name, [])
    for key, value in (("files", "[x.txt]"), ("books", "[x]"), ("text", "[x.txt]")):
        needed += [f"{key}={value}"] if key in schema.__dataclass_fields__ else []
    keys = ((key, kind) for key, kind in walk(schema) if key not in dict(walk(RunConfig)))
    check(name, schema, needed, keys)
