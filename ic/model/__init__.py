"""The MLA language model."""

from ic.model.cache import LatentCache
from ic.model.config import MLAConfig
from ic.model.modeling_mla import MLAForCausalLM, MLAModel

__all__ = ["LatentCache", "MLAConfig", "MLAForCausalLM", "MLAModel"]
