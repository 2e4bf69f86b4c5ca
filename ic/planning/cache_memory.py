"""Bytes that the cache of the 1B shape takes, by allocating it: MHA, GQA and MLA.

MHA and GQA hold a key and a value a head; MLA holds one latent and one rotated key, and where it is
quantised a float32 scale beside them. Beside MLA the weights are in fp8 and int4, too. Contexts
that fit a memory limit are computed from the measured bytes a token and the measured weights, and
tried: under the allocator's limit that many tokens must fit, and two per cent more must not.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ic.config.model import ModelConfig
from ic.datamodules.tokenizers import build_tokenizer, vocabulary_size
from ic.files.results import write_results
from ic.model import MLAForCausalLM
from ic.model.config import MLAConfig
from ic.model.quantised_linear import WeightScheme, replace_linear_layers
from ic.planning.options import PlanConfig

CACHE_FILE = "cache-memory.json"
LENGTHS = (4096, 131072, 1048576)
LIMITS_GB = (8, 24, 40, 80)
_GQA_HEADS, _GQA_DIM = 8, 64
# A large buffer takes whole blocks of this from the CUDA caching allocator.
_BLOCK_BYTES = 2 * 2**20
_BF16 = torch.bfloat16
KINDS: dict[str, tuple[str, torch.dtype]] = {
    "MHA, bf16": ("mha", _BF16),
    "GQA, 8 heads of 64, bf16": ("gqa", _BF16),
    "MLA, bf16": ("mla", _BF16),
    "MLA, e4m3": ("mla", torch.float8_e4m3fn),
    "MLA, int8": ("mla", torch.int8),
}
# int8 takes the bytes of fp8.
WEIGHTS = {"bf16": None, "fp8": WeightScheme("fp8"), "int4": WeightScheme("int4", 64)}


def numbers_per_token(config: MLAConfig, kind: str) -> int:
    """Numbers that one layer's cache holds for a token."""
    if kind == "mla":
        return config.latent_dim
    if kind == "gqa":
        return 2 * _GQA_HEADS * _GQA_DIM
    return 2 * config.num_attention_heads * config.v_head_dim


def allocate_cache(
    config: MLAConfig, kind: str, dtype: torch.dtype, tokens: int, device: torch.device
) -> list[Tensor]:
    """One buffer (1, tokens, numbers) a layer, and one of scales (1, tokens) if it is quantised."""
    width = numbers_per_token(config, kind)
    buffers = []
    for _ in range(config.num_hidden_layers):
        buffers.append(torch.empty(1, tokens, width, dtype=dtype, device=device))
        if dtype.itemsize == 1:
            buffers.append(torch.empty(1, tokens, dtype=torch.float32, device=device))
    return buffers


def measure_caches(config: PlanConfig) -> int:
    """Measure on this machine's GPU and write `plan.output`.

    Raises:
        ValueError: no CUDA GPU here.
    """
    if not torch.cuda.is_available():
        raise ValueError("plan.cache=true: PyTorch sees no CUDA GPU here")
    model = ModelConfig().mla_config(vocabulary_size(build_tokenizer("bytes")))
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [
        row
        for weights in WEIGHTS
        for row in cache_rows(model, device, LENGTHS, LIMITS_GB, weights=weights)
    ]
    output = config.plan.output_file(CACHE_FILE)
    write_results(output, {"model": asdict(ModelConfig())}, rows, public=True)
    Console().print(f"cache memory: {output}", soft_wrap=True, highlight=False)
    return 0


def cache_rows(
    config: MLAConfig,
    device: torch.device,
    lengths: tuple[int, ...],
    limits_gb: tuple[int, ...],
    *,
    weights: str = "bf16",
) -> list[dict[str, Any]]:
    """A row for each kind of cache and limit beside these weights, of `WEIGHTS`: bytes by length
    (None where it did not fit), and the largest context. Quantised weights go with MLA alone.
    """
    before = _allocated(device, [])
    model = _weights(config, device, weights)
    held = [*model.parameters(), *model.buffers()]
    weight_bytes = _allocated(device, held) - before
    taken = torch.cuda.memory_reserved(device) if device.type == "cuda" else weight_bytes
    rows: list[dict[str, Any]] = []
    for name, (kind, dtype) in KINDS.items():
        if weights != "bf16" and kind != "mla":
            continue
        cache_bytes: dict[str, int | None] = {}
        for tokens in lengths:
            start = _allocated(device, [])
            try:
                buffers = allocate_cache(config, kind, dtype, tokens, device)
                cache_bytes[str(tokens)] = _allocated(device, buffers) - start
                del buffers
            except torch.OutOfMemoryError:
                cache_bytes[str(tokens)] = None
            _return_memory(device)
        # Of the longest that fitted: what short buffers are rounded up by is a large share of them.
        longest, nbytes = [(n, size) for n, size in cache_bytes.items() if size][-1]
        per_token = nbytes / int(longest)
        for limit in limits_gb:
            blocks = (limit * 10**9 - taken) // config.num_hidden_layers // _BLOCK_BYTES
            blocks -= dtype.itemsize == 1  # two buffers of a layer are rounded up
            room = blocks * _BLOCK_BYTES * config.num_hidden_layers
            fits = int(room / per_token) // 1024 * 1024
            rows.append(
                {
                    "cache": name,
                    "weights": weights,
                    "bytes_per_token": per_token,
                    "cache_bytes_by_tokens": cache_bytes,
                    "weight_bytes": weight_bytes,
                    "limit_gb": limit,
                    "largest_context_tokens": fits,
                    "tried_by_allocation": _try(config, kind, dtype, fits, limit, device),
                }
            )
    return rows


def _weights(config: MLAConfig, device: torch.device, weights: str) -> torch.nn.Module:
    scheme = WEIGHTS[weights]
    with torch.device("meta"):
        model: Any = MLAForCausalLM(config)  # transformers wraps `to` past its types
        if scheme is not None:
            replace_linear_layers(
                model, lambda name: None if name.endswith(("lm_head", "kv_b_proj")) else scheme
            )
    return model.to(_BF16).to_empty(device=device)


def _allocated(device: torch.device, tensors: list[Any]) -> int:
    """The allocator's count; on a CPU, which has none, the tensors' own."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _return_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _try(
    config: MLAConfig, kind: str, dtype: torch.dtype, tokens: int, limit: int, device: torch.device
) -> bool | None:
    """Whether `tokens` fit beside the weights within the limit and 2 % more do not; None where this
    device cannot tell.
    """
    if device.type != "cuda":
        return None
    _, total = torch.cuda.mem_get_info(device)
    if limit * 10**9 > total:
        return None
    torch.cuda.set_per_process_memory_fraction(limit * 10**9 / total, device)
    outcome = []
    try:
        for count in (tokens, tokens * 102 // 100):
            try:
                outcome.append(bool(allocate_cache(config, kind, dtype, count, device)))
            except torch.OutOfMemoryError:
                outcome.append(False)
            _return_memory(device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return outcome == [True, False]
