"""The entry point `vllm.general_plugins`: makes vLLM know our architecture and our attention.

vLLM calls `register` in every process that it starts, and in some of them more than once.
"""

from __future__ import annotations

import logging

from ic.serving.vllm_plugin.cpu import OURS, keep_chunks_and_prefixes
from ic.serving.vllm_plugin.orphans import end_with_server
from ic.serving.vllm_plugin.versions import installed, refusal

MODEL = "ic.serving.vllm_plugin.model:MLAForCausalLM"
BACKEND = "ic.serving.vllm_plugin.backend.LatentBackend"
PREFILL = "ic.serving.vllm_plugin.backend.OwnPrefill"


def register() -> None:
    """Register the configuration, the model and, under the name CUSTOM, both parts of attention.

    With a version of vLLM that the plugin does not know it registers nothing and says so in one
    line: other models then load as without it.
    """
    why_not = refusal(installed())
    if why_not is not None:
        logging.getLogger("vllm").warning("%s. Our models are not registered.", why_not)
        return
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.transformers_utils import model_arch_config_convertor as architectures
    from vllm.v1.attention.backends.mla.prefill.registry import (
        MLAPrefillBackendEnum,
        register_mla_prefill_backend,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from ic.model import MLAConfig  # `AutoConfig` knows it from then on

    class LatentAttention(architectures.ModelArchConfigConvertorBase):
        """vLLM asks a closed list of types which models have a latent cache."""

        def is_deepseek_mla(self) -> bool:
            return True

    architectures.MODEL_ARCH_CONFIG_CONVERTORS[MLAConfig.model_type] = LatentAttention
    ModelRegistry.register_model(OURS, MODEL)
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, PREFILL)
    end_with_server()
    if current_platform.is_cpu():
        keep_chunks_and_prefixes()
