"""The reference of all keys, for `docs/configuration.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ic.config.data import DATA_SCHEMAS
from ic.config.groups import MODEL_SCHEMAS
from ic.config.meaning import Key, keys_of
from ic.config.run import RunConfig
from ic.evaluation.registry import suite_config, suite_names

_MODELS = {
    "model_schema": "`model`, of the other presets",
    "pretrained_schema": "`model=pretrained`",
}


def configuration_reference(verbs: Mapping[str, type]) -> str:
    """A table for each part of a run, each kind of data, each suite and each verb's own keys.

    Args:
        verbs: each verb's dataclass.
    """
    run = [key for key in keys_of(RunConfig) if not key.name.startswith("data.")]
    common = {key.name for key in run}
    parts = dict.fromkeys(key.name.partition(".")[0] for key in run if "." in key.name)
    sections = [_section("A run", (key for key in run if "." not in key.name))]
    for part in parts:
        below = (key for key in run if key.name.startswith(f"{part}."))
        sections.append(_section(f"`{part}`", below))
        if part == "model":
            for name, model in MODEL_SCHEMAS.items():
                own = [key for key in keys_of(model, "model.") if key.name not in common]
                sections.append(_section(_MODELS[name], own))
    for kind in DATA_SCHEMAS.values():
        sections.append(_section(f"`data={kind.name}`", keys_of(kind, "data.")))
    for suite in suite_names():
        if suite != "passkey":  # its options stand under `evaluation`
            sections.append(_section(f"`suite={suite}`", keys_of_suite(suite)))
    known = {key.name for key in run}
    for verb, schema in verbs.items():
        own = list(keys_of(schema))
        if issubclass(schema, RunConfig):
            own = [key for key in own if key.name not in known and key.name[:5] != "data."]
        if own:
            sections.append(_section(f"The verb `{verb}`", own))
    return "\n\n".join(sections)


def keys_of_suite(name: str) -> Iterator[Key]:
    """The options of a suite, as `suite.NAME.option`."""
    return keys_of(suite_config(name), f"suite.{name}.")


def _section(title: str, keys: Iterable[Key]) -> str:
    lines = [f"### {title}", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = f"`{key.default}`" if key.default else ""
        cells = (f"`{key.name}`", key.kind, default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
