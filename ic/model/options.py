"""What a model is asked beside its dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field

# What a cache of latents holds: the model's dtype, or codes of one byte with a scale per token.
CACHE_DTYPES = ("auto", "fp8", "int8")
# How torchao scales the operands of an FP8 product, by its own names.
FP8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@dataclass
class AdapterOptions:
    """LoRA (arXiv 2106.09685), with the names of `peft.LoraConfig`.

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout before `lora_A`.
        target_modules: names of the linear layers to adapt.
        use_rslora: scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732).
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    )
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"model.adapter.r={self.r}: must be at least 1")
        if not self.lora_alpha > 0:
            raise ValueError(f"model.adapter.lora_alpha={self.lora_alpha}: must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"model.adapter.lora_dropout={self.lora_dropout}: must be in [0, 1)")
        if not self.target_modules:
            raise ValueError("model.adapter.target_modules is empty: name the layers to adapt")
