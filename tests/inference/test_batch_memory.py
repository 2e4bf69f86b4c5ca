"""How many prompts fit: bytes against those of filled caches, and the batches that come of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ic.evaluation import runner
from ic.evaluation.runner import run_suite
from ic.inference.batch_memory import MOST_PROMPTS, free_bytes, prompt_bytes, prompts_at_once
from ic.inference.caches import new_cache
from ic.model import MLAForCausalLM
from ic.model.attention import EXPANDED_BYTES
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.copy_word.grid import Config
from tests.evaluation.copy_word.suite import CopyWord
from tests.evaluation.oracle import Copier
from tests.evaluation.test_share_haystack import ThreadRanks

TOKENS = 48


def cache_tensors(layer: Any) -> list[torch.Tensor]:
    found = [layer.keys, layer.values] if layer.values is not None else [layer.keys]
    own = {t.untyped_storage().data_ptr(): t for t in found}
    return list(own.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mla", "llama"])
def test_bytes_of_the_cache_are_those_of_a_filled_one(
    make_model: Callable[..., MLAForCausalLM], kind: str, dtype: torch.dtype
) -> None:
    model: Any
    if kind == "mla":
        model = make_model()
    else:
        sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=64, **sizes)).eval()
    model = model.to(dtype)
    cache = new_cache(model, TOKENS)
    with torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in cache_tensors(layer)
    )
    # The activations are of the piece, and the cache of the whole prompt, twice.
    of_piece = prompt_bytes(model, 0, 1), prompt_bytes(model, TOKENS, 0)
    assert of_piece == (0, 2 * held)
    one = prompt_bytes(model, TOKENS, 1) - 2 * held
    assert prompt_bytes(model, TOKENS, 1000) == 2 * held + TOKENS * one
    config = model.config
    assert one >= (4 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize


def test_prompts_are_as_many_as_half_the_free_memory_holds(
    make_model: Callable[..., MLAForCausalLM],
) -> None:
    model = make_model()
    each = prompt_bytes(model, 1000, 100)
    for prompts in (2, 7):
        free = 2 * (EXPANDED_BYTES + prompts * each)
        assert prompts_at_once(model, 1000, 100, free) == prompts
        assert prompts_at_once(model, 1000, 100, free - 2) == prompts - 1
    assert prompts_at_once(model, 1000, 100, 0) == 1
    assert prompts_at_once(model, 1000, 100, 2**50) == MOST_PROMPTS
    assert free_bytes(model) is None  # on a CPU


def test_a_suite_without_a_number_takes_what_fits(
    make_model: Callable[..., MLAForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = Copier(make_model(vocab_size=320).config)
    suite = CopyWord(Config(samples=5))
    sizes: list[int] = []
    answer = CopyWord.answer

    def counted(self: Any, decoder: Any, tokenizer: Any, samples: Any) -> Any:
        sizes.append(len(samples))
        return answer(self, decoder, tokenizer, samples)

    monkeypatch.setattr(CopyWord, "answer", counted)
    asked = run_suite(copier, ByteTokenizer(), suite, tmp_path / "asked.jsonl")
    suite.tokens_per_batch = None
    sizes.clear()
    run_suite(copier, ByteTokenizer(), suite, tmp_path / "cpu.jsonl")
    assert sizes == [5] * 4  # 65,536 tokens
    free = 2 * (EXPANDED_BYTES + 4 * prompt_bytes(copier, 64, 10**6))
    monkeypatch.setattr(runner, "free_bytes", lambda _: free)
    sizes.clear()
    rows = run_suite(copier, ByteTokenizer(), suite, tmp_path / "gpu.jsonl")
    assert sizes == [5, 5, 4, 1, 4, 1]  # prompts of 32 tokens take less than those of 64
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in asked]

    # Two ranks have a batch of every cell, and cut it by what the first of them has.
    sizes.clear()
    copiers = [Copier(copier.config) for _ in range(2)]
    for other in copiers:
        other.load_state_dict(copier.state_dict())
    frees = {id(copiers[0]): free, id(copiers[1]): 0}
    monkeypatch.setattr(runner, "free_bytes", lambda model: frees[id(model)])
    file = tmp_path / "two.jsonl"
    with ThreadPoolExecutor(2) as threads:
        both = threads.map(
            lambda rank: run_suite(
                copiers[rank], ByteTokenizer(), suite, file, ranks=ThreadRanks(rank)
            ),
            range(2),
        )
        for found in both:
            assert [{**row, "seconds": 0} for row in found] == [
                {**row, "seconds": 0} for row in asked
            ]
    assert sorted(sizes) == [2] * 4 + [3] * 4
