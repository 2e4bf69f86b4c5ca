"""The model on our kernels equals the model on PyTorch's: interpreted on a CPU, native on a GPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from ic.datamodules.options import PasskeyDataOptions
from ic.datamodules.passkey import make_batch
from ic.files.results import write_results
from ic.model import LatentCache, MLAForCausalLM, sdpa

DIMS = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "length_temperature": "ssmax",
}
ATTENTION, NORM, ROPE = ({f"{name}_backend": "triton"} for name in ("attention", "norm", "rope"))
# Grouped-query attention written as MLA without loss.
CONVERTED = {
    "q_lora_rank": None,
    "query_bias": True,
    "attention_bias": True,
    "latent_norm": False,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 32,
    "rope_repeats": 2,
    "rope_interleave": False,
    "qk_norm_dim": 16,
}
# Some frequencies of a wider head, and a row of the cache narrower than its tile.
NARROW = {"kv_lora_rank": 24, "rope_pairs": [0, 0, 3, 4, 9, 17, 20, 31], "rope_pairs_dim": 64}
SWITCHES: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "norm": NORM,
    "rope": ROPE,
    "all": ATTENTION | NORM | ROPE,
    "half_split": ATTENTION | NORM | ROPE | {"rope_interleave": False},
    "nope_layer": ATTENTION | NORM | ROPE | {"nope_layers": [1]},
    "qk_norm": ATTENTION | NORM | ROPE | {"qk_norm_dim": 8, "rope_repeats": 2},
    "narrow": ATTENTION | NORM | ROPE | NARROW,
    "converted": ATTENTION | NORM | ROPE | CONVERTED,
}
TOLERANCE = 1e-4
Pair = list[MLAForCausalLM]


class Kernels(TorchDispatchMode):
    """Names of our operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ic":
            self.names.append(func._schema.name.removeprefix("ic::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=SWITCHES)
def switch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(make_model: Callable[..., MLAForCausalLM], device: torch.device, switch: str) -> Pair:
    changes = SWITCHES[switch]
    on_torch = {k: v for k, v in changes.items() if not k.endswith("backend")}
    return [make_model(**{**DIMS, **c}).to(device) for c in (on_torch, changes)]


def tokens(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0)).to(device)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().float(), expected.detach().float()
    return float((got - expected).norm() / expected.norm())


def assert_same_gradients(pair: Pair) -> None:
    expected = dict(pair[0].named_parameters())
    for name, parameter in pair[1].named_parameters():
        assert error(parameter.grad, expected[name].grad) < TOLERANCE, name


@pytest.mark.parametrize(
    ("switch", "documents"),
    [
        ("all", False),
        ("qk_norm", False),
        ("converted", False),
        ("narrow", False),
        *((name, True) for name in ("attention", "norm", "rope", "all")),
    ],
    indirect=["switch"],
)
def test_training(pair: Pair, device: torch.device, documents: bool) -> None:
    x = tokens(device, 2, 45)
    ids = torch.tensor([[0] * 17 + [1] + [2] * 27, [0] * 45], dtype=torch.int32, device=device)
    kwargs = {"document_ids": ids} if documents else {}
    outputs = [model(x, labels=x, **kwargs) for model in pair]
    assert error(outputs[1].logits, outputs[0].logits) < TOLERANCE
    assert abs(float(outputs[1].loss.detach() - outputs[0].loss.detach())) < TOLERANCE
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(pair)


@pytest.mark.parametrize("switch", ["all"], indirect=True)
def test_gradient_checkpointing(pair: Pair, device: torch.device) -> None:
    x = tokens(device, 1, 33)
    pair[1].gradient_checkpointing_enable({"use_reentrant": False})
    for model in pair:
        model.train()(x, labels=x, skip_logits=True).loss.backward()
    assert_same_gradients(pair)


@pytest.mark.parametrize("switch", ["all"], indirect=True)
def test_optimizer_steps(pair: Pair, device: torch.device) -> None:
    x = tokens(device, 2, 1, 17)
    curves = [train(model, [(batch, None) for batch in x], dtype=None) for model in pair]
    assert curves[1] == pytest.approx(curves[0], rel=TOLERANCE)
    assert curves[0][-1] != curves[0][0]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[30, 1, 1], [7, 20, 4, 1], [3, 2, 9, 5, 1]])
def test_prefill_and_decode(pair: Pair, device: torch.device, sizes: list[int]) -> None:
    x = tokens(device, 2, sum(sizes))
    caches = [LatentCache(2, capacity_tokens=10), LatentCache(2, capacity_tokens=10)]
    for piece in x.split(sizes, dim=1):
        logits = [m(piece, past_key_values=c).logits for m, c in zip(pair, caches, strict=True)]
        assert error(logits[1], logits[0]) < TOLERANCE
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert layers[0].latents().shape == layers[1].latents().shape
        assert error(layers[1].latents(), layers[0].latents()) < TOLERANCE


RUN_BY = {
    "attention": ({"mla_attention"}, {"mla_decode"}),
    "norm": ({"rms_norm", "add_rms_norm"}, {"rms_norm", "add_rms_norm"}),
    "rope": ({"rope"}, {"rope"}),
    "all": (
        {"mla_attention", "rms_norm", "add_rms_norm", "rope"},
        {"mla_decode", "rms_norm", "add_rms_norm", "rope", "append_latent"},
    ),
    "converted": (
        {"mla_attention", "rms_norm", "add_rms_norm", "rope"},
        {"mla_decode", "rms_norm", "add_rms_norm", "rope"},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("switch", RUN_BY, indirect=True)
def test_each_switch_runs_its_kernels(pair: Pair, device: torch.device, switch: str) -> None:
    """Training form and decode; without this a switch that does nothing would pass the others."""
    cache = LatentCache(2)
    pair[1](tokens(device, 1, 20), past_key_values=cache)
    forms = ({"use_cache": False}, {"past_key_values": cache})
    for expected, kwargs in zip(RUN_BY[switch], forms, strict=True):
        with Kernels() as kernels:
            pair[1](tokens(device, 1, 1), **kwargs)
        assert set(kernels.names) == expected
    appends_at_once = pair[1].model.operators.append is not None
    assert appends_at_once == ("append_latent" in RUN_BY[switch][1])
    with Kernels() as kernels:
        pair[0](tokens(device, 1, 1))
    assert not kernels.names


@torch.no_grad()
@pytest.mark.parametrize("switch", ["all"], indirect=True)
def test_float16(pair: Pair, device: torch.device) -> None:
    """What a GPU below sm_80 computes in, and our kernels in the same precision."""
    x = tokens(device, 2, 24)
    expected = pair[0](x).logits
    for model in pair:
        model.half()
        cache = LatentCache(2)
        prefill = model(x[:, :-1], past_key_values=cache).logits
        decoded = model(x[:, -1:], past_key_values=cache).logits
        assert decoded.dtype == torch.float16
        assert error(torch.cat((prefill, decoded), dim=1), expected) < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("switch", ["all"], indirect=True)
def test_padded_batches_run_on_torch(pair: Pair, device: torch.device) -> None:
    x = tokens(device, 2, 12)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert pair[0].generate(x, **kwargs).equal(pair[1].generate(x, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("switch", ["all"], indirect=True)
def test_a_model_on_kernels_can_be_copied(pair: Pair, device: torch.device) -> None:
    x = tokens(device, 1, 5)
    assert copy.deepcopy(pair[1])(x).logits.equal(pair[1](x).logits)


def train(
    model: MLAForCausalLM,
    batches: list[tuple[torch.Tensor, torch.Tensor | None]],
    dtype: torch.dtype | None,
) -> list[float]:
    """Losses of AdamW steps over (input_ids, position_ids), under autocast if a dtype is given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for input_ids, position_ids in batches:
        with torch.autocast(input_ids.device.type, dtype=dtype, enabled=dtype is not None):
            loss = model(
                input_ids, position_ids=position_ids, labels=input_ids, skip_logits=True
            ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


WIDE = {
    "vocab_size": 320,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "length_temperature": "ssmax",
    "max_position_embeddings": 2**20,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def distance(a: list[float], b: list[float]) -> float:
    """Mean relative difference of two loss curves."""
    return sum(abs(x - y) / y for x, y in zip(a, b, strict=True)) / len(a)


def compare_curves(
    make_model: Callable[..., MLAForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    sizes: dict[str, Any],
    steps: int,
    context_tokens: int,
) -> dict[str, Any]:
    """Loss curves of bf16 training from the same weights on the same batches: PyTorch with each
    SDPA kernel, whose sums differ only in order, and ours.
    """
    data = PasskeyDataOptions(
        context_length=context_tokens, tokens_per_batch=8 * context_tokens, max_position=2**16
    )
    batches = []
    for step in range(steps):
        batch = make_batch(data, split="train", step=step, rank=0, context_length=context_tokens)
        batches.append((batch["input_ids"].to(device), batch["position_ids"].to(device)))
    all_triton = SWITCHES["all"]
    pair = [make_model(**sizes, **changes).to(device) for changes in ({}, all_triton)]
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        logits = [
            m(batches[0][0], position_ids=batches[0][1], use_cache=False).logits for m in pair
        ]
    config, curves = pair[0].config, {}
    for name, backend in SDPA.items():
        monkeypatch.setattr(sdpa, "_CUDA_BACKENDS", [backend])
        torch.manual_seed(1)
        model = MLAForCausalLM(config).to(device).train()
        curves[name] = train(model, batches, torch.bfloat16)
    torch.manual_seed(1)
    model = MLAForCausalLM(pair[1].config).to(device).train()
    curves["triton"] = train(model, batches, torch.bfloat16)
    noise = max(distance(curves[a], curves[b]) for a, b in combinations(SDPA, 2))
    return {
        "logits_relative_error": error(logits[1], logits[0]),
        "mean_relative_noise_between_sdpa_kernels": noise,
        "mean_relative_distance_of_triton": max(
            distance(curves["triton"], curves[name]) for name in SDPA
        ),
        "first_loss": {name: curve[0] for name, curve in curves.items()},
        "last_loss": {name: curve[-1] for name, curve in curves.items()},
        "losses": curves,
    }


@pytest.mark.gpu
def test_bf16_training_agrees_within_noise(
    make_model: Callable[..., MLAForCausalLM], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """200 steps. The noise is what the order of summation alone does to PyTorch's own curve: the
    largest distance between two of three SDPA kernels. Ours may be as far from each of them as
    twice that, because a distance between two curves of a chaotic process is itself a draw.
    """
    steps, context_tokens = 200, 512
    torch.use_deterministic_algorithms(False)  # the fixture's filling of memory costs launches
    row = compare_curves(make_model, monkeypatch, device, WIDE, steps, context_tokens)
    if folder := os.environ.get("IC_RESULTS_DIR"):
        config = {**WIDE, "steps": steps, "context_tokens": context_tokens, "batch": 8}
        write_results(
            Path(folder) / "kernels-parity.json",
            config,
            [row],
            command="pytest tests/kernels/test_model_backend.py -m gpu -k within_noise",
        )
    assert row["logits_relative_error"] < 2e-2
    assert row["last_loss"]["cudnn"] < 0.8 * row["first_loss"]["cudnn"]
    assert (
        row["mean_relative_distance_of_triton"]
        < 2 * row["mean_relative_noise_between_sdpa_kernels"]
    )


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("keys", [65, 128])
def test_sdpa_without_flash_and_cudnn(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, keys: int
) -> None:
    """What is left below sm_80: the memory-efficient kernel, at 192/128 in float16."""
    q, k, v = (
        torch.randn(1, n, 4, width, device=device)
        for n, width in ((64, 192), (keys, 192), (keys, 128))
    )
    monkeypatch.setattr(sdpa, "_CUDA_BACKENDS", [SDPBackend.MATH])
    expected = sdpa.causal_attention(q, k, v, scale=0.07)
    monkeypatch.setattr(sdpa, "_CUDA_BACKENDS", [SDPBackend.EFFICIENT_ATTENTION])
    got = sdpa.causal_attention(q.half(), k.half(), v.half(), scale=0.07)
    assert error(got, expected) < 2e-3
