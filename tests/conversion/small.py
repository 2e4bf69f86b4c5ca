"""A small trained model of four KV heads, its conversion, and conversations to calibrate on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ic.files.json_lines import write_rows
from ic.model.byte_tokenizer import ByteTokenizer

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "LICENSE"  # a text that stays as it is
SMALL = ("calibration_rows=8", "calibration_tokens=128", "accelerator=cpu", "format=text")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with four KV heads that has learned the bytes of a page, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    bytes_T = torch.tensor(list(TEXT.read_bytes()))
    for _ in range(100):
        start_B = torch.randint(0, len(bytes_T) - 128, (8,))
        ids_BT = bytes_T[start_B[:, None] + torch.arange(128)]
        loss = model(ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3  # 5.8 before it has learned anything
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 257}')
    return folder


@torch.no_grad()
def distance(ours: Any, theirs: PreTrainedModel) -> float:
    """Mean KL to the original's next-token distribution on the page, in nats per token."""
    ids_BT = torch.tensor(list(TEXT.read_bytes()[:2048])).view(8, 256)
    ours_log, theirs_log = (model(ids_BT).logits.log_softmax(-1) for model in (ours, theirs))
    return float((theirs_log.exp() * (theirs_log - ours_log)).sum(-1).mean())


def convert(ic: Run, source: Path, output: Path, *options: str) -> Path:
    parity = () if any("parity" in option for option in options) else ("parity=null",)
    given = (f"source={source}", f"output={output}", f"calibration=[{TEXT}]", *SMALL, *parity)
    assert ic("convert", *given, *options) == 0
    return output


def write_chats(file: Path, count: int = 40) -> Path:
    write_rows(
        file,
        (
            {
                "messages": [
                    {"role": "user", "content": f"What comes after {n}?"},
                    {"role": "assistant", "content": f"{n + 1} comes after {n}."},
                ]
            }
            for n in range(count)
        ),
    )
    return file


def refused(ic: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The one line that a conversion is refused with, before it has read a weight."""

    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("ic.conversion.convert.load_transformers_model", loads)
    capsys.readouterr()
    assert ic("convert", *options) == 2
    err = capsys.readouterr().err
    assert re.fullmatch("ic: .*\n", err), err
    assert not Path("out").exists()
    return err
