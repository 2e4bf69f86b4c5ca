"""Which dataclass checks which group of `conf/`."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from ic.config.run import (
    CallbacksConfig,
    LoggerConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
    WandbConfig,
)
from ic.datamodules.options import (
    PasskeyDataOptions,
    PreferenceDataOptions,
    SFTDataOptions,
    TextDataOptions,
)
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.evaluation.registry import suite_config, suite_names
from ic.model.options import AdapterOptions
from ic.parallel.options import StrategyOptions
from ic.training.options import OptimizerOptions, PreferenceOptions


def register_schemas(verb: str, schema: type) -> None:
    """Make the dataclasses known to Hydra under the names that `conf/` refers to.

    Args:
        verb, schema: the root configuration's name and dataclass, known as `<verb>_schema`.
    """
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(name=f"{verb}_schema", node=schema)
    for group, name, node in (
        ("model", "model_schema", ModelConfig),
        ("data", "passkey_schema", PasskeyDataOptions),
        ("data", "text_schema", TextDataOptions),
        ("data", "sft_schema", SFTDataOptions),
        ("data", "preference_data_schema", PreferenceDataOptions),
        ("preference", "preference_schema", PreferenceOptions),
        ("model/adapter", "lora_schema", AdapterOptions),
        ("optimizer", "optimizer_schema", OptimizerOptions),
        ("strategy", "strategy_schema", StrategyOptions),
        ("trainer", "trainer_schema", TrainerConfig),
        ("callbacks", "callbacks_schema", CallbacksConfig),
        ("logger", "logger_schema", LoggerConfig),
        ("logger/wandb", "wandb_schema", WandbConfig),
        ("evaluation", "grid_schema", PasskeyGridConfig),
    ):
        store.store(group=group, name=name, node=node)
    for suite in suite_names():
        store.store(group="suite", name=f"{suite}_schema", node=suite_config(suite))
