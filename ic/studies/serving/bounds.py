"""What the hardware allows at best: a decode step reads the weights and its rows' caches once.

The bandwidth is that of a copy on the same GPU, measured in the same process. MFU's denominator is
the datasheet's rate, as everywhere in this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ic.kernels.benchmark_timing import measure_ceilings
from ic.machine.gpus import find_gpu
from ic.model import MLAForCausalLM
from ic.model.cost import forward_flops_per_token
from ic.model.paged_cache import cache_token_bytes
from ic.model.quantised_latents import code_dtype


@dataclass(frozen=True)
class Bounds:
    """Of one model on one GPU.

    Attributes:
        weight_bytes: that a decode step reads: all but the embedding, of which it reads a few rows.
        cache_bytes_per_token: of all layers.
        copy_bytes_per_s: read and written by a copy.
        peak_flops: bf16, dense; None for a GPU that is not in the table.
    """

    model: MLAForCausalLM
    weight_bytes: int
    cache_bytes_per_token: int
    copy_bytes_per_s: float
    peak_flops: float | None

    def decode_tokens_per_s(self, batch: int, visible_tokens: float) -> float:
        """Tokens per second of all rows, if each step took the time to read its bytes."""
        step_bytes = self.weight_bytes + batch * visible_tokens * self.cache_bytes_per_token
        return batch * self.copy_bytes_per_s / step_bytes

    def prefill_mfu(self, prompt_tokens: int, tokens_per_s: float) -> float | None:
        """Share of the peak that reading prompts of this length at this rate uses."""
        if self.peak_flops is None:
            return None
        flops = forward_flops_per_token(self.model.config, prompt_tokens)
        return flops * tokens_per_s / self.peak_flops


def measure_bounds(model: MLAForCausalLM) -> Bounds | None:
    """The bounds of a model; None if it is not on a GPU."""
    if model.device.type != "cuda":
        return None
    ceilings = measure_ceilings(model.device)
    torch.cuda.empty_cache()
    gpu = find_gpu(torch.cuda.get_device_name(model.device))
    return Bounds(
        model,
        weight_bytes(model),
        cache_bytes(model),
        ceilings["copy_tb_per_s"] * 1e12,
        None if gpu is None else gpu.peak_bf16_flops,
    )


def weight_bytes(model: MLAForCausalLM) -> int:
    """Bytes of the weights that a decode step reads."""
    embedding = model.get_input_embeddings().weight
    tied = model.lm_head.weight is embedding
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values() if tied or x is not embedding)


def cache_bytes(model: MLAForCausalLM) -> int:
    """Bytes of one token in the caches of all layers."""
    config = model.config
    codes = code_dtype(config.cache_dtype)
    return cache_token_bytes(config, model.dtype, codes)
