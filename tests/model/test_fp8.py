"""FP8 products in training: which layers, what they compute and with which error, and that nothing
but training knows of them.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.fp8 import check_fp8, choose_layers, use_fp8

pytest.importorskip("torchao", reason="pip install '.[fp8]'")
IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ON_A_CPU = None


def test_the_layers_that_are_chosen(make_model: Callable[..., MLAForCausalLM]) -> None:
    """Of `SMALL`, q_lora_rank=24 and a latent of 40 are no multiples of 16."""
    model = make_model()
    plain = model.state_dict()
    chosen = use_fp8(model, "rowwise", ON_A_CPU, [0], ["down_proj"])
    assert [name for name in chosen.converted if "layers.1." in name] == [
        "model.layers.1.self_attn.kv_b_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert {name.rpartition(".")[2] for name in chosen.misfits} == {
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
    }
    assert {name for name in chosen.kept if "layers.0." not in name} == {
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    }
    assert str(chosen) == (
        "8 of 24 linear layers multiply in FP8, 10 are kept, 6 have sizes that are no multiples of "
        "16"
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (type(module) is not nn.Linear) == (name in chosen.converted), name
    assert type(model.lm_head) is nn.Linear
    assert choose_layers(model, [0], ["down_proj"]) == chosen
    state = model.state_dict()
    assert state.keys() == plain.keys()
    assert all(tensor.data_ptr() == plain[name].data_ptr() for name, tensor in state.items())


def test_negative_indices_count_from_the_end(make_model: Callable[..., MLAForCausalLM]) -> None:
    kept = choose_layers(make_model(), [0, -1], []).kept
    assert {name.split(".")[2] for name in kept} == {"0", "2"}
    assert len(kept) == 16


def test_an_indexer_stays(make_model: Callable[..., MLAForCausalLM]) -> None:
    sizes = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 16, "q_lora_rank": 32}
    model = make_model(indexer="dense", **sizes)
    assert model.model.layers[1].self_attn.indexer.wk.weight.shape == (16, 64)
    assert choose_layers(model, [], []) == choose_layers(make_model(q_lora_rank=32), [], [])


@pytest.mark.parametrize(
    ("keep_layers", "keep", "message"),
    [
        ([3], [], r"fp8_keep_layers=\[3\]: the model has no decoder layer 3; choose from -3 to 2"),
        ([-4], [], r"no decoder layer -4"),
        (
            [],
            ["lm_head"],
            r"fp8_keep=\['lm_head'\]: the decoder has no linear layer lm_head; choose",
        ),
        ([0, 1, 2], [], r"no layer would multiply in FP8 \(model.fp8_keep_layers=\[0, 1, 2\]"),
    ],
)
def test_choices_that_the_model_does_not_have(
    make_model: Callable[..., MLAForCausalLM], keep_layers: list[int], keep: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layers(make_model(), keep_layers, keep)


def rounded(x: Tensor, dtype: torch.dtype, over: int | None) -> Tensor:
    """As FP8 with a scale per slice over an axis (a power of two), or one for all."""
    largest = x.abs().amax(over, keepdim=True) if over is not None else x.abs().max()
    scale = torch.finfo(dtype).max / largest.double()
    if over is not None:
        scale = 2 ** torch.floor(torch.log2(scale))
    scale = scale.float()
    return (x * scale).to(dtype).float() / scale


def products(recipe: str, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of input and weight by the recipe's definition, in float32."""
    if recipe == "tensorwise":
        x8, w8, g8 = rounded(x, E4M3, None), rounded(weight, E4M3, None), rounded(grad, E5M2, None)
        return x8 @ w8.T, g8 @ w8, g8.T @ x8
    out = rounded(x, E4M3, 1) @ rounded(weight, E4M3, 1).T
    if recipe == "rowwise":
        grad_weight = rounded(grad, E4M3, 0).T @ rounded(x, E4M3, 0)
        return out, rounded(grad, E4M3, 1) @ rounded(weight, E4M3, 0), grad_weight
    scale = 2 ** torch.floor(torch.log2(448 / weight.abs().max()))
    whole = (weight * scale).to(E4M3).float() / scale
    return out, rounded(grad, E4M3, 1) @ whole, grad.T @ x


@pytest.mark.parametrize("tokens", [48, 41])
@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_the_three_products(recipe: str, emulated: bool, tokens: int) -> None:
    """By an implementation of our own, and near those in full precision; also with the operator
    that a GPU has, for numbers of tokens that are no multiples of 16.
    """
    from ic.model.fp8_linear import convert

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    weight = model[0].weight.detach()
    convert(model, {"0"}, recipe, emulate=emulated)
    x, grad = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 96) * 1e-4
    out = model(x)
    out.backward(grad)
    got = (out.detach(), x.grad, model[0].weight.grad)
    x = x.detach()
    exact = (x @ weight.T, grad @ weight, grad.T @ x)
    # PyTorch's operator gives rows and columns with scales of their own in bf16.
    tolerance = 1e-5 if emulated or recipe == "tensorwise" else 4e-3
    for which, a, b, c in zip(range(3), got, products(recipe, x, weight, grad), exact, strict=True):
        assert (a - b).norm() < tolerance * b.norm()
        error = (a - c).norm() / c.norm()
        if recipe == "rowwise_with_gw_hp" and which == 2:
            assert error < 1e-5
        else:
            # Two operands, each with an error of 2.5 % of e4m3's four digits, 5 % of e5m2's three.
            assert 0.02 < error < (0.075 if recipe == "tensorwise" and which else 0.05)


def gradients(model: MLAForCausalLM) -> list[Tensor]:
    """The loss of `IDS`, and the gradient of each parameter."""
    sums = model.target_sums(IDS, IDS)
    assert sums.all_tokens is not None
    loss = sums.all_tokens / IDS.numel()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_loss_and_gradients_of_a_model(
    make_model: Callable[..., MLAForCausalLM], recipe: str
) -> None:
    plain = make_model().train()
    model = copy.deepcopy(plain)
    use_fp8(model, recipe, ON_A_CPU, [], [])
    expected, got = gradients(plain), gradients(model)
    # 46 tokens through three layers whose every product is rounded.
    assert 0 < (got[0] - expected[0]).abs() / expected[0] < 1e-2
    whole = [torch.cat([g.flatten() for g in some[1:]]) for some in (got, expected)]
    assert 0.02 < (whole[0] - whole[1]).norm() / whole[1].norm() < 0.25
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(model), got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_evaluation_is_that_of_the_weights(make_model: Callable[..., MLAForCausalLM]) -> None:
    """Bit by bit, and decoding absorbs `kv_b_proj` as it does in a model that never had FP8."""
    plain, model = make_model(), make_model()
    use_fp8(model, "rowwise", ON_A_CPU, [], [])
    with torch.no_grad():
        assert model.eval()(IDS).logits.equal(plain(IDS).logits)
        assert not model.train()(IDS, use_cache=False).logits.equal(plain(IDS).logits)
    attention = model.model.layers[1].self_attn
    assert attention.absorbed_weights(torch.float32) is None
    model.eval()
    assert attention.absorbed_weights(torch.float32) is not None
    answers = GreedyDecoder(model, 64).answers(IDS, 6)
    assert answers.equal(GreedyDecoder(plain, 64).answers(IDS, 6))


def test_autocast_reaches_the_products(make_model: Callable[..., MLAForCausalLM]) -> None:
    model = make_model().train()
    use_fp8(model, "rowwise", ON_A_CPU, [], [])
    layer = model.model.layers[0].mlp.gate_proj
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.ones(16, 64))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_layers_compile_to_one_graph(
    make_model: Callable[..., MLAForCausalLM], recipe: str
) -> None:
    torch._dynamo.reset()
    plain = make_model().train()
    use_fp8(plain, recipe, ON_A_CPU, [0], [])
    compiled = copy.deepcopy(plain)
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    for a, b in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    from ic.model.fp8_linear import convert

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 96, bias=False))
    convert(layer, {"0"}, "rowwise", emulate=True)
    x = torch.randn(48, 64)
    found = []
    for call in (layer, torch.compile(layer)):
        out = call(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), layer.parameters())])
    for a, b in zip(*found, strict=True):
        # Where a sum in another order turns a rounding, an element moves by one step of e4m3.
        assert (a - b).norm() <= 5e-3 * b.norm()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8("rowwise", None)
    check_fp8("rowwise", (8, 9))
    check_fp8("rowwise", (12, 0))
    with pytest.raises(
        ValueError, match=r"model.fp8=rowwise: .* capability 8.0, .* begin with 8.9"
    ):
        check_fp8("rowwise", (8, 0))
    monkeypatch.setattr("ic.model.fp8.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"torchao, which is not installed: pip install '.*\[fp8]'"
    ):
        check_fp8("rowwise", (9, 0))
