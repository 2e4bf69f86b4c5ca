"""`python -m ic convert`: the compressed form, and what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
)

from ic.checkpoint.folder import load_model
from ic.config.pretrained_model import read_shape
from ic.conversion.calibration import calibration_rows
from ic.conversion.options import ConvertOptions
from ic.errors import UsageError
from ic.inference.model_facts import model_end_tokens
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conversion.small import TEXT, Run, convert, distance, refused, write_chats

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_error_falls_with_the_rank(ic: Run, trained: Path, tmp_path: Path) -> None:
    errors = []
    for rank in (2, 4, 8, 16):
        folder = convert(ic, trained, tmp_path / f"rank{rank}", f"rank={rank}")
        rows = json.loads((folder / "conversion.json").read_text())["rows"]
        assert [row["layer"] for row in rows] == [0, 1]
        errors.append([row["output_error"] for row in rows])
    for by_rank in zip(*errors, strict=True):
        assert by_rank[0] > by_rank[1] > by_rank[2] > by_rank[3] > 0
    assert errors[-1][0] < 0.5 * errors[0][0]


def test_nothing_is_lost_where_keys_and_values_are_whole(
    ic: Run, trained: Path, tmp_path: Path
) -> None:
    theirs = LlamaForCausalLM.from_pretrained(trained)
    distances = []
    for rank in (2, 6, 12, 32):
        options = ("rope_dim=32", f"rank={rank}")
        folder = convert(ic, trained, tmp_path / f"rank{rank}", *options)
        distances.append(distance(load_model(folder), theirs))
    assert distances[0] > distances[1] > distances[2] > 10 * abs(distances[3])
    # More of the keys' rotation is kept by each rotary component.
    by_rope_dim = [
        distance(load_model(folder), theirs)
        for folder in (
            convert(ic, trained, tmp_path / "one", "rope_dim=8", "rank=40"),
            convert(ic, trained, tmp_path / "two", "rope_dim=16", "rank=40"),
        )
    ]
    assert by_rope_dim[0] > by_rope_dim[1] > distances[3]


def test_a_budget_chooses_the_rank_and_says_what_the_cache_takes(
    ic: Run, trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = convert(ic, trained, tmp_path / "half", "cache=0.5")
    out = capsys.readouterr().out
    # Of 2 * 4 * 8 = 64 numbers 32: a rotary key of 8, and a rank of 24 in steps of 16.
    assert "rank 16, rotary key 8, 8 dimensions per head without rotation" in out
    assert "256 bytes per token before, 96 after (38%)" in out  # 2 layers of 2 bytes a number
    record = json.loads((folder / "conversion.json").read_text())
    assert record["geometry"]["kv_lora_rank"] == 16
    assert (record["original"]["cache_numbers"], record["geometry"]["cache_numbers"]) == (64, 24)
    assert record["options"]["cache"] == 0.5
    assert (record["family"], record["form"]) == ("Llama", "compressed")
    assert record["calibration"] == {"rows": 8, "tokens": 128}
    model = load_model(folder)
    assert model.model.new_cache().layers  # a cache of this shape
    assert model.config.latent_dim == 24


def test_stock_transformers_generates_the_same_tokens(
    ic: Run, trained: Path, tmp_path: Path
) -> None:
    folder = convert(ic, trained, tmp_path / "converted", "rank=40")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is DeepseekV3ForCausalLM
    ours = load_model(folder)
    ids = torch.tensor([list(b"The License gives each user and")])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("user")["input_ids"] == ByteTokenizer()("user")["input_ids"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 257


def test_every_end_of_the_generation_configuration_is_carried(
    ic: Run, trained: Path, tmp_path: Path
) -> None:
    """By config.json, which is all that a run from the folder and its export keep."""
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    (source / "generation_config.json").write_text('{"eos_token_id": [65, 257]}')
    folder = convert(ic, source, tmp_path / "out", "tokenizer=bytes")
    assert not (folder / "generation_config.json").exists()
    assert read_shape(str(folder))["eos_token_id"] == [257, 65]
    assert model_end_tokens(load_model(folder)) == [257, 65]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [257, 65]


def test_dtype_shards_and_an_output_that_is_replaced(
    ic: Run, trained: Path, tmp_path: Path
) -> None:
    folder = convert(ic, trained, tmp_path / "out", "rank=16")
    assert load_model(folder).dtype == torch.float32
    convert(
        ic, trained, folder, "rank=8", "dtype=bfloat16", "max_shard_size=50KB", "overwrite=true"
    )
    model = load_model(folder)
    assert (model.dtype, model.config.kv_lora_rank) == (torch.bfloat16, 8)
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_one_long_document_gives_every_row(tmp_path: Path) -> None:
    """A book alone calibrates: 60 rows of 16 tokens are in 2,000 bytes, though one piece of a
    document is shorter; and what the refusal counts is all of it.
    """
    (tmp_path / "book.txt").write_text("".join(f"{n:03d} " for n in range(500)))
    options = ConvertOptions(
        source="x",
        output="y",
        rank=1,
        calibration=[str(tmp_path / "book.txt")],
        calibration_rows=60,
        calibration_tokens=17,
    )
    rows_MT = calibration_rows(ByteTokenizer(), options)
    assert rows_MT.shape == (60, 17)
    assert len({tuple(row) for row in rows_MT.tolist()}) == 60
    options.calibration_rows = 600
    with pytest.raises(UsageError, match=r"files hold 2,000 tokens, and 600 rows of"):
        calibration_rows(ByteTokenizer(), options)


def test_chats_calibrate_in_the_models_own_template(ic: Run, trained: Path, tmp_path: Path) -> None:
    chats, tokenizer = write_chats(tmp_path / "chats.jsonl"), ByteTokenizer()
    options = ConvertOptions(
        source="x",
        output="y",
        rank=1,
        calibration_chats=[str(chats)],
        calibration_rows=5,
        calibration_tokens=128,
    )
    rows_MT = calibration_rows(tokenizer, options)
    assert rows_MT.shape == (5, 128)
    rendered = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in chats.read_text().splitlines()
    ]
    begins = {
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:30]) for text in rendered
    }
    # Each row begins with a conversation, in order, and none begins two rows.
    assert len({tuple(row) for row in rows_MT[:, :30].tolist()} & begins) == 5
    first = tokenizer("".join(rendered), add_special_tokens=False)["input_ids"][:128]
    assert rows_MT[0].tolist() == first
    # Beside text they are half of the rows, the last ones.
    options.calibration, options.format = [str(TEXT)], "text"
    both_MT = calibration_rows(tokenizer, options)
    assert torch.equal(both_MT[3:], rows_MT[:2])
    assert tokenizer.decode(both_MT[0][1:]) in TEXT.read_text()
    folder = convert(
        *(ic, trained, tmp_path / "chats", "rank=8", "calibration=[]"),
        *(f"calibration_chats=[{chats}]", "calibration_rows=4", "calibration_tokens=64"),
    )
    record = json.loads((folder / "conversion.json").read_text())
    assert record["calibration"] == {"rows": 4, "tokens": 64}
    assert [each["name"] for each in record["calibration_files"]["named"]] == ["chats.jsonl"]
    options.calibration_rows = 1
    with pytest.raises(UsageError, match="calibration_rows=1: .* share the rows, so at least 2"):
        calibration_rows(tokenizer, options)


def test_a_report_beside_the_result(
    ic: Run, trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(
        *(ic, trained, tmp_path / "report", "rank=8", "parity.parts=[logits,cache]"),
        *("parity.lengths=[128]", "parity.documents=1", "parity.context_tokens=[256]"),
    )
    assert "give parity.text=[FILES] for text that it has not seen" in " ".join(
        capsys.readouterr().out.split()
    )
    results = json.loads((folder / "parity" / "parity.json").read_text())
    assert "that which the conversion was measured on" in " ".join(results["notes"])
    assert (folder / "parity" / "report.md").is_file()
    assert "perplexity at 128" in (folder / "README.md").read_text()  # the card tells it
    # The report belongs to the export, which may be replaced with it.
    convert(ic, trained, folder, "rank=16", "overwrite=true", "parity=null")
    assert not (folder / "parity").exists()
    options = (f"source={trained}", "output=out", f"calibration=[{TEXT}]", "format=text", "rank=8")
    err = refused(ic, capsys, monkeypatch, *options, "calibration_tokens=128")
    assert "parity.lengths=[512, 2048]: the model has 512 positions" in err
