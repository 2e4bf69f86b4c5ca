"""Chunked prefill and prefix caching on CPUs of which vLLM's own attention takes neither."""

from __future__ import annotations

from typing import Any

OURS = "MLAForCausalLM"


def keep_chunks_and_prefixes() -> None:
    """Let vLLM's platform for CPUs leave our model what our attention can do.

    On a CPU without AMX it turns both off for every model with a latent cache, because its backend
    CPU_MLA reads no context. There is no setting for it: the platform's check is wrapped, once.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config
    if getattr(check, "_keeps", False):
        return

    def checked(cls: Any, vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chunked, prefixes = scheduler.enable_chunked_prefill, cache.enable_prefix_caching
        tokens = scheduler.max_num_batched_tokens
        check(vllm_config)
        if _is_ours(vllm_config):
            scheduler.enable_chunked_prefill, cache.enable_prefix_caching = chunked, prefixes
            scheduler.max_num_batched_tokens = tokens

    checked._keeps = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(checked)


def _is_ours(vllm_config: Any) -> bool:
    model, chosen = vllm_config.model_config, vllm_config.attention_config.backend
    is_chosen = chosen is None or chosen.name == "CUSTOM"
    return is_chosen and model is not None and OURS in (model.architectures or [])
