"""The group `data`: options of each datamodule, and the datamodule that they make.

A new one is a class here, its options in `datamodules/options.py`, its datamodule beside them and a
file in `conf/data`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ic.datamodules.options import (
    DataOptions,
    PasskeyDataOptions,
    PreferenceDataOptions,
    SFTDataOptions,
    TextDataOptions,
)
from ic.datamodules.retrieval_options import RetrievalDataOptions

if TYPE_CHECKING:
    from lightning import LightningDataModule
    from transformers import PreTrainedTokenizerBase


class DataConfig(DataOptions, ABC):
    """What a run asks of its data."""

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
        """The datamodule."""


class PasskeyDataConfig(PasskeyDataOptions, DataConfig):
    def build(self, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
        from ic.datamodules.passkey import PasskeyDataModule

        return PasskeyDataModule(self, tokenizer)


class RetrievalDataConfig(RetrievalDataOptions, DataConfig):
    def build(self, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
        from ic.datamodules.retrieval import RetrievalDataModule

        return RetrievalDataModule(self, tokenizer)


class TextDataConfig(TextDataOptions, DataConfig):
    def build(self, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
        from ic.datamodules.text import TextDataModule

        return TextDataModule(self, tokenizer)


class SFTDataConfig(SFTDataOptions, DataConfig):
    def build(self, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
        from ic.datamodules.sft import SFTDataModule

        return SFTDataModule(self, tokenizer)


class PreferenceDataConfig(PreferenceDataOptions, DataConfig):
    def build(self, tokenizer: PreTrainedTokenizerBase) -> LightningDataModule:
        from ic.datamodules.preference import PreferenceDataModule

        return PreferenceDataModule(self, tokenizer)


# By the names that `conf/data` refers to.
DATA_SCHEMAS: dict[str, type[DataConfig]] = {
    "passkey_schema": PasskeyDataConfig,
    "retrieval_schema": RetrievalDataConfig,
    "text_schema": TextDataConfig,
    "sft_schema": SFTDataConfig,
    "preference_data_schema": PreferenceDataConfig,
}
