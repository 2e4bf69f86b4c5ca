"""Compiled layers train like plain ones, at every context length, and leave cached passes alone."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

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


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_losses_and_gradients_are_those_of_plain_layers() -> None:
    plain, compiled = model(num_hidden_layers=1), model(num_hidden_layers=1, compile=True)
    for a, b in zip(gradients(compiled, 4, 64), gradients(plain, 4, 64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


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
