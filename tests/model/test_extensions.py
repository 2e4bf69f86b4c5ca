"""Switches of a model whose attention was another: against transformers' Llama, Mistral, Qwen2 and
Qwen3 in float32, as they are and written as MLA without loss.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from ic.model import MLAForCausalLM
from tests.gqa import FAMILIES, exact_twin

LAYOUTS = {"half_split": False, "interleaved": True}


@pytest.fixture(params=FAMILIES)
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILIES[request.param].model()


@pytest.fixture(params=LAYOUTS)
def ours(theirs: PreTrainedModel, request: pytest.FixtureRequest) -> MLAForCausalLM:
    return exact_twin(theirs, interleave=LAYOUTS[request.param])


def draw(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_exact_in_every_form(theirs: PreTrainedModel, ours: MLAForCausalLM) -> None:
    x = draw(37)
    expected = theirs(x).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(x, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    for limit in (0, 10**6):  # all expanded, all absorbed
        ours.config.absorbed_max_queries = limit
        cache, out = ours.model.new_cache(), []
        for piece in x.split([20, 9, *[1] * 8], dim=1):
            out.append(ours(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-5, rtol=0)
