"""The groups of `conf/`: their options, and which dataclass checks which group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from ic.config.callbacks import CallbacksConfig, ContextLengthConfig, PasskeyEvaluationConfig
from ic.config.data import DATA_SCHEMAS
from ic.config.logger import LoggerConfig, MLflowConfig, WandbConfig
from ic.config.model import BaseModelConfig, ModelConfig
from ic.config.objective import DistillationConfig, PreferenceConfig
from ic.config.pretrained_model import PretrainedModelConfig
from ic.config.run import RunConfig
from ic.config.strategy import StrategyConfig
from ic.config.trainer import TrainerConfig
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.evaluation.registry import suite_config, suite_names
from ic.model.options import AdapterOptions
from ic.serving.cost.options import PriceOptions
from ic.training.options import OptimizerOptions

MODEL_SCHEMAS: dict[str, type[BaseModelConfig]] = {
    "model_schema": ModelConfig,
    "pretrained_schema": PretrainedModelConfig,
}
CONF = Path(__file__).absolute().parents[1] / "conf"


def register_schemas(verb: str, schema: type) -> None:
    """Make the dataclasses known to Hydra under the names that `conf/` refers to.

    Args:
        verb, schema: the root configuration's name and dataclass, known as `<verb>_schema`.
    """
    ConfigStore.instance().store(name=f"{verb}_schema", node=schema)
    _register_parts()


@cache
def _register_parts() -> None:
    """Once per process: Hydra reads every field of every class, which takes half a second."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, name, node in (
        *(("model", name, node) for name, node in MODEL_SCHEMAS.items()),
        *(("data", name, node) for name, node in DATA_SCHEMAS.items()),
        ("preference", "preference_schema", PreferenceConfig),
        ("distillation", "distillation_schema", DistillationConfig),
        ("model/adapter", "lora_schema", AdapterOptions),
        ("optimizer", "optimizer_schema", OptimizerOptions),
        ("strategy", "strategy_schema", StrategyConfig),
        ("trainer", "trainer_schema", TrainerConfig),
        ("callbacks", "callbacks_schema", CallbacksConfig),
        ("callbacks/context_length", "context_length_schema", ContextLengthConfig),
        ("callbacks/passkey", "passkey_callback_schema", PasskeyEvaluationConfig),
        ("logger", "logger_schema", LoggerConfig),
        ("logger/wandb", "wandb_schema", WandbConfig),
        ("logger/mlflow", "mlflow_schema", MLflowConfig),
        ("evaluation", "grid_schema", PasskeyGridConfig),
        ("cost", "prices_schema", PriceOptions),
    ):
        store.store(group=group, name=name, node=node)
    for suite in suite_names():
        store.store(group="suite", name=f"{suite}_schema", node=suite_config(suite))


def model_schema(model: Mapping[str, Any]) -> str:
    """The name of the schema that a composed or saved part `model` has."""
    return "pretrained_schema" if "shape" in model else "model_schema"


def part_schemas(composed: Mapping[str, Any]) -> dict[str, type]:
    """Which class checks the parts `data` and `model` of a composed or saved configuration, if it
    has them: the two whose options have a class each.
    """
    found: dict[str, type] = {}
    data, model = composed.get("data"), composed.get("model")
    if isinstance(data, Mapping):
        kinds = {kind.name: kind for kind in DATA_SCHEMAS.values()}
        if (kind := kinds.get(str(data.get("name")))) is not None:
            found["data"] = kind
    if isinstance(model, Mapping):
        found["model"] = MODEL_SCHEMAS[model_schema(model)]
    return found


def groups_of(verb: str) -> dict[str, list[str]]:
    """Every group that a verb's configuration chooses from, each with its options; an optional
    group that has none here is left out. Hydra must know the folder `CONF`.
    """
    loader = GlobalHydra.instance().config_loader()
    chosen = loader.compute_defaults_list(verb, [], RunMode.RUN).overrides.known_choices
    groups = sorted(group for group in chosen if not group.startswith("hydra/"))
    return {group: options for group in groups if (options := options_of(group))}


def options_of(group: str) -> list[str]:
    """What may be chosen of a group, in the order of the alphabet.

    Its files. Hydra's own list also holds our schemas, and copies all that Hydra knows.
    """
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
