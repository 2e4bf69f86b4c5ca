"""`slurm/convert_128k.sh` on a small model: every stage with its own options, and what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ic.model.byte_tokenizer import ByteTokenizer
from tests.checkpoint.gguf_files import byte_level_bpe

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "trainer.accelerator=cpu trainer.precision=32-true trainer.max_steps=2 strategy=auto "
    "trainer.val_check_interval=2 model.attention=torch model.norm=torch model.rope=torch "
    "data.num_workers=0 callbacks.memory=null"
)
HEAL = f"{SMALL} model.compile=false distillation.compile=false data.num_streams=1"
LONG = (
    f"{SMALL} model.compile=false data.context_length=512 data.tokens_per_batch=512 "
    "data.max_position=2048 data.least_document_tokens=600 data.val_batches=1"
)
# Random weights end no turn.
CHATS = (
    "count=6 batch_size=3 max_question_tokens=8 max_answer_tokens=8 keep_unfinished=true "
    "answer_temperature=1 most_attempts=50 accelerator=cpu"
)
# Where each run begins, below the output folder.
STARTS = {"heal": "converted", "long_8k": "heal/0", "long_96k": "long_8k/0", "sft": "long_96k/0"}
SUITES = ("niah", "ruler", "perplexity")
ASKED = " ".join(f"suite.{name}.lengths=[1024] suite.{name}.samples=1" for name in SUITES)
ASKED += (
    " suite.perplexity.tasks=[full] suite.niah.tasks=[own_words] suite.ruler.tasks=[niah_single_2]"
)


def save_original(folder: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special: dict[str, Any] = {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=512, **sizes, **heads, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_every_stage_runs_and_a_second_start_trains_nothing(tmp_path: Path) -> None:
    save_original(tmp_path / "original", ByteTokenizer())
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="<|end|>")
    save_original(tmp_path / "bare", bare)
    pages = [json.dumps(path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))]
    for name, some in (("text", pages[1:20]), ("held_out", pages[20:24])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "IC_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "GPUS": "1",
        "OUT": str(out),
        "CONVERT": "rank=16 calibration_rows=4 calibration_tokens=128 accelerator=cpu",
        "HEAL": f"{HEAL} data.context_length=128 data.tokens_per_batch=256",
        "LONG_8K": f"{LONG} callbacks.context_length.stages=[[0,256],[1,512]]",
        "LONG_96K": f"{LONG} callbacks.context_length.stages=[[0,512]]",
        "CHATS": CHATS,
        "SFT": f"{SMALL} data.context_length=512 data.tokens_per_batch=512 data.max_position=2048",
        "PARITY": "lengths=[128] documents=2 instructions=2 answer_tokens=4 accelerator=cpu "
        "context_tokens=[256]",
        "EVALUATE": f"{ASKED} accelerator=cpu attention=torch norm=torch rope=torch",
    }
    files = [str(tmp_path / name) for name in ("original", "text.jsonl", "text.jsonl")]
    command = ["bash", "slurm/convert_128k.sh", *files, str(tmp_path / "held_out.jsonl")]

    def run(code: int = 0, original: str = "original", **changes: str) -> str:
        command[2] = str(tmp_path / original)
        done = subprocess.run(
            command, cwd=ROOT, env=environment | changes, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    # Without a chat template neither chats nor what is trained on them is checked.
    said = run(2, "bare", OUT=str(tmp_path / "no_chats"), CHATS="count=0", EVALUATE="nope=1")
    assert "bare has no chat template: no chats are made" in said
    assert "unknown key 'nope'" in said
    assert "count=0: must be at least 1" in run(2, CHATS="count=0")
    assert "suite.niah.samples=0: must be" in run(2, EVALUATE="suite.niah.samples=0")
    # What only the model tells of its chats ends the script before healing, too.
    assert "the model has 512 positions" in run(2, CHATS=f"{CHATS} turns=40")
    assert "only 0 of 6" in run(1, CHATS=f"{CHATS} keep_unfinished=false most_attempts=1")
    assert not (out / "heal").exists()
    (out / "chats.jsonl.batches").unlink()
    assert "has no chat template" not in run()
    fits = {name: json.loads((out / name / "0/results.json").read_text()) for name in STARTS}
    for name, fit in fits.items():
        assert fit["status"] == "finished"
        assert fit["config"]["model"]["init_from"] == str(out / STARTS[name])
    asked = fits["sft"]["config"]["data"]
    assert asked["train_files"] == [str(out / "chats.jsonl")]
    assert asked["needle_files"] == [str(tmp_path / "text.jsonl")]
    chats = (out / "chats.jsonl").read_bytes()
    assert [len(json.loads(line)["messages"]) for line in chats.splitlines()] == [2] * 6
    assert (out / "sft/parity/report.md").is_file()
    assert not (out / "long_96k/parity").exists()
    report = (out / "sft/suites/report.md").read_text()
    assert all(name in report for name in SUITES)
    again = run()
    assert {name: json.loads((out / name / "0/results.json").read_text()) for name in fits} == fits
    assert (out / "chats.jsonl").read_bytes() == chats
    assert "step 1/2" not in again
    assert "conversations" not in again
