"""Whatever wraps `kv_b_proj` or the head, decoding over a cache and the losses compute what the
layers compute: the whole pass calls them, and the two agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ic.model import MLAForCausalLM
from ic.model.cache import concatenate_rows
from ic.model.plain_layers import matrix_of

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

IDS = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(0))
TARGETS = {"target_modules": ["kv_b_proj"]}
LORA = {"r": 4, "init_lora_weights": False, **TARGETS}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(use_rslora=True, **LORA),
    "dora": lambda: peft.LoraConfig(use_dora=True, **LORA),
    "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, init_weights=False, **TARGETS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, init_weights=False, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, init_weights=False, **TARGETS),
}


@pytest.fixture
def model(make_model: Callable[..., MLAForCausalLM]) -> MLAForCausalLM:
    return make_model()


@torch.no_grad()
def assert_decodes_as_the_whole_pass(wrapped: Any, plain: MLAForCausalLM | None = None) -> None:
    """Logits of the last four tokens over a cache, against those of one pass; of standard deviation
    near one.
    """
    whole = wrapped(input_ids=IDS, use_cache=False).logits
    first = wrapped(input_ids=IDS[:, :-4], use_cache=True)
    rest = [
        wrapped(input_ids=ids, past_key_values=first.past_key_values, use_cache=True).logits
        for ids in IDS[:, -4:].split([3, 1], 1)
    ]
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, -4:], rtol=0, atol=1e-4)
    if plain is not None:
        assert (plain(IDS, use_cache=False).logits - whole).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_adapters(model: MLAForCausalLM, method: str) -> None:
    torch.manual_seed(0)
    plain = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, METHODS[method](), adapter_name="chat").eval()
    if method == "ia3":
        scales = [p for name, p in wrapped.named_parameters() if "ia3_l" in name]
        for scale in scales:
            nn.init.uniform_(scale, 0.5, 1.5)
    assert_decodes_as_the_whole_pass(wrapped, plain)
    with wrapped.disable_adapter():
        assert_decodes_as_the_whole_pass(wrapped)
    wrapped.merge_adapter()
    assert_decodes_as_the_whole_pass(wrapped, plain)


def test_two_adapters(model: MLAForCausalLM) -> None:
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    alone = wrapped(input_ids=IDS, use_cache=False).logits
    wrapped.add_adapter("other", peft.LoraConfig(use_dora=True, **LORA))
    wrapped.set_adapter("other")
    assert_decodes_as_the_whole_pass(wrapped)
    wrapped.base_model.set_adapter(["default", "other"])
    assert_decodes_as_the_whole_pass(wrapped)
    wrapped.merge_adapter(["other"])
    wrapped.set_adapter("default")
    assert_decodes_as_the_whole_pass(wrapped)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(wrapped(input_ids=IDS, use_cache=False).logits, alone)


def test_another_adapter_for_each_row(model: MLAForCausalLM) -> None:
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    wrapped.add_adapter("other", peft.LoraConfig(**LORA))
    with torch.no_grad():
        first = wrapped(input_ids=IDS[:, :-1], use_cache=True, adapter_names=["other", "default"])
        got = wrapped(
            input_ids=IDS[:, -1:],
            past_key_values=first.past_key_values,
            adapter_names=["other", "default"],
        ).logits[:, -1]
        for row, name in enumerate(("other", "default")):
            wrapped.set_adapter(name)
            whole = wrapped(input_ids=IDS[row, None], use_cache=False).logits[0, -1]
            torch.testing.assert_close(got[row], whole, rtol=0, atol=1e-4)


def test_a_weight_that_is_no_parameter_is_read(model: MLAForCausalLM) -> None:
    """As FSDP leaves a layer: its weight a view of a larger parameter."""
    layer = model.model.layers[0].self_attn.kv_b_proj
    view = layer.weight.detach().clone()
    del layer.weight
    layer.weight = view
    assert matrix_of(layer, 32, torch.float32) is view


def test_a_lora_layer_is_absorbed_and_others_are_called(model: MLAForCausalLM) -> None:
    """LoRA decodes at the speed of its matrix; what may be no matrix is applied to the latents."""
    layer = model.model.layers[0].self_attn.kv_b_proj
    weight = layer.weight
    assert matrix_of(layer, 32, torch.float32) is weight
    layer.register_forward_hook(lambda *_: None)
    assert matrix_of(layer, 32, torch.float32) is None
    config = peft.LoraConfig(lora_dropout=0.5, **LORA)
    wrapped = peft.get_peft_model(model, config).model.model.layers[1].self_attn.kv_b_proj
    assert matrix_of(wrapped, 32, torch.float32) is None  # PEFT's models train at first
    matrix = matrix_of(wrapped.eval(), 32, torch.float32)
    expected = wrapped.base_layer.weight + wrapped.get_delta_weight("default")
    torch.testing.assert_close(matrix, expected)


class Doubled(nn.Linear):
    """As many other libraries do, a layer of another class in place of the stock one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def replace_layers(model: MLAForCausalLM) -> None:
    for block in model.model.layers:
        old = block.self_attn.kv_b_proj
        block.self_attn.kv_b_proj = Doubled(old.in_features, old.out_features, bias=False)
        block.self_attn.kv_b_proj.weight.copy_(old.weight)


def parametrize(model: MLAForCausalLM) -> None:
    for block in model.model.layers:
        nn.utils.parametrizations.weight_norm(block.self_attn.kv_b_proj).parametrizations.weight[
            0
        ].register_forward_hook(lambda _, __, out: 2 * out)


def add_hooks(model: MLAForCausalLM) -> None:
    for block in model.model.layers:
        block.self_attn.kv_b_proj.register_forward_hook(lambda _, __, out: 2 * out)


@pytest.mark.parametrize("change", [replace_layers, parametrize, add_hooks])
def test_other_wrappers(model: MLAForCausalLM, change: Callable[[MLAForCausalLM], None]) -> None:
    plain = copy.deepcopy(model)
    change(model)
    assert_decodes_as_the_whole_pass(model, plain)


def test_rows_of_unequal_length(make_model: Callable[..., MLAForCausalLM]) -> None:
    """A backend that reads lengths gets a mask where the layer is called."""
    model = make_model(attention_backend="torch")
    add_hooks(model)
    with torch.no_grad():
        texts = [IDS[:1, :9], IDS[1:, :17]]
        caches = [model(text, use_cache=True).past_key_values for text in texts]
        rows = concatenate_rows(caches)
        got = model(IDS[:, 17:20], past_key_values=rows).logits
        for row, text in enumerate(texts):
            whole = model(torch.cat((text, IDS[row, None, 17:20]), 1), use_cache=False).logits
            torch.testing.assert_close(got[row], whole[0, -3:], rtol=0, atol=1e-4)


def test_offloaded_weights(model: MLAForCausalLM, tmp_path: Path) -> None:
    expected = model(IDS, labels=IDS)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    assert_decodes_as_the_whole_pass(model)
    got = model(IDS, labels=IDS)
    torch.testing.assert_close((got.loss, got.logits), (expected.loss, expected.logits))


def quantise(model: MLAForCausalLM, layers: set[Any]) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, layers, dtype=torch.qint8)


def test_dynamically_quantised_layers(make_model: Callable[..., MLAForCausalLM]) -> None:
    # Such a layer's output depends on the range of all that it is given. That is the same for the
    # last token over a cache and in a whole pass where nothing quantised precedes `kv_b_proj`.
    plain = make_model(num_hidden_layers=1)
    one = quantise(plain, {"model.layers.0.self_attn.kv_b_proj"})
    with torch.no_grad():
        whole = one(IDS, use_cache=False).logits[:, -1]
        first = one(IDS[:, :-1], use_cache=True)
        last = one(IDS[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
        assert (plain(IDS, use_cache=False).logits[:, -1] - whole).abs().max() > 1e-3
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-5)
    every = quantise(make_model(), {nn.Linear})
    got = every(IDS, labels=IDS)
    expected = nn.functional.cross_entropy(got.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(got.loss, expected)
    assert every.generate(IDS, max_new_tokens=3, eos_token_id=None).shape == (2, 26)


def test_an_adapter_on_the_head_trains(model: MLAForCausalLM) -> None:
    """By the losses of all three passes, with the gradients that whole logits give."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "o_proj"])
    ).eval()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    logits = wrapped(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    gradients = torch.autograd.grad(expected, trained)
    base = wrapped.base_model.model
    sums = base.target_sums(IDS, IDS)
    assert sums.all_tokens is not None
    count = IDS[:, 1:].numel()
    for loss in (
        wrapped(input_ids=IDS, labels=IDS).loss,
        sums.all_tokens / count,
        -base.target_log_probs(IDS, IDS).log_probs.sum() / count,
    ):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, trained), gradients)


def test_a_quantised_tensor_in_a_stock_layer_is_not_read(model: MLAForCausalLM) -> None:
    """As torchao's `quantize_` leaves it; PyTorch's own subclass of that kind stands for it."""
    layer = model.model.layers[0].self_attn.kv_b_proj
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    assert type(layer) is nn.Linear
    assert matrix_of(layer, 32, torch.float32) is None
