"""vLLM with our model and our attention gives our model's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ic.model.cache import LatentCache, LatentLayer
from tests.vllm.conftest import Served, logprobs, prompts

pytestmark = pytest.mark.vllm
CLOSE = 1e-4
LENGTHS = (1, 2, 17, 64, 127, 128, 303)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LLAMA = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def test_default_prefix_hits_and_a_corrupted_row(serve: Callable[..., Served]) -> None:
    served = serve()
    asked = prompts(*LENGTHS)
    first = served.answer(asked)
    assert served.worst(first) < CLOSE
    assert [answer.num_cached_tokens for answer in first] == [0] * len(asked)
    rotations = served.llm.apply_model(_far_rotations)[0]
    frequency_F = 1e4 ** (-torch.arange(32, dtype=torch.float64) / 32)
    far_1TF = torch.tensor([[2**20 - 1]])[..., None] * frequency_F
    for found, exact in zip(rotations, (far_1TF.cos(), far_1TF.sin()), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)

    layers = served.model.config.num_hidden_layers
    # A prompt of one token has nothing to prefill.
    assert served.calls.prefilled == [sum(LENGTHS) - 1] * layers
    assert served.calls.decoded == [1] * layers + [len(asked)] * 5 * layers

    again = [[*prompt, 5, 6, 7] for prompt in asked]
    second = served.answer(again)
    assert served.worst(second) < CLOSE
    hits = [len(prompt) // 16 * 16 for prompt in asked]
    assert [answer.num_cached_tokens for answer in second] == hits

    corrupt = served.llm.apply_model(_roll_a_row)[0]
    assert corrupt > 0
    third = served.answer([[*asked[-1], 8, 9]])
    assert third[0].num_cached_tokens == hits[-1]
    assert served.worst(third) > 100 * CLOSE


def _far_rotations(model: Any) -> tuple[Tensor, Tensor]:
    return model.model.rotary_emb(torch.tensor([[2**20 - 1]]))


def _roll_a_row(model: Any) -> float:
    """Turn the rotary part of one cached row of each page by one place -> the largest change."""
    change = 0.0
    for layer in model.model.layers:
        row = layer.self_attn.attn.kv_cache[:, 3, -64:]
        rolled = row.roll(1, -1)
        change = max(change, float((rolled - row).abs().max()))
        row.copy_(rolled)
    return change


def test_small_prefill_chunks(serve: Callable[..., Served]) -> None:
    served = serve(max_num_batched_tokens=48, enable_chunked_prefill=True)
    answers = served.answer(prompts(*LENGTHS))
    assert served.worst(answers) < CLOSE
    assert max(served.calls.prefilled) <= 48


@pytest.mark.parametrize(
    "changes",
    [
        {
            "kv_lora_rank": 128,
            "rope_parameters": YARN,
            "nope_layers": [1],
            "length_temperature": "llama4",
            "length_temperature_original": 16,
            "q_lora_rank": 48,
            "attention_bias": True,
        },
        {
            "kv_lora_rank": 256,
            "latent_norm": False,
            "query_bias": True,
            "rope_repeats": 2,
            "qk_norm_dim": 32,
            "rope_interleave": False,
            "rope_parameters": LLAMA,
        },
        {
            "kv_lora_rank": 512,
            "qk_norm_dim": 16,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            "tie_word_embeddings": True,
            "length_temperature": "none",
        },
        {"kv_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 0, "v_head_dim": 24},
        {
            "kv_lora_rank": 40,
            "qk_rope_head_dim": 16,
            "rope_pairs": [0, 3, 3, 9, 14, 20, 25, 31],
            "rope_pairs_dim": 64,
        },
    ],
    ids=["128+64", "256+64", "512+64", "96+32", "40+16 of 64"],
)
def test_dimensions_and_extensions(serve: Callable[..., Served], changes: dict[str, Any]) -> None:
    served = serve(changes, max_num_batched_tokens=96)
    asked = prompts(3, 60, 210)
    assert served.worst(served.answer(asked, 4)) < CLOSE
    again = served.answer([[*prompt, 5, 6] for prompt in asked], 4)
    assert served.worst(again) < CLOSE
    assert [answer.num_cached_tokens for answer in again] == [0, 48, 208]


def test_triton_decodes_and_prefills(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter; long contexts in pieces."""
    from ic.kernels import triton_mla_attention, triton_mla_flash_decode

    served = serve(max_num_batched_tokens=128)
    seen: dict[str, list[int]] = {"decode": [], "piece": [], "fresh": []}

    def watched(module: Any, name: str, kind: str) -> None:
        call = getattr(module, name)

        def watch(*args: Any, **named: Any) -> Any:
            seen[kind].append(args[0].shape[0 if kind == "decode" else 1])
            return call(*args, **named)

        monkeypatch.setattr(module, name, watch)

    watched(triton_mla_flash_decode, "mla_decode", "decode")
    watched(triton_mla_attention, "attend_piece", "piece")
    watched(triton_mla_attention, "mla_attention", "fresh")
    monkeypatch.setattr("ic.kernels.arguments.INTERPRETED", True)
    served.llm.apply_model(_short_pieces)
    answers = served.answer(prompts(1, 31, 150), 3)
    assert served.worst(answers) < CLOSE
    layers = served.model.config.num_hidden_layers
    assert sum(seen["decode"]) >= layers * 2 * len(answers)
    assert len(seen["piece"]) > layers
    assert seen["fresh"]


def _short_pieces(model: Any) -> None:
    from dataclasses import replace

    for layer in model.model.layers:
        impl = layer.self_attn.attn.impl
        impl.prefill = replace(impl.prefill, piece_tokens=48)


class RoundedLayer(LatentLayer):
    """Holds rows rounded to e4m3; new tokens of a prefill see each other as they were."""

    def latents(self) -> Tensor:
        held, rounded = super().latents(), getattr(self, "rounded", 0)
        exact = held.clone()
        held.copy_(held.clamp(-448, 448).to(torch.float8_e4m3fn).float())
        self.rounded = held.shape[1]
        return held if held.shape[1] - rounded == 1 else exact

    def keep(self, num_tokens: int) -> None:
        super().keep(num_tokens)
        self.rounded = self.length


def test_turns_of_a_conversation_with_an_e4m3_cache(serve: Callable[..., Served]) -> None:
    served = serve(kv_cache_dtype="fp8")
    cache = LatentCache(0)
    cache.layers = [RoundedLayer() for _ in range(served.model.config.num_hidden_layers)]
    history: list[int] = []
    apart, lost = [], []
    for turn, user in enumerate(prompts(120, 40, 7, 90, 33)):
        answer = served.answer([[*history, *user]], 12)[0]
        # All whole pages of the turns before it; an answer's last token was never put in.
        held = (len(history) - 1) // 16 * 16 if turn else 0
        assert answer.num_cached_tokens == held
        expected = _replay(served.model, cache, answer)
        apart.append(float((logprobs(answer) - expected).abs().max()))
        lost.append(float((logprobs(answer) - served.expected(answer)).abs().mean()))
        history = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]

    # A number that lies between two of e4m3 may fall to either side.
    assert max(apart) < 1e-3, apart
    assert 1e-3 < lost[0] < 0.1, lost  # the cache is rounded, and by no more
    assert max(lost[1:]) < 2 * lost[0], lost


@torch.no_grad()
def _replay(model: Any, cache: LatentCache, answer: Any) -> Tensor:
    """Log-probabilities of an answer over a cache that holds what vLLM's held."""
    cache.keep(answer.num_cached_tokens)
    ids = torch.tensor([answer.prompt_token_ids[answer.num_cached_tokens :]])
    rows = []
    for token in answer.outputs[0].token_ids:
        logits = model(ids, past_key_values=cache).logits
        rows.append(logits[0, -1].log_softmax(-1))
        ids = torch.tensor([[token]])
    return torch.stack(rows)
