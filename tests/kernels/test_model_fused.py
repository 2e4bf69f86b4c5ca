"""A model that is fused for inference answers as before, with fewer launches and no more memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ic.inference.fused import fuse_for_inference
from ic.kernels.triton_silu_mul import silu_mul_halves, silu_mul_halves_op
from ic.model import MLAForCausalLM
from ic.model.cache import LatentCache
from tests.inference.engine.serving import engine_of
from tests.kernels.test_model_backend import CONVERTED, DIMS, SWITCHES, Kernels, error
from tests.model.test_rows import VARIANTS

Make = Callable[..., MLAForCausalLM]
ON_GPU = torch.cuda.is_available()
TOLERANCE = 1e-6
SIZES = DIMS | {"q_lora_rank": None}
CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "converted": CONVERTED | {"query_bias": False, "attention_bias": False},
    "without norm": {"latent_norm": False},
    "low-rank query": {"q_lora_rank": 24},
    "without temperature": {"length_temperature": "none"},
}


def draw(device: torch.device, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, 97, (rows, tokens), generator=generator).to(device)


@torch.no_grad()
def decode(model: MLAForCausalLM, x: Tensor, sizes: tuple[int, ...], cache: Any) -> Tensor:
    logits, start = [], 0
    for size in sizes:
        logits.append(model(x[:, start : start + size], past_key_values=cache).logits)
        start += size
    return torch.cat(logits, dim=1)


def both(make_model: Make, device: torch.device, **changes: Any) -> list[MLAForCausalLM]:
    """The same model as it is and fused."""
    model, fused = (make_model(**SIZES | changes).to(device) for _ in range(2))
    assert fuse_for_inference(fused)
    return [model, fused]


@pytest.mark.parametrize("case", CASES)
def test_logits(make_model: Make, device: torch.device, case: str) -> None:
    """A prefill, one token, four and seven, over both caches."""
    plain, fused = both(make_model, device, **CASES[case])
    sizes, x = (18, 1, 4, 7, 1), draw(device, 2, 31)
    for cache in (plain.model.new_cache, lambda: plain.model.new_static_cache(32)):
        expected = decode(plain, x, sizes, cache())
        assert error(decode(fused, x, sizes, cache()), expected) < TOLERANCE
    with torch.no_grad():
        assert fused.model.fused.serve(1, plain.model.new_cache())
        assert fused(x, use_cache=False).logits.equal(plain(x, use_cache=False).logits)


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("plain", 1), ("plain", 2), ("llama4", 2), ("without temperature", 2), ("yarn", 2),
        ("low-rank query", 1), ("low-rank query", 2),
    ],
)  # fmt: skip
def test_logits_on_our_kernels(
    make_model: Make, device: torch.device, case: str, rows: int
) -> None:
    plain, fused = both(make_model, device, **SWITCHES["all"] | CASES[case])
    sizes, x = (4, 1, 3), draw(device, rows, 8)
    caches = [plain.model.new_static_cache(16) for _ in range(2)]
    expected = decode(plain, x, sizes, caches[0])
    assert error(decode(fused, x, sizes, caches[1]), expected) < TOLERANCE


@torch.no_grad()
def test_launches(make_model: Make, device: torch.device) -> None:
    """Our kernels of a decode step: additions are in the norms, temperature and rotation in the
    append, and SwiGLU is one.
    """
    plain, fused = both(make_model, device, **SWITCHES["all"])
    layers = plain.config.num_hidden_layers
    ran = []
    for model, rows in ((plain, 1), (fused, 2), (fused, 1)):
        x, cache = draw(device, rows, 2), model.model.new_static_cache(16)
        model(x, past_key_values=cache)
        with Kernels() as kernels:
            model(x[:, :1], past_key_values=cache)
        ran.append(Counter(kernels.names))
    assert ran[0] == {
        "rms_norm": layers + 1, "rope": layers, "append_latent": layers, "mla_decode": layers,
        "add_rms_norm": layers,
    }  # fmt: skip
    assert ran[1] == {
        "rms_norm": 1, "append_with_queries": layers, "mla_decode": layers,
        "add_rms_norm": 2 * layers, "silu_mul_halves": layers,
    }  # fmt: skip
    # Of one row also the norms and SwiGLU are in the products.
    assert ran[2] == {
        "matvec": 4 * layers, "append_with_queries": layers, "mla_decode": layers,
        "add_rms_norm": 1,
    }  # fmt: skip


def test_memory_and_names_stay(make_model: Make, device: torch.device) -> None:
    def storages(model: MLAForCausalLM) -> int:
        held = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        return sum(storage.nbytes() for storage in held.values())

    plain, fused = both(make_model, device)
    before, after = plain.state_dict(), fused.state_dict()
    assert list(before) == list(after)
    for name, weight in before.items():
        assert weight.equal(after[name]), name
    assert storages(fused) == storages(plain)
    attention: Any = fused.model.layers[0].self_attn
    q, kv = attention.q_proj.weight, attention.kv_a_proj_with_mqa.weight
    assert kv.data_ptr() == q.data_ptr() + q.nbytes


def adapted(model: MLAForCausalLM, name: str) -> None:
    config = peft.LoraConfig(target_modules=[name], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    peft.inject_adapter_in_model(config, model)


def hooked(model: MLAForCausalLM, name: str) -> None:
    layer: Any = model.model.layers[1]
    layer.mlp.register_forward_hook(lambda module, given, out: 2 * out)


def shifted(model: MLAForCausalLM, name: str) -> None:
    layer: Any = model.model.layers[0]
    layer.self_attn.q_proj.weight.data = 2 * layer.self_attn.q_proj.weight.data


@pytest.mark.parametrize(
    ("change", "name"),
    [(adapted, "q_proj"), (adapted, "up_proj"), (hooked, ""), (shifted, "")],
    ids=["adapter", "adapter-up", "hook", "moved"],
)
def test_what_is_changed_later_counts(
    make_model: Make, device: torch.device, change: Callable[[Any, str], None], name: str
) -> None:
    plain, fused = both(make_model, device)
    x, sizes = draw(device, 2, 20), (18, 1, 1)
    without = decode(fused, x, sizes, plain.model.new_cache())
    for model in (plain, fused):
        change(model, name)
    expected = decode(plain, x, sizes, plain.model.new_cache())
    assert error(without, expected) > 1e-2
    assert decode(fused, x, sizes, plain.model.new_cache()).equal(expected)


@torch.no_grad()
def test_an_adapter_elsewhere_is_called(make_model: Make, device: torch.device) -> None:
    """`o_proj` and `down_proj` are called, fused or not."""
    plain, fused = both(make_model, device)
    x, sizes = draw(device, 2, 20), (18, 1, 1)
    for model in (plain, fused):
        adapted(model, "down_proj")
    assert fused.model.fused.serve(1, LatentCache(2))
    expected = decode(plain, x, sizes, plain.model.new_cache())
    assert error(decode(fused, x, sizes, plain.model.new_cache()), expected) < TOLERANCE


def test_the_engine_fuses_its_model(make_model: Make) -> None:
    model = make_model(**SIZES)
    engine_of(model)
    assert model.model.fused is not None


def test_training_after_it(make_model: Make, device: torch.device) -> None:
    """Gradients, and a step that the fused passes then see."""
    plain, fused = both(make_model, device)
    x = draw(device, 2, 20)
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x, labels=x).loss.backward()
        optimizer.step()
    expected = decode(plain, x, (19, 1), plain.model.new_cache())
    assert error(decode(fused, x, (19, 1), plain.model.new_cache()), expected) < TOLERANCE


@torch.no_grad()
def test_hidden_states_of_all_layers(make_model: Make, device: torch.device) -> None:
    plain, fused = both(make_model, device)
    x = draw(device, 1, 9)
    outputs = [model(x, output_hidden_states=True, use_cache=True) for model in (plain, fused)]
    assert len(outputs[1].hidden_states) == plain.config.num_hidden_layers + 1
    for got, expected in zip(outputs[1].hidden_states, outputs[0].hidden_states, strict=True):
        assert got.equal(expected)


def test_biased_projections_are_not_fused(make_model: Make) -> None:
    model = make_model(**SIZES, attention_bias=True)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert not fuse_for_inference(model)
    assert model.model.fused is None
    assert before == {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_adapted_and_empty_models_are_not_fused(make_model: Make) -> None:
    model = make_model(**SIZES)
    adapted(model, "gate_proj")
    assert not fuse_for_inference(model)
    with torch.device("meta"):
        empty = MLAForCausalLM(model.config)
    assert not fuse_for_inference(empty)


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 4000), (1, 66), (0, 8)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 6e-4)] + ([(torch.bfloat16, 5e-3)] if ON_GPU else []),
    ids=str,
)
def test_silu_mul_halves(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    got = silu_mul_halves(x)
    assert got.dtype == dtype
    assert got.shape == up.shape
    expected = F.silu(gate) * up
    assert float((got.double() - expected).norm()) <= tolerance * float(expected.norm())
    torch.library.opcheck(silu_mul_halves_op, (x,))


def test_silu_mul_halves_refuses(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^x: shape \(2, 3\)"):
        silu_mul_halves(torch.zeros(2, 3, device=device))
    with pytest.raises(ValueError, match=r"^x: shape \(4, 2\) with strides"):
        silu_mul_halves(torch.zeros(4, 8, device=device)[:, 2:4])
    with pytest.raises(ValueError, match=r"^x: dtype"):
        silu_mul_halves(torch.zeros(4, 8, device=device).double())
