"""The parity of two models: each number against one computed by hand, from full logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from ic.conversion.parity import distributions, speed
from ic.conversion.parity.answers import answers_to, similarity
from ic.conversion.parity.cache_bytes import context_bytes, read_prompt
from ic.conversion.parity.distributions import token_distances
from ic.conversion.parity.instructions import prompt_of, shipped_instructions
from ic.conversion.parity.options import ParityConfig
from ic.conversion.parity.run import measure_parity
from ic.evaluation.statistics import mean_interval
from ic.inference.greedy import GreedyDecoder
from ic.model.byte_tokenizer import ByteTokenizer
from tests.conversion.parity import models
from tests.conversion.parity.models import options

Row = dict[str, Any]


@pytest.fixture(scope="module")
def report(folders: dict[str, Path]) -> Row:
    """Of all parts, a Llama against another model of ours."""
    return measure_parity(options(folders, "llama", "mla"))


def test_what_may_be_published_names_no_folder_of_the_machine(
    report: Row, folders: dict[str, Path]
) -> None:
    output = folders["reports"] / "llama_mla"
    assert report["models"]["original"]["source"] == "llama"
    assert report["config"]["original"] == "llama"
    here = str(folders["reports"].parent)
    texts = [file for kind in ("json", "jsonl", "md", "csv") for file in output.rglob(f"*.{kind}")]
    assert len(texts) > 10
    assert [str(file) for file in texts if here in file.read_text()] == []


def rows_of(results: Row, what: str, **wanted: Any) -> list[Row]:
    rows = [row for row in results["rows"] if row["what"] == what]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@torch.no_grad()
def by_hand(original: Any, converted: Any, ids_T: np.ndarray) -> dict[str, np.ndarray]:
    """From all logits at once, in float64."""
    ids = torch.from_numpy(ids_T.astype(np.int64))[None]
    p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (original, converted))
    targets = ids[0, 1:, None]
    return {
        "kl": torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).numpy(),
        "agrees": (p.argmax(-1) == q.argmax(-1)).numpy(),
        "nats_original": -p.gather(-1, targets)[:, 0].numpy(),
        "nats_converted": -q.gather(-1, targets)[:, 0].numpy(),
    }


@pytest.mark.parametrize("piece", [1, 37, 299, 131072])
def test_pieces_give_what_all_logits_at_once_give(
    folders: dict[str, Path], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "_COMPARED_BYTES", 4 * 320 * 10)
    original, converted = models.load(folders["llama"]), models.load(folders["mla"])
    length = 40 if piece == 1 else 300
    ids_T = np.random.default_rng(0).integers(0, 256, length)
    read: list[int] = []
    found = token_distances(
        original,
        converted,
        ids_T,
        320,
        both_tokens=10_000,
        prefill_chunk_tokens=piece,
        on_tokens=read.append,
    )
    for name, wanted in by_hand(original, converted, ids_T).items():
        np.testing.assert_allclose(getattr(found, name), wanted, atol=1e-5, rtol=0)
    assert sum(read) == length - 1
    assert max(read) == min(piece, length - 1)


def test_what_is_beyond_the_originals_positions_is_read_by_the_converted_alone(
    folders: dict[str, Path],
) -> None:
    original, converted = models.load(folders["llama"]), models.load(folders["mla"])
    ids_T = np.random.default_rng(1).integers(0, 256, 200)
    found = token_distances(
        original, converted, ids_T, 320, both_tokens=90, prefill_chunk_tokens=64
    )
    wanted = by_hand(original, converted, ids_T)
    assert [len(found.kl), len(found.agrees), len(found.nats_original)] == [89, 89, 89]
    np.testing.assert_allclose(found.kl, wanted["kl"][:89], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.nats_converted, wanted["nats_converted"], atol=1e-5, rtol=0)


def test_padded_vocabularies_are_compared_where_both_have_tokens(folders: dict[str, Path]) -> None:
    model = models.load(folders["llama"])
    padded = models.load(folders["llama"])
    padded.resize_token_embeddings(384, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[320:] = 3.0
    ids_T = np.random.default_rng(2).integers(0, 256, 50)
    found = token_distances(model, padded, ids_T, 320, both_tokens=50, prefill_chunk_tokens=64)
    assert found.kl.max() == 0
    assert found.agrees.all()


def test_rows_of_texts_are_means_over_documents(report: Row, folders: dict[str, Path]) -> None:
    original, converted = models.load(folders["llama"]), models.load(folders["mla"])
    first = ByteTokenizer()("a")["input_ids"][:-1]
    texts = folders["text"].read_text().split("\n\n")
    for length in (256, 600):
        found = [
            by_hand(original, converted, np.asarray([*first, *text.encode()][:length]))
            for text in texts
        ]
        (row,) = rows_of(report, "logits", length_tokens=length, position="all")
        apart = [each["nats_converted"].mean() - each["nats_original"].mean() for each in found]
        low, high = mean_interval(apart) or (0.0, 0.0)
        kl = np.concatenate([each["kl"] for each in found])
        expected = {
            "kl": kl.mean(),
            "kl_median": np.median(kl),
            "kl_p99": np.quantile(kl, 0.99),
            "agreement": np.mean([each["agrees"].mean() for each in found]),
            "perplexity_original": math.exp(np.mean([e["nats_original"].mean() for e in found])),
            "perplexity_converted": math.exp(np.mean([e["nats_converted"].mean() for e in found])),
            "ratio": math.exp(np.mean(apart)),
            "ratio_low_95": math.exp(low),
            "ratio_high_95": math.exp(high),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5), (length, name)
        assert (row["n"], row["n_tokens"]) == (3, 3 * (length - 1))
    buckets = rows_of(report, "logits", length_tokens=600, position="bucket")
    assert [(row["from_token"], row["to_token"]) for row in buckets] == [
        (1, 128),
        (128, 256),
        (256, 512),
        (512, 600),
    ]
    assert buckets[2]["kl"] == pytest.approx(
        np.mean([each["kl"][255:511].mean() for each in found]), rel=1e-5
    )


def test_cache_bytes_are_what_the_shapes_say(report: Row) -> None:
    rows = rows_of(report, "cache")
    assert [(row["by"], row["context_tokens"]) for row in rows] == [
        ("prompt", 64),
        ("context", 512),
        ("context", 8192),
    ]
    of_llama = 2 * models.LAYERS * models.KV_HEADS * models.HEAD_DIM * 4
    of_mla = models.LAYERS * (models.RANK + models.ROPE) * 4
    for row in rows:
        assert row["bytes_original"] == of_llama * row["context_tokens"]
        assert row["bytes_converted"] == of_mla * row["context_tokens"]
        assert row["bytes_per_token_converted"] == of_mla
        assert row["ratio"] == of_mla / of_llama


def test_a_sliding_window_takes_no_more_than_its_window() -> None:
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=24,
    )
    model = MistralForCausalLM(config).eval()
    layers = read_prompt(model)
    assert context_bytes(model, layers, 5000) == context_bytes(model, layers, 24)
    assert context_bytes(model, layers, 24) < 2 * context_bytes(model, layers, 12)


def test_instructions_are_answered_by_both(report: Row, folders: dict[str, Path]) -> None:
    original, converted = models.load(folders["llama"]), models.load(folders["mla"])
    output = folders["reports"] / "llama_mla"
    lines = (output / "answers.jsonl").read_text().splitlines()
    answers = {row["instruction"]: row for row in map(json.loads, lines)}
    tokenizer = ByteTokenizer()
    firsts, kls, agreements = [], [], []
    assert len(answers) == len(lines) == 3
    for asked in shipped_instructions()[:3]:
        row = answers[asked.instruction]
        assert row["kind"] == asked.kind
        prompt = prompt_of(tokenizer, asked.instruction)
        ids = torch.from_numpy(prompt)[None]
        told = [
            model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[257])[
                0, len(prompt) :
            ]
            for model in (original, converted)
        ]
        texts = [str(tokenizer.decode(each, skip_special_tokens=True)).strip() for each in told]
        assert [row["original"], row["converted"]] == texts
        firsts.append(bool(told[0][0] == told[1][0]))
        wanted = by_hand(original, converted, np.concatenate([prompt, told[0].numpy()]))
        kls.append(wanted["kl"][len(prompt) - 1 :].mean())
        agreements.append(wanted["agrees"][len(prompt) - 1 :].mean())
    (row,) = rows_of(report, "instructions")
    assert row["n"] == 3
    assert row["kl"] == pytest.approx(np.mean(kls), rel=1e-5)
    assert row["agreement"] == pytest.approx(np.mean(agreements))
    assert row["same_first_share"] == np.mean(firsts)
    page = (output / "answers.md").read_text()
    assert all(f"> {asked.instruction}" in page for asked in shipped_instructions()[:3])


@pytest.mark.parametrize("kind", ["llama", "mla"])
def test_answers_of_many_prompts_are_those_of_each(folders: dict[str, Path], kind: str) -> None:
    model = models.load(folders[kind])
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    asked = [prompt_of(ByteTokenizer(), each.instruction) for each in shipped_instructions()[:9]]

    def answers(ends: list[int], *, together: bool) -> tuple[list[list[int]], int]:
        passes.clear()
        decoder = GreedyDecoder(model, 4096, ends=ends)
        parts = [asked] if together else [[prompt] for prompt in asked]
        given = [each for part in parts for each in answers_to(decoder, part, 12)]
        return given, len(passes)

    endless, _ = answers([], together=False)
    # An end that some answers have and others lack, as far as this model goes on in various ways.
    end = max(
        {token for each in endless for token in each[1:-1]},
        key=lambda t: -abs(sum(t in each for each in endless) - 4),
    )
    alone, many = answers([end], together=False)
    together, few = answers([end], together=True)
    assert together == alone
    assert len({len(each) for each in alone}) > 1
    assert few < many / 2


def test_needles_are_the_same_for_both_and_compared(report: Row, folders: dict[str, Path]) -> None:
    output = folders["reports"] / "llama_mla"
    for suite in ("passkey", "niah"):
        asked = []
        for side in ("original", "converted"):
            lines = (output / side / suite / "samples.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            asked.append([(row["depth"], row["index"], row["expected"]) for row in rows])
            assert len({row["model"] for row in rows}) == 1
        assert asked[0] == asked[1]
        assert len(asked[0]) == 5
        (row,) = rows_of(report, "comparison", suite=suite, whole_suite=True)
        assert row["n"] == 5
    assert {row["model"] for row in rows_of(report, "niah")} == {"original", "converted"}
    assert any(sentence.startswith("niah") for sentence in report["words"])


def test_speed_takes_turns_and_says_on_what(report: Row) -> None:
    (row,) = rows_of(report, "speed")
    assert row["cache_tokens"] == 64
    assert (row["n"], row["batch"], row["decode_tokens"], row["dtype"]) == (3, 1, 4, "float32")
    for phase in ("prefill", "decode"):
        for side in ("original", "converted"):
            name = f"{phase}_tokens_per_s_{side}"
            assert 0 < row[f"{name}_least"] <= row[name] <= row[f"{name}_most"]
        name = f"{phase}_tokens_per_s"
        assert row[f"{phase}_ratio"] == row[f"{name}_converted"] / row[f"{name}_original"]


def test_speed_is_the_median_of_alternating_measurements(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    seconds = iter([9.0, 9.0, 1.0, 2.0, 4.0, 4.0, 2.0, 8.0])

    def measure(model: Any, tokens: int, config: ParityConfig) -> tuple[float, float]:
        turns.append(type(model).__name__)
        taken = next(seconds)
        return taken, 2 * taken

    monkeypatch.setattr(speed, "_measure", measure)
    config = options(folders, "llama", "mla", output=str(tmp_path / "out"), parts=["speed"])
    (row,) = rows_of(measure_parity(config), "speed")
    assert turns == ["LlamaForCausalLM", "MLAForCausalLM"] * 4
    assert row["prefill_tokens_per_s_original"] == 64 / 2
    assert row["decode_tokens_per_s_converted"] == 4 / 8
    assert row["prefill_ratio"] == (64 / 4) / (64 / 2)


def test_a_model_against_itself_differs_in_nothing(folders: dict[str, Path]) -> None:
    parts = ["logits", "cache", "instructions"]
    results = measure_parity(options(folders, "llama", "llama", parts=parts))
    for row in rows_of(results, "logits"):
        assert [row["kl"], row["kl_p99"], row["agreement"], row["ratio"]] == [0, 0, 1, 1]
        assert row["perplexity_original"] == row["perplexity_converted"]
    assert {row["ratio"] for row in rows_of(results, "cache")} == {1}
    (row,) = rows_of(results, "instructions")
    names = ("same_first_share", "same_answer_share", "agreement", "similarity", "kl")
    assert [row[name] for name in names] == [1, 1, 1, 1, 0]


def test_a_damaged_copy_is_told_apart(folders: dict[str, Path]) -> None:
    parts = ["logits", "instructions"]
    results = measure_parity(options(folders, "llama", "damaged", parts=parts, lengths=[600]))
    (row,) = rows_of(results, "logits", position="all")
    assert row["kl_low_95"] > 0.01
    assert row["kl_median"] > 0.001
    assert row["agreement_high_95"] < 1
    (row,) = rows_of(results, "instructions")
    assert row["kl"] > 0.01


def test_similarity_counts_common_words_in_order() -> None:
    assert similarity("a b c d", "a b c d") == 1
    assert similarity("a b c d", "a x c y") == 0.5
    assert similarity("a b", "c d") == 0


def test_the_package_has_fifty_instructions_of_many_kinds() -> None:
    asked = shipped_instructions()
    assert len(asked) == len({each.instruction for each in asked}) == 50
    assert len({each.kind for each in asked}) == len({each.kind for each in asked[:20]}) == 20
