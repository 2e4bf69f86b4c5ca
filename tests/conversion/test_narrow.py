"""A rotary key of fewer dimensions than a head has: which frequencies it keeps, and what is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, LlamaForCausalLM

from ic.checkpoint.folder import load_model
from ic.conversion.distance import Turns
from ic.conversion.families import Geometry
from ic.conversion.folding import Left, choose_frequencies, fold_rotary_key
from ic.conversion.grouped import GroupedWeights
from ic.conversion.layer import convert_layer
from ic.conversion.layout import Layout, choose_layout
from ic.conversion.options import ConvertOptions
from ic.conversion.rotary import to_complex, to_halves
from ic.errors import UsageError
from ic.model import MLAConfig
from ic.model.rope import DecoupledRotaryEmbedding, apply_rope
from tests.conversion.small import Run, convert, distance

Capture = pytest.CaptureFixture[str]
GROUPS, PER_GROUP, DIM, HIDDEN = 3, 2, 16, 24
# Of eight frequencies those that carry something, in one component over the heads.
USED = (1, 4, 6)
TOKENS = 41
SPEED = 100.0 ** (-torch.arange(DIM // 2).double() * 2 / DIM)
ROPE = {"rope_type": "default", "rope_theta": 100.0}


def geometry() -> Geometry:
    return Geometry(
        family="llama",
        heads=GROUPS * PER_GROUP,
        kv_heads=GROUPS,
        head_dim=DIM,
        hidden_size=HIDDEN,
        layers=1,
        query_bias=False,
        key_value_bias=False,
        output_bias=False,
        qk_norm=False,
        rope_parameters=ROPE,
    )


@pytest.fixture
def second() -> Tensor:
    torch.manual_seed(1)
    x_TD = torch.randn(300, HIDDEN, dtype=torch.float64) @ torch.randn(HIDDEN, HIDDEN).double()
    x_TX = torch.nn.functional.pad(x_TD, (0, 1), value=1.0)
    return x_TX.T @ x_TX / len(x_TX)


@pytest.fixture
def weights() -> GroupedWeights:
    """Keys that only the frequencies of USED hold."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    key_GFX = torch.zeros(GROUPS, DIM // 2, HIDDEN + 1, dtype=torch.complex128)
    for frequency in USED:
        component_X = torch.complex(draw(HIDDEN), draw(HIDDEN))
        of_heads_G = torch.complex(draw(GROUPS), draw(GROUPS))
        key_GFX[:, frequency, :-1] = of_heads_G[:, None] * component_X
    return GroupedWeights(
        q_GsdX=draw(GROUPS, PER_GROUP, DIM, HIDDEN + 1),
        k_GdX=to_halves(key_GFX),
        v_GdX=draw(GROUPS, DIM, HIDDEN + 1),
        o_DGsd=draw(HIDDEN, GROUPS, PER_GROUP, DIM),
        o_bias_D=torch.zeros(HIDDEN, dtype=torch.float64),
        q_norm_d=None,
        k_norm_d=None,
    )


def turns_of(weights: GroupedWeights) -> Turns:
    """Of heads that look back evenly over 40 tokens."""
    angle_TF = torch.arange(TOKENS)[:, None] * SPEED
    turns = Turns(weights, torch.polar(torch.ones_like(angle_TF), angle_TF), scale=1e-9)
    turns.add(torch.ones(TOKENS, HIDDEN))
    return turns


def scores_error(weights: GroupedWeights, second: Tensor, kept: tuple[int, ...]) -> float:
    """Of the rotary part of all scores against the original's, relative, at distances 0 to 40: with
    a configuration of the result and its own rotation.
    """
    layout = Layout(geometry(), rope_dim=2 * len(kept), rank=20, kept=kept)
    tensors = convert_layer(weights, second, layout, turns_of(weights)).tensors
    config = MLAConfig(
        qk_nope_head_dim=DIM,
        qk_rope_head_dim=layout.rope_dim,
        rope_parameters=ROPE,
        rope_pairs=list(kept),
        rope_pairs_dim=DIM,
    )
    torch.manual_seed(2)
    x_D, y_D = torch.randn(2, HIDDEN, dtype=torch.float64)
    query_HK = (tensors["q_proj.weight"] @ x_D).unflatten(0, (GROUPS * PER_GROUP, -1))
    rope_HP = query_HK[:, DIM:]
    key_P = (tensors["kv_a_proj_with_mqa.weight"] @ y_D)[layout.rank :]
    position_1T = torch.arange(TOKENS)[None]
    cos_sin = DecoupledRotaryEmbedding(config)(position_1T)
    # The query is at position 0 and the key at T: only their distance matters.
    turned_TP = apply_rope(key_P.expand(1, TOKENS, 1, -1).float(), *cos_sin, interleave=True)[
        0, :, 0
    ]
    ours_TH = turned_TP.double() @ rope_HP.T * config.softmax_scale
    query_GsF = to_complex(weights.q_GsdX[..., :-1]) @ x_D.to(torch.complex128)
    key_GF = to_complex(weights.k_GdX[..., :-1]) @ y_D.to(torch.complex128)
    angle_TF = position_1T[0, :, None] * SPEED
    turn_TF = torch.polar(torch.ones_like(angle_TF), angle_TF)
    score_TGs = torch.einsum("gsf,gf,tf->tgs", query_GsF.conj(), key_GF, turn_TF).real
    expected_TH = score_TGs.flatten(1) * DIM**-0.5
    return float((ours_TH - expected_TH).norm() / expected_TH.norm())


def test_nothing_is_lost_where_the_dropped_frequencies_carry_nothing(
    weights: GroupedWeights, second: Tensor
) -> None:
    assert scores_error(weights, second, USED) < 1e-5


@pytest.mark.parametrize("kept", [(1, 4, 5), (0, 4, 6), (4, 5, 6), (2, 3, 7)])
def test_other_frequencies_are_seen(
    weights: GroupedWeights, second: Tensor, kept: tuple[int, ...]
) -> None:
    assert scores_error(weights, second, kept) > 0.05


def test_a_slow_frequency_turns_with_another_at_little_loss(
    weights: GroupedWeights, second: Tensor
) -> None:
    """Over 40 tokens 6 and 7 turn by 1.3 and 0.7: much less apart than 6 and 4 are."""
    near, far = (scores_error(weights, second, kept) for kept in ((1, 4, 7), (1, 4)))
    assert near < 0.5 * far


def test_a_key_that_needs_no_rotation_stays_out_of_the_component(
    weights: GroupedWeights, second: Tensor
) -> None:
    """However much of it lies along the component: frequency 6 has the keys of 4 here."""
    weights.k_GdX[:, [6, 14]] = weights.k_GdX[:, [4, 12]]
    key_GFX = to_complex(weights.k_GdX)
    turn_GsF = torch.zeros(GROUPS, PER_GROUP, DIM // 2, dtype=torch.complex128)
    turn_GsF[..., 6] = 1.0
    beside_GsKF = torch.zeros(GROUPS, PER_GROUP, 1, DIM // 2, dtype=torch.complex128)
    beside_GsKF[..., 4], beside_GsKF[..., 6] = 1.0, 0.9
    for still_kept, stays_out in ((1.0, True), (0.5, False)):
        shared = fold_rotary_key(weights, second, (4,), turn_GsF, beside_GsKF, still_kept)
        assert torch.equal(shared.rest_GFX[:, 6], key_GFX[:, 6]) == stays_out
        assert torch.allclose(shared.rest_GFX[:, 4], torch.zeros(()).to(key_GFX), atol=1e-9)


def left_of(weights: GroupedWeights, second: Tensor) -> Left:
    turns = turns_of(weights)
    return Left.of(weights, second, turns.mean, turns.beside(range(DIM // 2)))


def test_what_is_left_of_the_scores_is_what_their_best_multiples_explain(
    weights: GroupedWeights, second: Tensor
) -> None:
    """Of frequency 6 that turns as 4, in all heads: least squares over distances, one by one."""
    left, turns = left_of(weights, second), turns_of(weights)
    sum_GsT = turns._sum_GsT / turns._sum_GsT.sum(-1, keepdim=True)
    angle_T = torch.arange(TOKENS).double()
    own_T, other_T = (torch.polar(torch.ones(TOKENS).double(), -angle_T * f) for f in SPEED[[6, 4]])
    query_GsX, key_GX = to_complex(weights.q_GsdX)[:, :, 6], to_complex(weights.k_GdX)[:, 6]
    expected = 0.0
    for group in range(GROUPS):
        for head in range(PER_GROUP):
            weight_T = sum_GsT[group, head]
            best = (weight_T * own_T * other_T.conj()).sum()
            lost = float((weight_T * (own_T - best * other_T).abs().square()).sum())
            query, key = query_GsX[group, head], key_GX[group]
            size = [float((x @ second.to(x.dtype) @ x.conj()).real) for x in (query, key)]
            expected += size[0] * size[1] * (1 - lost)
    assert float(left.beside_KF[4, 6]) == pytest.approx(expected, rel=1e-9)
    assert float(left.beside_KF[5, 2]) == 0  # nothing is there
    assert float(left.whole) == pytest.approx(float(left.beside_KF[[1, 4, 6], [1, 4, 6]].sum()))


def test_the_frequencies_that_carry_something_are_chosen(
    weights: GroupedWeights, second: Tensor
) -> None:
    left = left_of(weights, second)
    assert choose_frequencies(left.still_F, left.beside_KF, 3) == USED


def test_a_frequency_that_serves_others_is_kept_and_one_that_needs_no_rotation_is_not() -> None:
    still_F = torch.tensor([0.0, 0.0, 0.0, 4.9])
    beside_FF = torch.tensor(
        [[2.0, 1.0, 0.0, 0.0], [1.8, 1.0, 2.8, 0.0], [0.0, 0.5, 3.1, 0.0], [0.0, 0.0, 0.0, 5.0]]
    )
    assert choose_frequencies(still_F, beside_FF, 1) == (1,)
    assert choose_frequencies(still_F, beside_FF, 2) == (1, 2)  # 2 adds 0.3, 0 0.2, 3 0.1
    assert choose_frequencies(still_F, beside_FF, 4) == (0, 1, 2, 3)


@pytest.mark.slow
def test_error_falls_with_the_rotary_dimension_and_the_rank(
    ic: Run, trained: Path, tmp_path: Path
) -> None:
    """Of the attention's output, in the mean of the layers; at both ends of the logits too."""
    theirs = LlamaForCausalLM.from_pretrained(trained)

    def lost(rope_dim: int, rank: int) -> tuple[float, Path]:
        folder = tmp_path / f"{rope_dim}-{rank}"
        convert(ic, trained, folder, f"rope_dim={rope_dim}", f"rank={rank}")
        rows = json.loads((folder / "conversion.json").read_text())["rows"]
        return sum(row["output_error"] for row in rows) / len(rows), folder

    for given in ([(n, 24) for n in (2, 4, 6, 8, 16)], [(6, n) for n in (2, 4, 8, 16)]):
        errors, folders = zip(*(lost(*each) for each in given), strict=True)
        assert list(errors) == sorted(errors, reverse=True)
        first, last = (distance(load_model(folders[end]), theirs) for end in (0, -1))
        assert last < 0.6 * first


def test_an_eighth_of_the_cache(ic: Run, trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """The folder says which frequencies turn, ours loads it and generates, theirs refuses it."""
    folder = convert(ic, trained, tmp_path / "eighth", "cache=0.125")
    out = capsys.readouterr().out
    assert "rank 4, rotary key 4, 8 dimensions per head without rotation" in out
    assert "256 bytes per token before, 32 after (12%)" in out
    record = json.loads((folder / "conversion.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    pairs = config["rope_pairs"]
    assert record["geometry"]["rope_pairs"] == pairs == sorted(pairs)
    assert (len(pairs), config["rope_pairs_dim"], config["qk_rope_head_dim"]) == (2, 8, 4)
    model = load_model(folder)
    assert model.config.latent_dim * 8 == record["original"]["cache_numbers"]
    ids = torch.tensor([list(b"The License gives each user and")])
    whole = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    logits = model(whole, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
    assert whole[0, ids.shape[1] :].tolist() == logits.argmax(-1).tolist()
    with pytest.raises(Exception, match=r"rope_pairs=\[\d, \d\] of 8 dimensions of Infinite"):
        DeepseekV3ForCausalLM.from_pretrained(folder)
    again = convert(ic, trained, tmp_path / "again", "rope_dim=4", "rank=4")
    assert json.loads((again / "config.json").read_text())["rope_pairs"] == pairs


def test_a_budget_keeps_all_frequencies_where_it_can() -> None:
    def chosen(cache: float, **options: int) -> tuple[int, int]:
        given = ConvertOptions(source="x", output="y", cache=cache, **options)
        layout = choose_layout(smollm2, given)
        return layout.rope_dim, layout.rank

    smollm2 = Geometry(**{**vars(geometry()), "heads": 9, "head_dim": 64})
    assert chosen(0.5) == (64, 128)
    assert chosen(0.25) == (32, 64)
    assert chosen(0.125) == (16, 32)
    assert chosen(0.0625) == (8, 16)
    assert chosen(0.25, rope_dim=64) == (64, 32)
    assert chosen(0.5, rope_dim=128) == (128, 64)
    with pytest.raises(UsageError, match="rotary key alone takes 48 of them.*a smaller rope_dim"):
        chosen(0.125, rope_dim=48)


def test_widths_that_the_kernels_do_not_take_are_said(
    ic: Run, trained: Path, tmp_path: Path, capsys: Capture
) -> None:
    convert(ic, trained, tmp_path / "out", "rank=20", "rope_dim=8")
    assert "runs with attention=torch alone: v_head_dim=8: the Triton attention takes powers" in (
        capsys.readouterr().err
    )
