"""The exact form computes what the original does, for every family and each of its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ic.checkpoint.folder import load_model
from ic.conversion.convert import convert, prepare
from ic.conversion.options import ConvertOptions
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.gqa import FAMILIES

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MSCALES = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "llama_yarn_mscale": ("llama", {"rope_parameters": MSCALES}),
    "llama_llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_linear": ("llama", {"rope_parameters": LINEAR}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("qwen2", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "qwen3_biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_mqa": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": YARN}),
    "mistral_inactive_window": ("mistral", {"sliding_window": 512}),
}


def original(case: str, folder: Path) -> PreTrainedModel:
    """A small model of a family with random weights, saved with a byte tokenizer."""
    family, changes = CASES[case]
    model = FAMILIES[family].model(vocab_size=320, **changes)
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return model


def converted(folder: Path, **options: Any) -> MLAForCausalLM:
    output = folder.with_name("converted")
    chosen = ConvertOptions(
        source=str(folder), output=str(output), accelerator="cpu", parity=None, **options
    )
    convert(prepare(chosen), chosen, lambda done, total: None)
    return load_model(output)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 320, (2, 150), generator=torch.Generator().manual_seed(1))
    result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("case", CASES)
def test_the_exact_form_gives_the_originals_logits(case: str, tmp_path: Path) -> None:
    theirs = original(case, tmp_path / "original")
    ours = converted(tmp_path / "original")
    config = ours.config
    groups, heads = theirs.config.num_key_value_heads, theirs.config.num_attention_heads
    dim = getattr(theirs.config, "head_dim", None) or theirs.config.hidden_size // heads
    assert config.kv_lora_rank + config.qk_rope_head_dim == 2 * groups * dim  # GQA's own cache
    expected = logits(theirs)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
