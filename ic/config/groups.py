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
from ic.datamodules.passkey import PasskeyDataConfig
from ic.datamodules.preference import PreferenceDataConfig
from ic.datamodules.sft import SFTDataConfig
from ic.datamodules.text import TextDataConfig
from ic.evaluation.passkey.grid import PasskeyGridConfig
from ic.model.adapter import AdapterConfig
from ic.parallel.config import StrategyConfig
from ic.training.optimizers import OptimizerConfig
from ic.training.preference_loss import PreferenceConfig


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
        ("data", "passkey_schema", PasskeyDataConfig),
        ("data", "text_schema", TextDataConfig),
        ("data", "sft_schema", SFTDataConfig),
        ("data", "preference_data_schema", PreferenceDataConfig),
        ("preference", "preference_schema", PreferenceConfig),
        ("model/adapter", "lora_schema", AdapterConfig),
        ("optimizer", "optimizer_schema", OptimizerConfig),
        ("strategy", "strategy_schema", StrategyConfig),
        ("trainer", "trainer_schema", TrainerConfig),
        ("callbacks", "callbacks_schema", CallbacksConfig),
        ("logger", "logger_schema", LoggerConfig),
        ("logger/wandb", "wandb_schema", WandbConfig),
        ("evaluation", "grid_schema", PasskeyGridConfig),
    ):
        store.store(group=group, name=name, node=node)
