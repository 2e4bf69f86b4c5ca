"""The cache and the mask that transformers' `generate` works with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from ic.model.cache import PAGE_TOKENS, LatentCache
from ic.model.config import MLAConfig


class LatentGenerationMixin(GenerationMixin):
    """`GenerationMixin` of a model whose `model.new_cache` makes caches of latents."""

    config: MLAConfig
    model: Any

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give `generate` a `LatentCache` of the final size, or a `StaticLatentCache` with
        `cache_implementation="static"`, unless the caller chose a cache.

        Raises:
            ValueError: a cache with rows of unequal length, to which `generate` would give the
                positions of the longest.
        """
        given = model_kwargs.get("past_key_values")
        if isinstance(given, LatentCache) and given.is_ragged:
            raise ValueError(
                "generate takes a cache with rows of equal length; decode unequal ones by forward"
            )
        kind = generation_config.cache_implementation
        makes_one = given is None and generation_config.use_cache
        if makes_one and kind is None:
            model_kwargs["past_key_values"] = self.model.new_cache(max_cache_length)
        elif makes_one and kind == "static":
            tokens = max(max_cache_length, generation_config.max_cache_len or 0)
            whole_pages = -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
            model_kwargs["past_key_values"] = self.model.new_static_cache(
                whole_pages if whole_pages <= self.config.max_position_embeddings else tokens
            )
        else:
            parent: Any = super()  # typed for a protocol that subclasses do not name
            parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    @staticmethod
    def create_masks_for_generate(
        config: MLAConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask that `generate` gives with a static cache: none where nothing is padded, because
        the number of cached tokens then says all; the plain one for a prefill; for decoding a
        whole one, of the same shape in each step.
        """
        if attention_mask is None or bool(attention_mask.all()):
            return None
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        whole: Tensor = create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, **kwargs
        )
        return whole
