"""Time and memory of a training step: ours, ours with FP8 products, and transformers' DeepSeek-V3.

All sides begin with the same weights (without length temperature, which transformers does not
have), see the same random tokens and train with AdamW, in bfloat16 over float32 weights (float32 on
a CPU). Each side of each length runs in a process of its own, so that neither meets what the other
left; a side that runs out of memory, or whose package is missing, gets a row that says so. The loss
of the first step says whether two sides compute the same.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ic.config.compose import compose_config
from ic.config.run import RunConfig
from ic.files.results import write_results
from ic.machine.devices import device_name
from ic.machine.gpus import find_gpu
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.backends import gpu_capability
from ic.model.byte_tokenizer import ByteTokenizer
from ic.model.cost import train_flops_per_token
from ic.model.fp8 import use_fp8
from ic.studies.benchmark_training_options import SIDES, TRANSFORMERS, TrainingBenchmarkOptions

_OUT_OF_MEMORY = "out of memory"
# The fastest first of what takes the widths.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def benchmark_training(options: TrainingBenchmarkOptions) -> int:
    """Measure every length on every side; the results file is written anew after each.

    With `side`, measure that side of the one length in this process and print its row.

    Returns:
        1 if a side failed by anything but memory, else 0.
    """
    if options.side is not None:
        print(json.dumps(_measure(options)))
        return 0
    rows: list[dict[str, Any]] = []
    command = "python -m ic " + shlex.join(sys.argv[1:])
    for length in options.lengths:
        for side in options.sides or SIDES:
            rows.append(_in_own_process(replace(options, lengths=[length], side=side)))
            print(json.dumps(rows[-1]), flush=True)
            write_results(Path(options.output), asdict(options), rows, command, public=True)
    print(f"results: {options.output}")
    return int(any(row.get("error", _OUT_OF_MEMORY) != _OUT_OF_MEMORY for row in rows))


def _in_own_process(options: TrainingBenchmarkOptions) -> dict[str, Any]:
    given = {name: value for name, value in asdict(options).items() if name != "sides"}
    command = [sys.executable, "-m", "ic", "benchmark", "training"]
    for key, value in given.items():
        text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else value
        command.append(f"{key}={text}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"side": options.side, "length_tokens": options.lengths[0]}
    if done.returncode == 0:
        return {**row, **json.loads(done.stdout.splitlines()[-1])}
    if "OutOfMemoryError" in done.stderr:
        return {**row, "error": _OUT_OF_MEMORY}
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {**row, "error": lines[-1][:500]}


def _measure(options: TrainingBenchmarkOptions) -> dict[str, Any]:
    """One side at one length, in this process."""
    (length,) = options.lengths
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    rows = options.tokens_per_batch // length
    model, loss_of = _build(options, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu)
    rng = torch.Generator().manual_seed(0)
    losses, times_s = [], []
    for _ in range(options.warmup + options.steps):
        ids = torch.randint(options.vocab_size, (rows, length), generator=rng).to(device)
        _synchronize(on_gpu)
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            loss = loss_of(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(on_gpu)
        times_s.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    timed = times_s[options.warmup :]
    median = statistics.median(timed)
    tokens_per_s = options.tokens_per_batch / median
    gpu = find_gpu(device_name(device))
    flops = train_flops_per_token(_model_config(options), length)
    return {
        "device": device_name(device),
        "n": len(timed),
        "step_median_s": round(median, 4),
        "step_min_s": round(min(timed), 4),
        "step_max_s": round(max(timed), 4),
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu": None if gpu is None else round(flops * tokens_per_s / gpu.peak_bf16_flops, 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _model_config(options: TrainingBenchmarkOptions) -> MLAConfig:
    composed, _ = compose_config("fit", RunConfig, [f"model={options.preset}"])
    tokenizer = ByteTokenizer()
    config: MLAConfig = composed.model.mla_config(
        options.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    values = config.to_dict() | {"length_temperature": "none"}
    if options.side != TRANSFORMERS:
        for part in ("attention", "norm", "rope"):
            values[f"{part}_backend"] = getattr(options, part)
    return MLAConfig.from_dict(values)


def _build(
    options: TrainingBenchmarkOptions, device: torch.device
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The side's model with the weights of all sides, and its mean loss of a batch of ids."""
    torch.manual_seed(0)
    config = _model_config(options)
    ours: Any = MLAForCausalLM(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            if not parameter.any():  # outputs that begin at zero would hide what a layer computes
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    if options.side == TRANSFORMERS:
        theirs = _deepseek(config, ours).to(device).train()
        run: Any = torch.compile(theirs) if options.compile else theirs

        def loss_of_theirs(ids: Tensor) -> Tensor:
            # Left alone, PyTorch prefers its memory-efficient attention to cuDNN's where queries
            # are wider than values.
            with sdpa_kernel(_ATTENTION, set_priority=True):
                loss: Tensor = run(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

        return theirs, loss_of_theirs
    ours = ours.to(device).train()
    if options.side != "ours":
        recipe = str(options.side).removeprefix("fp8 ")
        capability = gpu_capability("auto")
        use_fp8(ours, recipe, capability, options.fp8_keep_layers, options.fp8_keep)
    if options.compile:
        for layer in ours.model.layers:
            layer.compile(dynamic=False)

    def loss_of(ids: Tensor) -> Tensor:
        sums = ours.target_sums(ids, ids)
        assert sums.all_tokens is not None
        return sums.all_tokens / (ids.numel() - len(ids))

    return ours, loss_of


def _deepseek(config: MLAConfig, weights: nn.Module) -> nn.Module:
    """transformers' DeepSeek-V3 of these sizes with our weights, every feed-forward layer dense."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
        *("qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("rope_parameters", "rope_interleave", "tie_word_embeddings"),
    )
    values: dict[str, Any] = {name: getattr(config, name) for name in sizes} | {
        "num_key_value_heads": config.num_attention_heads,
        "first_k_dense_replace": config.num_hidden_layers,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    theirs.load_state_dict(weights.state_dict())
    return theirs


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
