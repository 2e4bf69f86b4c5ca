"""transformers' common model tests on our classes, and on DeepSeek-V3's beside them.

What is excepted for DeepSeek-V3 shows which tests do not fit a dense MLA model at all.
"""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
)

from ic.model import MLAConfig, MLAForCausalLM, MLAForSequenceClassification, MLAModel
from tests.upstream.generation import GenerationContracts
from tests.upstream.mixins import ModelTesterMixin, TrainingTesterMixin, except_for

pytestmark = pytest.mark.upstream

LENGTH = "lengths beyond max_position_embeddings are refused"
ROTATION = "takes the rotation's own interface: ours takes positions alone, and halves the angles"
NO_EXPERTS = "about experts, which a dense model lacks"


class ModelTester:
    """What transformers' tests ask about the model that they are to make."""

    batch_size, seq_length, is_training = 2, 16, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, config_class: Any, model_classes: tuple[Any, ...]) -> None:
        self.config_class = config_class
        self.base_model_class, self.causal_lm_class, self.sequence_class = model_classes

    def get_config(self) -> Any:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            first_k_dense_replace=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin, GenerationContracts, TrainingTesterMixin):
    config_class: Any

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.config_class, self.all_model_classes)


@except_for(
    {
        "test_model_rope_scaling_from_config_0_linear": LENGTH,
        "test_model_rope_scaling_from_config_1_dynamic": LENGTH,
        "test_model_rope_scaling_from_config_2_yarn": LENGTH,
        "test_model_rope_scaling_frequencies": ROTATION,
    }
)
class MLATest(Common, unittest.TestCase):
    config_class = MLAConfig
    all_model_classes = (MLAModel, MLAForCausalLM, MLAForSequenceClassification)


class ConvertedTest(MLATest):
    """The same with attention that was another: repeated frequencies, norms of heads, biases."""

    def setUp(self) -> None:
        super().setUp()
        changes = {
            "q_lora_rank": None,
            "qk_nope_head_dim": 0,
            "attention_bias": True,
            "latent_norm": False,
            "rope_repeats": 2,
            "query_bias": True,
            "qk_norm_dim": 8,
        }
        plain = self.model_tester.get_config().to_dict()
        self.model_tester.get_config = lambda: MLAConfig.from_dict({**plain, **changes})


@except_for(
    {
        "test_eager_matches_batched_and_grouped_inference_0_fp16": NO_EXPERTS,
        "test_eager_matches_batched_and_grouped_inference_1_fp32": NO_EXPERTS,
        "test_eager_matches_batched_and_grouped_inference_2_bf16": NO_EXPERTS,
        "test_keep_in_fp32_modules_exist": NO_EXPERTS,
        "test_output_router_logits_from_config": NO_EXPERTS,
        "test_reverse_loading_mapping": NO_EXPERTS,
    }
)
class DeepseekV3Test(Common, unittest.TestCase):
    config_class = DeepseekV3Config
    all_model_classes = (
        DeepseekV3Model,
        DeepseekV3ForCausalLM,
        DeepseekV3ForSequenceClassification,
    )
