"""An export without extensions generates the same tokens in transformers' own DeepSeek-V3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from ic.checkpoint.export import export_checkpoint
from ic.checkpoint.folder import FolderCheckpointIO, load_model
from ic.checkpoint.source import find_source
from ic.model import MLAConfig, MLAForCausalLM
from ic.model.config import EXTENSION_KEYS
from tests.conftest import SMALL, randomize
from tests.evaluation.small_bpe import small_bpe

ROPE = {"rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full_q": {"q_lora_rank": None},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "half_split": {"rope_interleave": False},
    "rotated_alone": {"qk_nope_head_dim": 0},
    "yarn": {
        "rope_parameters": ROPE
        | {
            "rope_type": "yarn",
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        }
    },
    "linear": {"rope_parameters": ROPE | {"rope_type": "linear"}},
    "llama3": {"rope_parameters": ROPE | LLAMA3 | {"rope_type": "llama3"}},
    "one_special_token": {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1},
    "no_begin": {"pad_token_id": None, "bos_token_id": None},
}
PROMPTS = ["The sea was calm", "You will be given a recipe for bread; the news"]


def exported(model: MLAForCausalLM, folder: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saved = FolderCheckpointIO(model.config, small_bpe())
    saved.save_checkpoint({"state_dict": state}, folder / "step=1")
    export_checkpoint(find_source(folder / "step=1"), folder / "out")
    return folder / "out"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_the_same(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": len(small_bpe()), "rms_norm_eps": 1e-2}
    model = MLAForCausalLM(MLAConfig(**{**sizes, **VARIANTS[variant]})).eval()
    randomize(model)
    out = exported(model, tmp_path)
    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == "deepseek_v3"
    assert not set(EXTENSION_KEYS) & set(values)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs) is DeepseekV3ForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(PROMPTS)["input_ids"] == small_bpe()(PROMPTS)["input_ids"]
    for ours in (model, load_model(out)):
        for length in (1, 90):
            ids = torch.randint(4, sizes["vocab_size"], (2, length))
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)
            how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
            tokens = ours.generate(ids, **how, pad_token_id=0)
            assert tokens.equal(theirs.generate(ids, **how, pad_token_id=0))


@torch.no_grad()
def test_generation_ends_at_each_of_several_tokens(
    ic: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": len(small_bpe()), "pad_token_id": None, "bos_token_id": None}
    model = MLAForCausalLM(MLAConfig(**sizes)).eval()
    randomize(model)
    tokenizer = small_bpe()
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    text = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, length:]
    in_order = list(dict.fromkeys(text.tolist()))
    ends = [in_order[4], in_order[2]]
    until = text.tolist().index(ends[1]) + 1
    model.config.eos_token_id = ends
    out = exported(model, tmp_path)
    for loaded in (load_model(out), AutoModelForCausalLM.from_pretrained(out).eval()):
        assert loaded.config.eos_token_id == ends
        assert loaded.config.pad_token_id is None
        assert loaded.config.bos_token_id is None
        ended = loaded.generate(ids, max_new_tokens=12, do_sample=False)
        assert ended[0, length:].equal(text[:until])
    # The tokenizer has another end.
    capsys.readouterr()
    assert ic("generate", f"checkpoint={out}", f'prompt="{PROMPTS[1]}"', "max_new_tokens=12") == 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(text[:until]).strip()
