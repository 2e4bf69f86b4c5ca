"""Our attention against the equations of DeepSeek-V3's report (arXiv 2412.19437, section 2.1.1),
written down token by token and head by head; and what `docs/deepseek_v3.md` says.
"""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.cache import LatentCache
from ic.model.cost import cache_bytes_per_token
from ic.studies.tables.deepseek import SHAPES, Shape, compression_table, paper_table
from tests.conftest import SMALL, randomize

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/deepseek_v3.md").read_text()
TOKENS = 7


def rope(x: Tensor, position: int, theta: float = 1e4) -> Tensor:
    """Turn pairs (2i, 2i + 1) of a vector by position * theta^(-2i / P)."""
    turned = torch.empty_like(x)
    for i in range(len(x) // 2):
        angle = position * theta ** (-2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        turned[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        turned[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def paper(config: MLAConfig, weights: dict[str, Tensor], h: Tensor) -> Tensor:
    """Equations 1 to 11 for the hidden states h (T, D) of one sequence -> u (T, D)."""
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    rank = config.kv_lora_rank
    down = weights["kv_a_proj_with_mqa.weight"]
    up = weights["kv_b_proj.weight"].view(heads, nope + value, rank)
    latents, shared = [], []
    for t, h_t in enumerate(h):
        c = down[:rank] @ h_t  # (1)
        latents.append(rms_norm(c, weights["kv_a_layernorm.weight"], eps))
        shared.append(rope(down[rank:] @ h_t, t))  # (3)
    out = []
    for t, h_t in enumerate(h):
        if config.q_lora_rank is None:
            q = weights["q_proj.weight"] @ h_t
        else:
            c_q = rms_norm(
                weights["q_a_proj.weight"] @ h_t, weights["q_a_layernorm.weight"], eps
            )  # (6)
            q = weights["q_b_proj.weight"] @ c_q  # (7), (8)
        o_t = []
        for i, q_i in enumerate(q.view(heads, nope + rotary)):
            query = torch.cat((q_i[:nope], rope(q_i[nope:], t)))  # (9)
            scores = []
            for j in range(t + 1):
                key = torch.cat((up[i, :nope] @ latents[j], shared[j]))  # (2), (4)
                scores.append(query @ key / math.sqrt(nope + rotary))
            p = torch.softmax(torch.stack(scores), 0)
            values = [up[i, nope:] @ latents[j] for j in range(t + 1)]  # (5)
            o_t.append(sum(p[j] * values[j] for j in range(t + 1)))  # (10)
        out.append(weights["o_proj.weight"] @ torch.cat(o_t))  # (11)
    return torch.stack(out)


def layer(**changes: Any) -> tuple[MLAForCausalLM, dict[str, Tensor]]:
    """A model in float64, and the weights of its first layer's attention."""
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**{**SMALL, **changes})).double().eval()
    randomize(model)
    return model, dict(model.model.layers[0].self_attn.named_parameters())


def attention(model: MLAForCausalLM, h: Tensor) -> Tensor:
    """What the first layer's attention makes of hidden states (T, D)."""
    seen: list[Tensor] = []
    first = model.model.layers[0]
    first.input_layernorm.register_forward_hook(lambda *_: h[None])
    first.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(torch.zeros(1, len(h), dtype=torch.long), use_cache=False)
    return seen[0]


@pytest.mark.parametrize("rank", [24, None], ids=["compressed queries", "whole queries"])
def test_the_layer_computes_the_papers_equations(rank: int | None) -> None:
    model, weights = layer(q_lora_rank=rank)
    h = torch.randn(TOKENS, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = paper(model.config, weights, h)
    assert expected.abs().max() > 0.1
    # The rotation rounds to float32; everything else is float64.
    torch.testing.assert_close(attention(model, h), expected, rtol=0, atol=5e-7)


def test_one_latent_makes_keys_and_values() -> None:
    """A change of one row of W^DKV moves keys and values; without the latent nothing is left."""
    model, weights = layer()
    h = torch.randn(TOKENS, 64, dtype=torch.float64)
    with torch.no_grad():
        weights["kv_a_proj_with_mqa.weight"][: model.config.kv_lora_rank] = 0
    assert attention(model, h).abs().max() == 0


def test_the_rotated_key_is_shared_by_all_heads() -> None:
    """It has one head's width, and every head's weights change with it."""
    model, weights = layer()
    config = model.config
    rows = config.kv_lora_rank + config.qk_rope_head_dim
    assert weights["kv_a_proj_with_mqa.weight"].shape == (rows, config.hidden_size)
    h = torch.randn(TOKENS, 64, dtype=torch.float64)
    with torch.no_grad():
        weights["o_proj.weight"][:] = torch.eye(64, 48)  # the heads' outputs, one after the other
        before = attention(model, h)
        weights["kv_a_proj_with_mqa.weight"][config.kv_lora_rank :] *= 2
    moved = (attention(model, h) - before)[-1, :48].abs().view(config.num_attention_heads, -1)
    assert moved.amax(1).min() > 1e-3


def test_v3s_dimensions_are_those_of_transformers() -> None:
    """Whose defaults are the published checkpoint's."""
    theirs = DeepseekV3Config()
    (ours,) = (shape.config for shape in SHAPES if shape.name == "DeepSeek-V3")
    for name in (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "q_lora_rank"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_caches_take_what_the_table_says(shape: Shape) -> None:
    """By allocation: a cache of 64 tokens in bf16, filled as the layers would."""
    config = shape.config
    cache = LatentCache(config.num_hidden_layers, capacity_tokens=64)
    latent = torch.zeros(1, 64, config.kv_lora_rank, dtype=torch.bfloat16)
    key = torch.zeros(1, 64, config.qk_rope_head_dim, dtype=torch.bfloat16)
    for each in cache.layers:
        each.append(latent, key)
    assert cache.nbytes == 64 * cache_bytes_per_token(config)
    line = next(row for row in compression_table().splitlines() if f"| {shape.name} |" in row)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[10] == f"{cache.nbytes // 64:,} B"
    of_heads = 2 * shape.heads * shape.head_dim  # a key and a value of each head
    assert cells[6] == f"{of_heads:,}"
    assert float(cells[8]) == pytest.approx(of_heads / (shape.latent + shape.rope), abs=0.05)


def test_the_papers_figures_follow_from_its_shapes() -> None:
    """What a row calls theirs is what caches of their shapes hold, allocated or by their heads."""
    cells = [[cell.strip() for cell in line.split("|")] for line in paper_table().splitlines()[2:]]
    rows = {row[1].removeprefix("V2, ").removeprefix("MLA against MHA: "): row for row in cells}
    for shape, row in (
        ("DeepSeek-V2-Lite", "small MoE with MLA"),
        ("DeepSeek-V2", "large MoE with MLA"),
    ):
        config = next(each.config for each in SHAPES if each.name == shape)
        cache = LatentCache(config.num_hidden_layers, capacity_tokens=1)
        for each in cache.layers:
            each.append(
                *(
                    torch.zeros(1, 1, n, dtype=torch.bfloat16)
                    for n in (config.kv_lora_rank, config.qk_rope_head_dim)
                )
            )
        held = cache.nbytes // 2
        assert f"{held / 1000:.1f}K" == rows[row][2]
        assert rows[row][3].endswith(f": {held:,}")
    assert rows["small MoE with MHA"][3].endswith(f": {27 * 16 * 2 * 128:,}")
    assert rows["small MoE with MHA"][2] == "110.6K"
    assert rows["abstract: less cache than DeepSeek 67B"][2:4] == ["93.3 %", "93.3 %"]
    assert rows["table 1: MLA in heads"][3] == "V2 and V3 4.5, 1B 2.0 d<sub>h</sub> l"
    per_token = json.loads((ROOT / "docs/results/cache-memory.json").read_text())["rows"]
    for row in per_token:
        kind = row["cache"].partition(",")[0]
        if row["cache"].endswith("bf16"):
            assert f" {row['bytes_per_token'] / 2:,.0f} " in f"{rows[f'table 1: {kind}'][3]} "


def test_the_presets_are_those_of_the_table() -> None:
    from ic.config.compose import compose_config
    from ic.config.run import RunConfig

    for experiment, name in (
        ("infinitecontext_1b", "InfiniteContext-1B"),
        ("mla_small", "`mla_small`"),
        ("mla_tiny", "`mla_tiny`"),
    ):
        config = compose_config("fit", RunConfig, [f"experiment={experiment}"])[0]
        given: Any = config.model
        (shape,) = (shape for shape in SHAPES if shape.name == name)
        assert cache_bytes_per_token(given.mla_config(320)) == cache_bytes_per_token(shape.config)
        assert given.hidden_size == shape.hidden
        assert given.num_attention_heads == shape.heads


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 15
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, name


def test_every_point_of_the_equations_has_one() -> None:
    equations = PAGE.partition("## The equations")[2].partition("## What is ours")[0]
    points = [line for line in equations.splitlines() if line.startswith("| ")]
    points = [line for line in points if not line.endswith("| held by |")]
    assert len(points) >= 15
    assert all(re.search(r"`tests/[\w/]+\.py::\w+`", line) for line in points)
