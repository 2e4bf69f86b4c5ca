"""The indexer and sparse attention against transformers' DeepSeek-V3.2, and against themselves in
every kind of cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, DynamicCache

from ic.model import MLAConfig, MLAForCausalLM
from ic.model.fingerprint import fingerprint
from ic.model.selection import choose, index_scores, ranks_of
from tests.conftest import SMALL

Make = Callable[..., MLAForCausalLM]
# So many heads that no score is exactly zero, between which the two choose differently.
SPARSE = {"indexer": "sparse", "index_topk": 12, "index_head_dim": 16, "index_n_heads": 16}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 61), generator=torch.Generator().manual_seed(2))


def deepseek_twin(model: MLAForCausalLM) -> DeepseekV32ForCausalLM:
    """transformers' model of the same sizes and weights."""
    ours = model.config.to_dict()
    theirs = DeepseekV32Config().to_dict()
    skipped = ("model_type", "architectures", "transformers_version", "layer_types")
    shared = {key: ours[key] for key in theirs if key in ours and key not in skipped}
    layers = ["dense"] * model.config.num_hidden_layers
    config = DeepseekV32Config(
        **shared | {"mlp_layer_types": layers, "layer_types": None}, attn_implementation="eager"
    )
    twin = DeepseekV32ForCausalLM(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
@pytest.mark.parametrize("top_k", [12, 40, 200])
def test_logits_are_those_of_deepseek_v32(
    make_model: Make, tokens: torch.Tensor, top_k: int
) -> None:
    """Its indexer in each layer, with fewer and with more tokens than it chooses."""
    model = make_model(**SPARSE | {"index_topk": top_k})
    twin = deepseek_twin(model)
    expected = twin(tokens).logits
    dense = make_model(**SPARSE | {"index_topk": top_k, "indexer": "dense"})
    distance = (dense(tokens).logits - expected).abs().max()
    assert distance > 0.3 if top_k < 61 else distance < 1e-5
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_is_chosen_is_what_deepseek_v32_chooses(
    make_model: Make, tokens: torch.Tensor
) -> None:
    model = make_model(**SPARSE)
    chosen: list[torch.Tensor] = []
    twin_model = deepseek_twin(model)
    for layer in twin_model.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda *x: chosen.append(x[-1]))
    twin_model(tokens)
    context = model.model.make_context(2, 61, tokens.device)
    indexing = model.model.new_indexing()
    model.model(tokens, context=replace(context, indexing=indexing), use_cache=False)
    assert len(chosen) == 3
    for layer, expected in enumerate(chosen):
        selection = indexing._chosen[layer].selection
        assert selection is not None
        for query in range(61):
            count = min(query + 1, 12)
            ours = selection.index_BTK[:, query, :count].sort(-1).values
            seen = expected[:, query].long()
            seen = seen[seen <= query].view(2, -1).sort(-1).values
            assert ours.equal(seen)
        assert selection.count_BT.equal(torch.arange(1, 62).clamp(max=12).expand(2, 61))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"index_n_heads": 2}, {"index_group_size": 3}])
@pytest.mark.parametrize("kind", ["latent", "static", "whole"])
def test_each_query_chooses_however_a_prompt_is_cut(
    make_model: Make, tokens: torch.Tensor, kind: str, changes: dict[str, Any]
) -> None:
    """Also where many scores are zero: with two heads, every fourth."""
    model = make_model(**SPARSE | changes)
    expected = model(tokens, use_cache=False).logits
    cache = model.model.new_static_cache(64) if kind == "static" else model.model.new_cache()
    parts = [61] if kind == "whole" else [20, 1, 17, 13, 1, 9]
    given = {"past_key_values": cache, "use_cache": True}
    found = [model(part, **given).logits for part in tokens.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [61, 2048])
def test_no_more_tokens_than_chosen_are_dense_attention_to_the_last_bit(
    make_model: Make, tokens: torch.Tensor, top_k: int
) -> None:
    sparse = make_model(**SPARSE | {"index_topk": top_k})
    dense = make_model(**SPARSE | {"indexer": "dense"})
    plain = make_model()
    plain.load_state_dict(dense.state_dict(), strict=False)
    assert dense(tokens).logits.equal(plain(tokens).logits)
    for model in (sparse, dense):
        assert model(tokens, use_cache=False).logits.equal(plain(tokens, use_cache=False).logits)
        caches = [model.model.new_cache(), plain.model.new_cache()]
        for part in tokens.split([40, 1, 20], dim=1):
            ours, theirs = (
                m(part, past_key_values=c, use_cache=True).logits
                for m, c in zip((model, plain), caches, strict=True)
            )
            assert ours.equal(theirs)
    assert len(plain.model.new_cache().layers) == len(dense.model.new_cache().layers) == 3


@torch.no_grad()
def test_a_model_without_an_indexer_is_what_it_was(make_model: Make) -> None:
    model = make_model()
    assert not [name for name in model.state_dict() if "indexer" in name]
    context = model.model.make_context(1, 8, torch.device("cpu"))
    assert context.indexing is None


@torch.no_grad()
def test_texts_of_a_packed_row_choose_among_their_own_tokens(
    make_model: Make, tokens: torch.Tensor
) -> None:
    model = make_model(**SPARSE)
    documents = torch.tensor([[0] * 23 + [1] * 38, [0] * 40 + [1] * 21])
    packed = model(tokens, document_ids=documents, use_cache=False).logits
    for row, lengths in enumerate(([23, 38], [40, 21])):
        texts = tokens[row, None].split(lengths, dim=1)
        starts = (0, lengths[0])
        for text, start in zip(texts, starts, strict=True):
            # Positions of a packed row go on; a rotation sees differences alone.
            alone = model(text, use_cache=False).logits[0]
            found = packed[row, start : start + text.shape[1]]
            torch.testing.assert_close(found, alone, atol=5e-5, rtol=0)


@torch.no_grad()
def test_padding_is_not_chosen(make_model: Make, tokens: torch.Tensor) -> None:
    model = make_model(**SPARSE)
    mask = torch.ones_like(tokens)
    mask[0, :17] = 0
    padded = tokens.masked_fill(mask == 0, 0)
    alone = model(tokens[:1, 17:], use_cache=False).logits
    found = model(padded, attention_mask=mask, use_cache=False).logits[:1, 17:]
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=0)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)
    static = model.generate(
        padded, attention_mask=mask, cache_implementation="static", disable_compile=True, **options
    )
    single = model.generate(tokens[:1, 17:], attention_mask=mask[:1, 17:], **options)
    assert together[0, 17:].equal(single[0])
    assert static.equal(together)


@torch.no_grad()
def test_rows_of_unequal_length_and_other_cache_operations(
    make_model: Make, tokens: torch.Tensor
) -> None:
    from ic.model.cache import concatenate_rows

    model = make_model(**SPARSE)
    caches = []
    for row, length in enumerate((30, 47)):
        caches.append(model.model.new_cache())
        model(tokens[row, None, :length], past_key_values=caches[-1], use_cache=True)
    joined = concatenate_rows(caches)
    assert len(joined.layers) == 6
    following = torch.stack((tokens[0, 30:34], tokens[1, 47:51]))
    context = model.model.make_context(2, 4, tokens.device, joined)
    found = model(following, past_key_values=joined, context=context, use_cache=True).logits
    for row, end in enumerate((34, 51)):
        expected = model(tokens[row, None, :end], use_cache=False).logits[0, -4:]
        torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=0)
    joined.keep_rows([25, 25])
    found = model(tokens[:, 25:40], past_key_values=joined, use_cache=True).logits
    expected = model(tokens[:, :40], use_cache=False).logits[:, 25:]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    joined.reorder_cache(torch.tensor([1, 0]))
    swapped = tokens.flip(0)
    found = model(swapped[:, 40:], past_key_values=joined, use_cache=True).logits
    torch.testing.assert_close(
        found, model(swapped, use_cache=False).logits[:, 40:], atol=2e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["latent", "static"])
@pytest.mark.parametrize("codes", ["fp8", "int8"])
def test_quantised_index_keys_choose_almost_the_same(
    make_model: Make, tokens: torch.Tensor, codes: str, kind: str
) -> None:
    chosen = []
    for cache_dtype in ("auto", codes):
        model = make_model(**SPARSE | {"index_cache_dtype": cache_dtype})
        cache = model.model.new_static_cache(64) if kind == "static" else model.model.new_cache()
        model(tokens[:, :60], past_key_values=cache, use_cache=True)
        context = model.model.make_context(2, 1, tokens.device, cache)
        indexing = model.model.new_indexing()
        context = replace(context, indexing=indexing)
        model(tokens[:, 60:], past_key_values=cache, context=context, use_cache=True)
        selection = indexing._chosen[0].selection
        assert selection is not None
        chosen.append(selection.matrix(64))
    held = cache.layers[3].latents()
    assert held.dtype == (torch.float8_e4m3fn if codes == "fp8" else torch.int8)
    assert held.shape[-1] == 16
    assert cache.layers[0].latents().dtype == torch.float32  # the latents keep the model's dtype
    assert (chosen[0] & chosen[1]).sum() >= 22  # of 24


def test_equal_scores_are_ordered_by_their_place() -> None:
    scores = torch.tensor([[[0.0, -0.0, 2.5, -1.0, 0.0, 1e-40, -torch.inf, 2.5]]])
    visible = torch.tensor([[[True, True, True, True, True, True, True, False]]])
    ranks = ranks_of(scores, visible)
    assert choose(ranks, 8).index_BTK[0, 0].tolist() == [2, 5, 4, 1, 0, 3, 6, 2]
    assert choose(ranks, 8).count_BT.item() == 7
    assert choose(ranks, 3).index_BTK[0, 0].tolist() == [2, 5, 4]


def test_scores_are_the_published_formula() -> None:
    torch.manual_seed(0)
    q, w, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4), torch.randn(2, 5, 8)
    found = index_scores(q, w, k)
    for b in range(2):
        for t in range(3):
            for s in range(5):
                total = sum(
                    float(w[b, t, j]) * max(float(q[b, t, j] @ k[b, s]), 0.0) for j in range(4)
                )
                assert found[b, t, s] == pytest.approx(total, abs=1e-5)


@torch.no_grad()
def test_weights_of_the_heads_have_the_published_scale(make_model: Make) -> None:
    """It changes no choice, but the softmax that the indexer learns by."""
    indexer = make_model(**SPARSE).model.layers[0].self_attn.indexer
    hidden, low = torch.randn(1, 3, 64), torch.randn(1, 3, 24)
    found = indexer(hidden, low, torch.ones(1, 3, 4), torch.zeros(1, 3, 4)).w_BTJ
    expected = hidden @ indexer.weights_proj.weight.T / (16 * 16) ** 0.5
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_recorded_weights_are_over_the_chosen_tokens(
    make_model: Make, tokens: torch.Tensor
) -> None:
    model = make_model(**SPARSE)
    plain = model(tokens, use_cache=False)
    for given in ({"use_cache": False}, {"past_key_values": model.model.new_cache()}):
        recorded = model(tokens, output_attentions=True, **given)
        torch.testing.assert_close(recorded.logits, plain.logits, atol=2e-5, rtol=0)
        for weights in recorded.attentions:
            counts = (weights > 0).sum(-1).unique(dim=1)
            assert counts.equal(torch.arange(1, 62).clamp(max=12).expand(2, 1, 61))


def test_gradients_are_those_of_deepseek_v32(
    make_model: Make, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the language-model loss: none for the indexer, and also where queries go in pieces."""
    model = make_model(**SPARSE)
    twin = deepseek_twin(model)
    twin(tokens, labels=tokens).loss.backward()
    expected = {n: p.grad for n, p in twin.named_parameters()}
    for numbers in (2**26, 20_000):
        monkeypatch.setattr("ic.model.sparse_operators.PIECE_NUMBERS", numbers)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            if "indexer" in name:
                assert parameter.grad is None
                assert expected[name] is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 0}, "index_topk=0: must be a whole number of at least 1"),
        ({"index_n_heads": 0}, "index_n_heads=0"),
        ({"index_group_size": 2}, "index_group_size=2 of 3 layers: must divide"),
        ({"index_head_dim": 4}, "index_head_dim=4 and 8 rotated dimensions"),
        ({"index_rope_head_dim": 3}, "index_rope_head_dim=3: must be even"),
        ({"index_rope_head_dim": 6}, "index_rope_head_dim=6 and qk_rope_head_dim=8"),
        ({"indexer": "on"}, "indexer"),
        ({"index_cache_dtype": "fp4"}, "index_cache_dtype"),
    ],
)
def test_what_an_indexer_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLAConfig(**SMALL | SPARSE | changes)


@torch.no_grad()
def test_fewer_rotated_dimensions_take_the_frequencies_of_a_smaller_head(make_model: Make) -> None:
    """Scores depend on the distance of query and key alone."""
    model = make_model(**SPARSE | {"index_rope_head_dim": 4, "nope_layers": [2]})
    first, last = (model.model.layers[i].self_attn.indexer for i in (0, 2))
    x = torch.randn(1, 1, 64)
    low = torch.randn(1, 1, 24)
    found = []
    for query, key in ((9, 4), (105, 100), (9, 9)):
        position = torch.tensor([[query], [key]])
        cos, sin = model.model.rotary_emb(position)
        q = first(x, low, cos[:1], sin[:1]).q_BTJI
        k = first(x, low, cos[1:], sin[1:]).k_BTI
        found.append(torch.einsum("btji,bti->j", q, k))
        unrotated = last(x, low, cos[:1], sin[:1])
        assert unrotated.k_BTI.equal(last.k_norm(last.wk(x)))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    assert (found[0] - found[2]).abs().max() > 1e-2


@torch.no_grad()
def test_caches_and_passes_that_sparse_attention_refuses(
    make_model: Make, tokens: torch.Tensor
) -> None:
    model = make_model(**SPARSE)
    plain = make_model()
    for cache in (DynamicCache(), plain.model.new_cache()):
        with pytest.raises(ValueError, match="has no place for index keys"):
            model(tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="does not go with branches"):
        model(tokens, branches=[(10, 30), (10, 30)], use_cache=False)
    with pytest.raises(ValueError, match="the model has no indexer"):
        plain.config.set_indexer("sparse")
    model.config.set_indexer("dense")
    assert model(tokens).logits.shape == (2, 61, 97)
    model.config.set_indexer("auto")
    assert model.config.indexer == "dense"


def test_the_cost_counts_the_indexer() -> None:
    from ic.model.cost import cache_bytes_per_token, num_parameters

    for changes in ({}, {"index_group_size": 3}, {"q_lora_rank": None}, {"indexer": "dense"}):
        config = MLAConfig(**SMALL | SPARSE | changes)
        model = MLAForCausalLM(config)
        assert num_parameters(config) == sum(p.numel() for p in model.parameters())
        keys = 0 if config.indexer == "dense" else 3 // config.index_group_size * 16
        assert cache_bytes_per_token(config) == 2 * (3 * 40 + keys)


def test_answers_of_another_mode_are_not_taken_for_these(make_model: Make) -> None:
    """Evaluations reuse answers of a model with the same fingerprint."""
    changes = ({}, {"index_topk": 13}, {"index_cache_dtype": "fp8"}, {"indexer": "dense"})
    found = [fingerprint(make_model(**SPARSE | change)) for change in changes]
    assert len(set(found)) == 4
    assert len({name.partition("-")[0] for name in found}) == 1
