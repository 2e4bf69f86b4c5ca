"""A model against itself over a quantised cache, and conversations of several turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ic.conversion.parity.cache_bytes import context_bytes, read_prompt
from ic.conversion.parity.instructions import conversations, prompt_after
from ic.conversion.parity.options import ParityOptions
from ic.conversion.parity.run import measure_parity
from ic.conversion.parity.turns import _Reader
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conversion.parity import models
from tests.conversion.parity.models import options

Row = dict[str, Any]


def rows_of(results: Row, what: str) -> list[Row]:
    return [row for row in results["rows"] if row["what"] == what]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_model_over_a_quantised_cache(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The same weights, half the bytes of the cache, and no turn that is much worse than the first."""
    given = {"parts": ["logits", "weights", "cache", "turns"], "lengths": [256]}
    given |= {"conversations": 2, "turns": 3, "answer_tokens": 8, "output": str(tmp_path)}
    results = measure_parity(options(folders, "mla", "mla", cache_dtype=kind, **given))
    assert results["models"]["converted"]["name"] == f"mla, {kind} cache"
    assert results["models"]["original"]["name"] == "mla"
    (weights,) = rows_of(results, "weights")
    assert weights["ratio"] == 1
    assert weights["bytes_original"] == sum(
        p.nbytes for p in models.load(folders["mla"]).parameters()
    )
    cache = [row for row in rows_of(results, "cache") if row["by"] == "context"]
    width = models.RANK + models.ROPE
    for row in cache:
        assert row["bytes_original"] == row["context_tokens"] * models.LAYERS * width * 4
        assert row["bytes_converted"] == row["context_tokens"] * models.LAYERS * (width + 4)
    (whole,) = [row for row in rows_of(results, "logits") if row["position"] == "all"]
    assert 0 < whole["kl"] < 0.01
    turns = rows_of(results, "turns")
    assert [(row["turn"], row["n"], row["n_tokens"] > 0) for row in turns] == [
        (i, 2, True) for i in (1, 2, 3)
    ]
    assert all(0 < row["kl"] < 0.01 for row in turns)
    page = (tmp_path / "report.md").read_text()
    assert "| turn 3, original's tokens kept |" in page
    assert "2 conversations of 3 turns." in page


def test_conversations_of_a_model_with_itself_differ_in_nothing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    given = {"parts": ["turns"], "conversations": 1, "turns": 2, "answer_tokens": 5}
    results = measure_parity(options(folders, "llama", "llama", output=str(tmp_path), **given))
    for row in rows_of(results, "turns"):
        assert (row["kl"], row["agreement"], row["difference"]) == (0, 1, 0)


@torch.no_grad()
def test_a_reader_over_turns_gives_what_one_pass_gives(folders: dict[str, Path]) -> None:
    """Also where the next prompt takes back the end of the last answer; and a spoilt cache shows in
    the turns that read it again.
    """
    tokenizer = ByteTokenizer()
    model = models.load(folders["mla"])
    asked = conversations(ParityOptions(conversations=2, turns=3))[1]
    assert len(asked) == 3
    for spoilt in (False, True):
        reader, messages = _Reader(model, 50), []
        errors = []
        for instruction in asked:
            messages.append({"role": "user", "content": instruction})
            prompt = torch.from_numpy(prompt_after(tokenizer, messages))
            ids = torch.cat((prompt, torch.arange(97, 110)))
            expected = model(ids[None]).logits[0, len(prompt) - 1 : -1]
            got = reader.read(ids, len(prompt))
            errors.append(float((got - expected).norm() / expected.norm()))
            messages.append({"role": "assistant", "content": "abc"})
            if spoilt:
                for layer in reader._cache.layers:
                    layer.buffer[:, 3:9] *= 1.5
        assert errors[0] < 1e-5
        assert all((error > 1e-4) == spoilt for error in errors[1:]), errors


def test_bytes_of_a_context_count_the_scales(folders: dict[str, Path]) -> None:
    model = models.load(folders["mla"])
    model.config.cache_dtype = "int8"
    layers = read_prompt(model)
    width = models.RANK + models.ROPE
    assert context_bytes(model, layers, 1000) == 1000 * models.LAYERS * (width + 4)


def test_conversations_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="conversations=10 of turns=6: the package has 50"):
        ParityOptions(conversations=10, turns=6)
    given = {"parts": ["turns"], "turns": 10, "answer_tokens": 400}
    with pytest.raises(
        ValueError, match="turns=10 with answer_tokens=400: a conversation has up to"
    ):
        measure_parity(options(folders, "mla", "llama", **given))
