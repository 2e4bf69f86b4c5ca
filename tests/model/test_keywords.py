"""Keywords of Hugging Face's forward pass: honoured as DeepSeek-V3 does with the same weights, or
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ic.model import LatentCache, MLAForCausalLM
from ic.model.documents import marked_documents
from tests.deepseek import deepseek_twin

LENGTHS = (9, 1, 20, 7)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
EDGES = torch.tensor([0, 9, 10, 30, 37], dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
IDS = torch.randint(3, 97, (1, 37), generator=torch.Generator().manual_seed(5))
MARKS: dict[str, dict[str, Tensor]] = {
    "positions": {"position_ids": POSITIONS},
    "positions beside a mask of ones": {
        "position_ids": POSITIONS,
        "attention_mask": torch.ones(1, 37),
    },
    "edges": {"cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES},
    "numbers": {"seq_idx": NUMBERS.int()},
    "all, as TRL gives them": {
        "position_ids": POSITIONS,
        "cu_seq_lens_q": EDGES,
        "cu_seq_lens_k": EDGES,
        "max_length_q": 20,  # type: ignore[dict-item]  # a number by Hugging Face's contract
        "max_length_k": 20,  # type: ignore[dict-item]
        "seq_idx": NUMBERS.int(),
    },
}


@pytest.fixture
def model(make_model: Callable[..., MLAForCausalLM]) -> MLAForCausalLM:
    return make_model()


@torch.no_grad()
@pytest.mark.parametrize("marks", MARKS)
def test_packed_texts_are_computed_as_if_alone(marks: str, model: MLAForCausalLM) -> None:
    got = model(IDS, **MARKS[marks])
    alone = torch.cat([model(text).logits for text in IDS.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(got.logits, alone, atol=1e-5, rtol=0)
    assert got.past_key_values is None  # the next token would see every text


@torch.no_grad()
def test_packed_rows_equal_deepseeks(model: MLAForCausalLM) -> None:
    rows = torch.cat((IDS, IDS.flip(1)))
    positions = torch.cat((POSITIONS, torch.cat((torch.arange(30), torch.arange(7)))[None]))
    expected = deepseek_twin(model)(rows, position_ids=positions, use_cache=False).logits
    got = model(rows, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_packed_rows_may_be_longer_than_any_text(make_model: Callable[..., MLAForCausalLM]) -> None:
    model = make_model(max_position_embeddings=20)
    whole = make_model()
    for marks in (MARKS["positions"], MARKS["edges"]):
        torch.testing.assert_close(
            model(IDS, **marks).logits, whole(IDS, **marks).logits, atol=1e-5, rtol=0
        )
    with pytest.raises(ValueError, match="21 tokens: the model has 20 positions"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 21, 37]))


def test_positions_that_skip_are_one_text() -> None:
    assert marked_documents(1, 5, position_ids=torch.tensor([[0, 3, 4, 90, 91]])) is None
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert marked_documents(1, 5, position_ids=torch.tensor([[1, 1, 0, 1, 2]]), **padded) is None


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 9, 36])}, "must rise from 0 to the 37 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 9, 37])}, "must rise from 0 to the 37 tokens"),
        ({"cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES[[0, 2, 4]]}, "do not mark the same texts"),
        ({"cu_seq_lens_q": EDGES, "seq_idx": NUMBERS // 2}, "do not mark the same texts"),
        ({"seq_idx": NUMBERS[0]}, r"seq_idx has the shape \(37,\)"),
        ({"seq_idx": NUMBERS, "document_ids": NUMBERS}, "go without document_ids"),
        ({"seq_idx": NUMBERS, "attention_mask": torch.arange(37)[None] > 3}, "without padding"),
        (
            {"position_ids": POSITIONS, "attention_mask": torch.arange(37)[None] < 33},
            "position_ids start anew",
        ),
        ({"position_ids": POSITIONS, "use_cache": True}, "use_cache=True goes with neither"),
        (
            {"position_ids": POSITIONS, "past_key_values": LatentCache(3)},
            "the next token over a cache",
        ),
        ({"is_causal": False}, "attends causally"),
        ({"output_router_logits": True}, "no experts"),
        ({"num_items_in_batch": 3}, "give labels with it"),
    ],
)
def test_refused(marks: dict[str, Any], message: str, model: MLAForCausalLM) -> None:
    with pytest.raises(ValueError, match=message):
        model(IDS, **marks)


def test_branches_have_no_single_attention(model: MLAForCausalLM) -> None:
    with pytest.raises(ValueError, match="output_attentions=True goes with neither"):
        model(IDS, branches=[(4, 9)], output_attentions=True)


def test_rows_are_not_joined(model: MLAForCausalLM) -> None:
    with pytest.raises(ValueError, match="a text reaches over the end of a row of 37 tokens"):
        model(torch.cat((IDS, IDS)), cu_seq_lens_q=torch.tensor([0, 30, 74]))


def test_an_unknown_keyword_is_refused(model: MLAForCausalLM) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_type_ids'"):
        model(IDS, token_type_ids=NUMBERS)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
@pytest.mark.parametrize("shifted", [False, True])
def test_losses_equal_deepseeks(
    items: int | Tensor | None, shifted: bool, model: MLAForCausalLM
) -> None:
    targets: dict[str, Any] = {"labels": IDS.masked_fill(IDS < 30, -100)}
    if shifted:
        targets["shift_labels"] = IDS.roll(3)  # not what shifting the labels gives
    if items is not None:
        targets["num_items_in_batch"] = items
    expected = deepseek_twin(model)(IDS, **targets).loss
    torch.testing.assert_close(model(IDS, **targets).loss, expected)
    if shifted:
        del targets["labels"]
        torch.testing.assert_close(model(IDS, **targets).loss, expected)


@torch.no_grad()
def test_attentions_equal_deepseeks(model: MLAForCausalLM) -> None:
    twin = deepseek_twin(model, attn_implementation="eager")
    rows = torch.cat((IDS, IDS.flip(1)))
    mask = torch.ones_like(rows)
    mask[1, :9] = 0
    real = mask.bool()[:, None, :, None]
    for described in ({}, {"attention_mask": mask}, {"position_ids": POSITIONS.expand(2, -1)}):
        options = {"output_attentions": True, "use_cache": False, **described}
        got, expected = model(rows, **options), twin(rows, **options)
        assert len(got.attentions) == len(expected.attentions) == 3
        for ours, theirs in zip(got.attentions, expected.attentions, strict=True):
            assert ours.shape == theirs.shape == (2, 4, 37, 37)
            if "attention_mask" in described:  # a padding token sees nothing there, itself here
                ours, theirs = ours * real, theirs * real
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        plain = model(rows, use_cache=False, **described)
        torch.testing.assert_close(got.logits, plain.logits, atol=1e-5, rtol=0)
        assert plain.attentions is None
    model.set_attn_implementation("eager")  # transformers asks for that, before it can be set
    model.config.output_attentions = True
    assert len(model(rows).attentions) == 3


@torch.no_grad()
def test_attentions_over_a_cache(model: MLAForCausalLM) -> None:
    whole = model(IDS, output_attentions=True).attentions
    first = model(IDS[:, :30], use_cache=True, output_attentions=True)
    rest = model(IDS[:, 30:], past_key_values=first.past_key_values, output_attentions=True)
    for layer, expected in enumerate(whole):
        torch.testing.assert_close(rest.attentions[layer], expected[:, :, 30:], atol=1e-5, rtol=0)
    out = model.generate(
        IDS, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True
    )
    assert [step[0].shape for step in out.attentions] == [
        (1, 4, 37, 37),
        (1, 4, 1, 38),
        (1, 4, 1, 39),
    ]
