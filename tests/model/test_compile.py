"""Compiled layers train like plain ones, at every context length, and leave cached passes alone;
whole models compile and export in one graph.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache
from transformers.integrations.executorch import register_dynamic_cache_export_support

from ic.config.model import ModelConfig
from ic.datamodules.tokenizers import build_tokenizer
from ic.model import MLAForCausalLM

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def model(**changes: object) -> MLAForCausalLM:
    torch.manual_seed(0)
    return ModelConfig(**{**TINY, **changes}).build(build_tokenizer("bytes"))


def gradients(model: MLAForCausalLM, rows: int, tokens: int) -> list[Tensor]:
    """The loss, and the gradient of each parameter, for random tokens of a shape."""
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    sums = model.target_sums(ids, ids, position_ids=torch.arange(tokens).expand(rows, -1))
    assert sums.all_tokens is not None
    loss = sums.all_tokens / ids.numel()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_losses_and_gradients_are_those_of_plain_layers() -> None:
    plain, compiled = model(num_hidden_layers=1), model(num_hidden_layers=1, compile=True)
    for a, b in zip(gradients(compiled, 4, 64), gradients(plain, 4, 64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_curriculum_takes_one_graph_a_length(checkpointing: bool) -> None:
    model(compile=True)  # raises the compiler's limit of eight
    counter = CompileCounterWithBackend("eager")
    changing = model(gradient_checkpointing=checkpointing)
    for layer in changing.model.layers:
        layer.compile(backend=counter, dynamic=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(1, 11):
            gradients(changing, 1, 8 * number)
    assert counter.frame_count == 10


def test_a_pass_with_a_cache_is_not_compiled() -> None:
    counter = CompileCounterWithBackend("eager")
    cached = model().eval()
    for layer in cached.model.layers:
        layer.compile(backend=counter)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        cached.generate(ids, max_new_tokens=4, do_sample=False)
    assert counter.frame_count == 0


def padded(rows: int, tokens: int) -> dict[str, Tensor]:
    """Tokens, and a mask of which the first row begins with padding."""
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_a_pass_is_one_graph_for_every_length(masked: bool) -> None:
    whole = model(num_hidden_layers=1, length_temperature="ssmax").eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=counter)
    for rows, tokens in ((2, 40), (3, 33), (2, 70)):
        inputs = padded(rows, tokens)
        if not masked:
            del inputs["attention_mask"]
        assert compiled(**inputs).logits.equal(whole(**inputs).logits)
    assert counter.frame_count == 1


@torch.no_grad()
def test_decoding_over_a_static_cache_is_one_graph() -> None:
    whole = model(length_temperature="ssmax").eval()
    ids = padded(2, 40)["input_ids"]
    expected = whole(ids, use_cache=False).logits
    cache = whole.model.new_static_cache(48)
    whole(ids[:, :20], past_key_values=cache)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    for at in range(20, 26):
        got = compiled(ids[:, at, None], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[:, at, None], atol=1e-5, rtol=0)
    assert counter.frame_count == 1


@torch.no_grad()
def test_an_exported_program_takes_padding_and_other_lengths() -> None:
    whole = model(num_hidden_layers=1).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = padded(2, 40)
    program = torch.export.export(
        whole, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), strict=False
    ).module()
    for rows, tokens in ((3, 70), (1, 25)):
        inputs = padded(rows, tokens)
        out = program(**inputs)
        torch.testing.assert_close(out.logits, whole(**inputs).logits, atol=1e-6, rtol=0)
        assert out.past_key_values is None
    with pytest.raises(ValueError, match=r"give past_key_values=DynamicCache\(\)"):
        torch.export.export(whole, (), {**inputs, "use_cache": True}, strict=False)


@torch.no_grad()
def test_an_exported_program_goes_on_over_a_dynamic_cache() -> None:
    register_dynamic_cache_export_support()
    whole = model(num_hidden_layers=1).eval()
    ids = padded(2, 40)["input_ids"]
    expected = whole(ids, use_cache=False).logits
    caches = [DynamicCache(config=whole.config) for _ in range(2)]
    for cache in caches:
        whole(ids[:, :20], past_key_values=cache)
    size = torch.export.Dim.AUTO
    layers = [{0: size, 2: size}]
    program = torch.export.export(
        whole,
        (),
        {"input_ids": ids[:, 20:22], "past_key_values": caches[0], "use_cache": True},
        dynamic_shapes={
            "input_ids": {0: size, 1: size},
            "past_key_values": [layers, layers],
            "use_cache": None,
        },
        strict=False,
    ).module()
    cache = caches[1]
    for start, end in ((20, 22), (22, 25)):
        out = program(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits, expected[:, start:end], atol=1e-5, rtol=0)
        cache = out.past_key_values
    assert cache.get_seq_length() == 25
