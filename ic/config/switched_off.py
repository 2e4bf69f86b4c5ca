"""Parts of the configuration that are null: switched on by a table, refused below.

A key below one that holds a value, such as `optimizer.lr.x`, is refused here too.
"""

from __future__ import annotations

from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from ic.config.groups import CONF, groups_of, options_of
from ic.config.typed_values import field_type, is_single, part_type
from ic.errors import UsageError

_GROUP = "switched_on"


def switch_on(verb: str, schema: type, overrides: list[str]) -> list[str]:
    """Overrides in which each `part={}` switches its part on, with the defaults of its dataclass.

    `spell_values` writes it before the keys of a table. Hydra alone would leave the part null.
    """
    wanted = [o.removesuffix("={}").lstrip("+") for o in overrides if o.endswith("={}")]
    parts = {key: kind for key in wanted if (kind := part_type(schema, key)) is not None}
    if not parts:
        return overrides
    groups = groups_of(verb)
    chosen = compose(verb, [o for o in overrides if o.partition("=")[0] in groups])
    # What an override before the table has switched off is on again.
    given = [
        o
        for place, o in enumerate(overrides)
        if o.removesuffix("=null") not in parts
        or f"{o.removesuffix('=null')}={{}}" not in overrides[place:]
    ]
    for key, kind in parts.items():
        if OmegaConf.select(chosen, key) is None:
            group = f"{_GROUP}/{key.replace('.', '/')}"
            ConfigStore.instance().store(group=group, name="defaults", node=kind)
            given.append(f"+{group}@{key}=defaults")
    return given


def below_null(verb: str, overrides: list[str]) -> UsageError | None:
    """The first override of a key below one that is null."""
    for place, override in enumerate(overrides):
        try:
            compose(verb, overrides[: place + 1])
        except AssertionError:
            key, _, value = override.lstrip("+~").partition("=")
            *parents, last = key.split(".")[:-1]
            part = ".".join([*parents, last])
            group = "/".join(parents)
            switch = ""
            if (CONF / group / f"{last}.yaml").is_file():
                switch = f", choose {group}={last}"
            elif options := options_of("/".join([*parents, last])):
                switch = f", choose {'/'.join([*parents, last])}={'|'.join(options)}"
            table = f"{part}={{{key.rpartition('.')[2]}: {value}}}"
            return UsageError(
                f"{override}: {part} is null (switched off) here, so there is nothing to set; "
                f"leave it out{switch} or switch it on with {table!r}"
            )
    return None


def below_value(schema: type, overrides: list[str], known: list[str]) -> UsageError | None:
    """The first override of a key below one that holds a single value or a list.

    Args:
        known: every key that is there.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        path = key.split(".")
        if any(is_single(field_type(schema, path[:end])) for end in range(1, len(path))):
            return UsageError.unknown("key", key, known)
    return None
