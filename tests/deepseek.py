"""transformers' DeepSeek-V3 with the weights of a model of ours: the independent side of tests."""

from __future__ import annotations

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from ic.model import MLAForCausalLM


def deepseek_twin(model: MLAForCausalLM, **changes: object) -> DeepseekV3ForCausalLM:
    """Their model of the same sizes and weights; `changes` to its configuration."""
    ours = model.config.to_dict()
    theirs = DeepseekV3Config().to_dict()
    skipped = ("model_type", "architectures", "transformers_version")
    shared = {key: ours[key] for key in theirs if key in ours and key not in skipped}
    twin = DeepseekV3ForCausalLM(DeepseekV3Config(**{**shared, **changes})).eval()
    twin.load_state_dict(model.state_dict())
    return twin
