"""`generate` over every kind of cache and every way of decoding, beside DeepseekV3ForCausalLM with
the same weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from ic.model import MLAConfig, MLAForCausalLM
from tests.conftest import SMALL, randomize

GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def theirs() -> DeepseekV3ForCausalLM:
    torch.manual_seed(1)
    config = DeepseekV3Config(**SMALL, num_key_value_heads=4, first_k_dense_replace=3)
    model = DeepseekV3ForCausalLM(config).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def ours(theirs: DeepseekV3ForCausalLM) -> MLAForCausalLM:
    return twin(theirs)


def twin(theirs: DeepseekV3ForCausalLM, **changes: Any) -> MLAForCausalLM:
    """Our class with the same weights."""
    rope = dict(theirs.config.rope_parameters)
    model = MLAForCausalLM(MLAConfig(**{**SMALL, "rope_parameters": rope, **changes})).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def draw(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def repeating(model: torch.nn.Module) -> torch.Tensor:
    """A prompt after which greedy decoding repeats what the prompt holds, so that looking it up
    there proposes tokens that are accepted and others that are not.
    """
    return model.generate(draw(1, 9), **{**GREEDY, "max_new_tokens": 120})


@torch.no_grad()
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "same model as assistant"])
def test_speculation_equals_greedy(
    ours: MLAForCausalLM, theirs: DeepseekV3ForCausalLM, way: str, make_model: Any
) -> None:
    ids = repeating(theirs)
    hows: dict[str, dict[str, Any]] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": make_model()},
        "same model as assistant": {"assistant_model": twin(theirs)},
    }
    greedy = theirs.generate(ids, **GREEDY)
    assert ours.generate(ids, **GREEDY).equal(greedy)
    lengths = Lengths(ours)
    assert ours.generate(ids, **GREEDY, **hows[way]).equal(greedy)
    lengths.remove()
    if way == "assistant":  # whose proposals are all wrong
        assert len(lengths.seen) == 40
    else:
        assert len(lengths.seen) < 30


class Lengths:
    """The number of new tokens of each pass of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[int] = []
        self.remove = model.register_forward_pre_hook(self._see, with_kwargs=True).remove

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(kwargs["input_ids"].shape[1])
