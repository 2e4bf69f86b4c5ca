"""LoRA: what trains, that merging changes nothing, and the files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ic.inference.greedy import GreedyDecoder
from ic.model import MLAForCausalLM
from ic.model.adapter import (
    adapter_disabled,
    add_adapter,
    has_adapter,
    join_adapter,
    load_adapter,
    merge_adapter,
    merged_tensor,
    save_adapter,
    split_adapter,
)
from ic.model.options import AdapterOptions

peft = pytest.importorskip("peft")
CONFIG = AdapterOptions(
    r=4, lora_alpha=6, target_modules=["q_b_proj", "kv_b_proj", "o_proj", "down_proj"]
)
IDS = torch.arange(3, 43)[None]


@pytest.fixture
def adapted(make_model: Callable[..., MLAForCausalLM]) -> MLAForCausalLM:
    """A model whose adapter has learnt something."""
    model = make_model()
    add_adapter(model, CONFIG)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_begins_as_the_base_model_and_trains_alone(
    make_model: Callable[..., MLAForCausalLM],
) -> None:
    model = make_model()
    expected = logits(model)
    add_adapter(model, CONFIG)
    assert logits(model).equal(expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * len(CONFIG.target_modules) * model.config.num_hidden_layers


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merge_equals_the_definition(
    make_model: Callable[..., MLAForCausalLM], use_rslora: bool
) -> None:
    model = make_model()
    base = model.model.layers[1].self_attn.o_proj.weight.clone()
    add_adapter(
        model, AdapterOptions(r=4, lora_alpha=6, target_modules=["o_proj"], use_rslora=use_rslora)
    )
    layer = model.model.layers[1].self_attn.o_proj
    torch.nn.init.normal_(layer.lora_B.default.weight)
    update = layer.lora_B.default.weight @ layer.lora_A.default.weight
    merge_adapter(model)
    scale = 6 / math.sqrt(4) if use_rslora else 6 / 4
    torch.testing.assert_close(
        model.model.layers[1].self_attn.o_proj.weight, base + scale * update.detach()
    )


def test_merged_equals_adapted(
    adapted: MLAForCausalLM, make_model: Callable[..., MLAForCausalLM]
) -> None:
    plain = make_model()
    with adapter_disabled(adapted):
        assert logits(adapted).equal(logits(plain))
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(plain), atol=1e-2)
    answers = GreedyDecoder(adapted, 64).answers(IDS, 6)  # decoding absorbs kv_b_proj
    base, adapter = split_adapter(adapted.state_dict())
    merge_adapter(adapted)
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(merged_tensor(name, base[name], adapter, CONFIG), tensor)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-5)
    assert GreedyDecoder(adapted, 64).answers(IDS, 6).equal(answers)
    assert adapted.state_dict().keys() == plain.state_dict().keys()
    assert not has_adapter(adapted)


def test_decoding_sees_the_adapter(adapted: MLAForCausalLM) -> None:
    """The absorbed form reads the matrix of kv_b_proj past the layer's own forward."""
    whole = logits(adapted)[:, -1]
    with torch.no_grad():
        first = adapted(IDS[:, :-1], use_cache=True)
        last = adapted(IDS[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(last.logits[:, -1], whole, rtol=1e-4, atol=1e-4)


def test_files_are_pefts(
    adapted: MLAForCausalLM, make_model: Callable[..., MLAForCausalLM], tmp_path: Path
) -> None:
    base, adapter = split_adapter(adapted.state_dict())
    assert base.keys() == make_model().state_dict().keys()
    joined = join_adapter(base, adapter)
    assert joined.keys() == adapted.state_dict().keys()
    save_adapter(adapter, CONFIG, tmp_path)
    tensors, config = load_adapter(tmp_path)
    assert config == CONFIG
    assert tensors.keys() == adapter.keys()
    assert all(tensors[name].equal(adapter[name]) for name in adapter)
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert logits(theirs).equal(logits(adapted))


def test_copy_keeps_the_adapter(adapted: MLAForCausalLM) -> None:
    assert logits(copy.deepcopy(adapted)).equal(logits(adapted))


def test_unknown_target(make_model: Callable[..., MLAForCausalLM]) -> None:
    with pytest.raises(ValueError, match=r"no linear layer k_proj; choose from .*kv_b_proj"):
        add_adapter(make_model(), AdapterOptions(target_modules=["k_proj", "o_proj"]))
