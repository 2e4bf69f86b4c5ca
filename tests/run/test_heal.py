"""A small model with grouped queries, trained here, is converted to half its cache and healed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ic.checkpoint.folder import load_model
from ic.model.byte_tokenizer import ByteTokenizer

DOCS = Path(__file__).parents[2] / "docs"
TOKENS = 128


def texts() -> tuple[str, str]:
    """The project's own pages: to train on, and held out."""
    pages = [path.read_text() for path in sorted(DOCS.glob("*.md"))]
    return "\n\n".join(pages[1:]), pages[0]


def rows_of(text: str) -> Tensor:
    ids = torch.tensor(ByteTokenizer().encode(text, add_special_tokens=False))
    return ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)


def train(rows: Tensor, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=258,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 6e-3, total_steps=steps, pct_start=0.1
    )
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    logits = model(input_ids=rows, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).exp())


@pytest.mark.slow
def test_half_the_cache_comes_within_five_per_cent(
    ic: Callable[..., int], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    trained, held_out = texts()
    rows = rows_of(held_out)[:64]
    original = train(rows_of(trained), 300)
    original.save_pretrained(tmp_path / "original")
    ByteTokenizer().save_pretrained(tmp_path / "original")
    (tmp_path / "pages.txt").write_text(trained)
    assert (
        ic(
            "convert",
            "source=original",
            "output=converted",
            "cache=0.5",
            "calibration=[pages.txt]",
            "calibration_rows=8",
            "calibration_tokens=256",
            "parity=null",
        )
        == 0
    )
    assert (
        ic(
            "fit",
            "experiment=heal",
            "model.init_from=converted",
            "distillation.teacher=original",
            "data.train_files=[pages.txt]",
            "data.document_unit=paragraph",
            f"data.context_length={TOKENS}",
            f"data.tokens_per_batch={16 * TOKENS}",
            "data.num_workers=0",
            "data.num_streams=1",
            "optimizer.lr=4e-3",
            "optimizer.warmup_steps=10",
            "trainer.max_steps=150",
            "trainer.accelerator=cpu",
            "trainer.devices=1",
            "trainer.val_check_interval=150",
            "trainer.num_sanity_val_steps=0",
            "callbacks.memory=null",
            "callbacks.samples=null",
            "logger=none",
        )
        == 0
    )
    converted = load_model(tmp_path / "converted")
    healed = load_model(tmp_path / "runs/heal/default/checkpoints/last")
    heads = original.config.num_key_value_heads * original.config.head_dim
    assert healed.config.latent_dim == 2 * heads // 2
    before, after, wanted = (perplexity(m, rows) for m in (converted, healed, original))
    record_property("perplexity", {"original": wanted, "converted": before, "healed": after})
    print(f"perplexity: original {wanted:.3f}, converted {before:.3f}, healed {after:.3f}")
    assert wanted < 20  # of 256 bytes: it has learned something to lose
    assert before > after
    assert after < 1.05 * wanted
