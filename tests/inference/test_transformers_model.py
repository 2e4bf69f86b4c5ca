"""Causal language models of transformers: read in pieces over its cache, as its `generate` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ic.checkpoint.errors import CheckpointError
from ic.inference import caches
from ic.inference.greedy import GreedyDecoder
from ic.inference.loading import load_source, open_source
from ic.inference.model_facts import end_tokens
from ic.inference.options import InferenceOptions
from tests.checkpoint.gguf_files import byte_level_bpe
from tests.conftest import randomize

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 260,
    "eos_token_id": 261,
}
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    # Layers that forget what lies more than 24 tokens back: their cache cannot be cropped.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)),
}


def save(model: Any, folder: Path) -> Path:
    randomize(model.eval())
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return folder


def cpu(folder: Path, **options: Any) -> InferenceOptions:
    return InferenceOptions(checkpoint=str(folder), accelerator="cpu", **options)


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    return save(MAKERS[request.param](), tmp_path / request.param)


def prompts(*shape: int) -> torch.Tensor:
    return torch.randint(3, 255, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_answers_are_those_of_generate(folder: Path) -> None:
    loaded = load_source(cpu(folder))
    model, decoder = loaded.model, GreedyDecoder(loaded.model, 16)
    first = prompts(2, 61)
    changed = first.clone()
    changed[1, 40] += 1
    # The second begins as the first does, the third is one that came before, but shorter.
    for ids_BT in (first, changed, first[:, :50]):
        expected = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=7,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert decoder.answers(ids_BT, 7).equal(expected[:, ids_BT.shape[1] :])
    logits = model(first).logits[:, :-1].transpose(1, 2)
    nats = torch.nn.functional.cross_entropy(logits, first[:, 1:], reduction="none")
    torch.testing.assert_close(decoder.losses(first), nats, atol=1e-4, rtol=1e-4)


def test_what_prompts_have_in_common_is_read_once(tmp_path: Path) -> None:
    model = load_source(cpu(save(MAKERS["llama"](), tmp_path / "llama"))).model
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    decoder, ids_BT = GreedyDecoder(model, 16), prompts(2, 61)
    decoder.answers(ids_BT, 2)
    assert read == [16, 16, 16, 13, 1]
    read.clear()
    changed = ids_BT.clone()
    changed[1, 40] += 1
    decoder.answers(changed, 2)
    assert read == [16, 5, 1]


def test_pieces_are_as_long_as_their_mask_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece behind others has a mask of piece x tokens; a whole prompt has none."""
    monkeypatch.setattr(caches, "MASK_ELEMENTS", 1000)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert caches.piece_tokens(llama, 64, 64) == 64
    assert caches.piece_tokens(llama, 64, 100) == 10
    assert caches.piece_tokens(llama, 8, 100) == 8


@torch.no_grad()
def test_an_answer_ends_at_the_end_tokens(tmp_path: Path) -> None:
    loaded = load_source(cpu(save(MAKERS["llama"](), tmp_path / "llama")))
    ids_BT = prompts(2, 20)
    whole = GreedyDecoder(loaded.model, 16).answers(ids_BT, 9)
    assert end_tokens(loaded.model, loaded.tokenizer) == [261]
    # What the rows say third and fifth ends them: the longer one decides when all have ended.
    loaded.model.generation_config.eos_token_id = [int(whole[0, 2]), int(whole[1, 4])]
    ends = end_tokens(loaded.model, loaded.tokenizer)
    assert ends[0] == 261
    calls: list[int] = []
    loaded.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    answered = GreedyDecoder(loaded.model, 64, ends=ends).answers(ids_BT, 9)
    until = [min(row.index(end) for end in ends if end in row) for row in whole.tolist()]
    assert answered.shape[1] == max(until) + 1
    assert len(calls) == max(until) + 1
    for row, expected, end in zip(answered.tolist(), whole.tolist(), until, strict=True):
        assert row == expected[:end] + [261] * (len(row) - end)


def test_a_gguf_file(tmp_path: Path) -> None:
    """Written by the package `gguf`, as llama.cpp's converter does."""
    from gguf import GGUFWriter

    torch.manual_seed(5)
    reference = MAKERS["llama"]()
    randomize(reference.eval())
    save(reference, tmp_path / "llama")
    writer = GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(reference.config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    of_layer = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    }
    for name, tensor in reference.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            theirs = f"blk.{layer}.{of_layer[rest]}"
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                # llama.cpp rotates neighbours, transformers halves.
                heads = tensor.shape[0] // 8
                tensor = tensor.reshape(heads, 2, 4, -1).transpose(1, 2).reshape(tensor.shape)
        else:
            theirs = names[stem]
        writer.add_tensor(f"{theirs}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_source(cpu(tmp_path / "llama.gguf", tokenizer=str(tmp_path / "llama")))
    assert type(loaded.model) is LlamaForCausalLM
    with torch.no_grad():
        ids_BT = prompts(1, 30)
        got, expected = loaded.model(ids_BT).logits, reference(ids_BT).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert loaded.name == "llama"


def test_positions_are_known_before_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert open_source(cpu(folder)).positions == 512


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"1234"), "the weights in .* cannot be"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter beside its"),
        (lambda f: edit(f, num_hidden_layers=3), "lacks 9 tensors of its model, the first is mod"),
        (lambda f: edit(f, hidden_size="wide"), "cannot be loaded: "),
    ],
    ids=["damaged", "adapter", "fewer", "config"],
)
def test_unusable_folders(tmp_path: Path, break_it: Callable[[Path], Any], message: str) -> None:
    folder = save(MAKERS["llama"](), tmp_path / "llama")
    break_it(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_source(cpu(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_refuses_what_only_our_models_have(tmp_path: Path) -> None:
    folder = save(MAKERS["qwen2"](), tmp_path / "qwen2")
    with pytest.raises(ValueError, match=r"attention=triton: .*qwen2 is no model of ours"):
        load_source(cpu(folder, attention="triton"))
    with pytest.raises(ValueError, match=r"cache_dtype=int8: .*qwen2 is no model of ours.* leave"):
        load_source(cpu(folder, cache_dtype="int8"))
    state_space = MambaForCausalLM(
        MambaConfig(vocab_size=264, hidden_size=32, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(CheckpointError, match="a mamba (keeps no cache|cannot be read in pieces)"):
        load_source(cpu(save(state_space, tmp_path / "mamba")))


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = save(MAKERS["llama"](), tmp_path / "llama")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass E: pass\n")
    edit(folder, auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"})
    assert type(load_source(cpu(folder)).model) is LlamaForCausalLM
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", MAKERS)
def test_prompts_of_near_lengths_are_answered_as_each_alone(kind: str) -> None:
    """Together, but for a model that counts the places of its cache: there they are one by one."""
    torch.manual_seed(0)
    model = MAKERS[kind]()
    randomize(model.eval())
    generator = torch.Generator().manual_seed(8)
    prompts = [torch.randint(0, 260, (n,), generator=generator) for n in (60, 57, 64, 61)]
    alone = [GreedyDecoder(model, 1000).answers(prompt[None], 9)[0] for prompt in prompts]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    for piece in (1000, 7):
        rows.clear()
        together = GreedyDecoder(model, piece).answers_of_any_length(prompts, 9)
        assert all(a.equal(b) for a, b in zip(together, alone, strict=True))
        assert set(rows) == ({1} if kind == "mistral" else {4})
    # With tied random weights a model says one token again and again.
    assert len({tuple(answer.tolist()) for answer in alone}) > (kind != "qwen2")
