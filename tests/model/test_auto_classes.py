"""What transformers' Auto classes load in a fresh process: with `import ic.model` and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "abc",
    "größe 中文\n\t 🙂",
    "a<|user|>b <|end|> c",
    "  x  <|eos|> y's , .",
    "a<|new|> b",
    "",
]
PROBE = """
import json, sys
{imports}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
ids = tokenizer(texts)["input_ids"]
chat = [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content": "größe"}}]
print(json.dumps([
    type(tokenizer).__name__,
    ids,
    [tokenizer.decode(row) for row in ids],
    [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    tokenizer.decode([0xFF, 65, 0xC3]),
    dict(tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)),
    [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    {model},
]))
"""
AUTO = "from transformers import AutoModelForCausalLM, AutoTokenizer"
MODEL = "type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__"


def probe(imports: str, model: str, folder: Path) -> list[object]:
    code = PROBE.format(imports=imports, model=model)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(TEXTS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    MLAForCausalLM(MLAConfig(**SMALL)).save_pretrained(tmp_path)
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_import_alone_registers_everything(folder: Path) -> None:
    first = probe(f"{AUTO}\nimport ic.model", MODEL, folder)
    assert (first[0], first[-1]) == ("ByteTokenizer", "MLAForCausalLM")
    tokenizer = ByteTokenizer.from_pretrained(folder)
    assert first[1] == [tokenizer(text)["input_ids"] for text in TEXTS]
    # Without any import a folder's tokenizer is one of the library `tokenizers`, and does the same.
    without = probe("from transformers import AutoTokenizer", "None", folder)
    assert without[0] == "TokenizersBackend"
    assert without[1:-1] == first[1:-1]
