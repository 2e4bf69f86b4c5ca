"""A score for each sequence instead of a distribution over the next token: for reward models."""

from __future__ import annotations

from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from ic.model.config import MLAConfig
from ic.model.modeling_mla import MLAPreTrainedModel


class MLAForSequenceClassification(GenericForSequenceClassification, MLAPreTrainedModel):
    """`num_labels` scores of the last token that is not padding, by a linear map of `MLAModel`'s
    output.

    The arguments, losses and weight names (`model.*`, `score.weight`) are those of transformers'
    classes of this kind; a checkpoint of `MLAForCausalLM` gives the body its weights.
    """


AutoModelForSequenceClassification.register(MLAConfig, MLAForSequenceClassification)
