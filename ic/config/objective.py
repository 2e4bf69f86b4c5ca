"""What a run trains for, and the LightningModule that does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ic.training.options import ObjectiveOptions, OptimizerOptions, PreferenceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ic.model.modeling_mla import MLAForCausalLM
    from ic.training.language_modeling import LanguageModelingModule


class ObjectiveConfig(ObjectiveOptions):
    def build(
        self, model: MLAForCausalLM, tokenizer: PreTrainedTokenizerBase, optimizer: OptimizerOptions
    ) -> LanguageModelingModule:
        from ic.training.language_modeling import LanguageModelingModule

        return LanguageModelingModule(model, tokenizer, optimizer, self)


class PreferenceConfig(PreferenceOptions):
    def build(
        self, model: MLAForCausalLM, tokenizer: PreTrainedTokenizerBase, optimizer: OptimizerOptions
    ) -> LanguageModelingModule:
        from ic.training.preference import PreferenceModule

        return PreferenceModule(model, tokenizer, optimizer, self)
