"""What `generate` must do with any causal language model, in place of transformers' own class of
such tests, which its source distribution does not carry.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from tests.conftest import randomize

NEW_TOKENS = 10


class GenerationContracts:
    """A mixin beside `ModelTesterMixin`, whose `model_tester` and classes it uses."""

    all_generative_model_classes: Any
    model_tester: Any

    def _model_and_ids(self) -> tuple[Any, Tensor]:
        (model_class,) = self.all_generative_model_classes
        torch.manual_seed(0)
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = model_class(config).eval()
        randomize(model)
        model.generation_config.eos_token_id = None
        return model, inputs["input_ids"]

    def _greedy(self, model: Any, ids: Tensor | None, **how: Any) -> Any:
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **how}
        return model.generate(ids, **how)

    @torch.no_grad()
    def test_generate_greedy_takes_the_likeliest(self) -> None:
        model, ids = self._model_and_ids()
        text = ids
        for _ in range(NEW_TOKENS):
            text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        for use_cache in (True, False):
            assert self._greedy(model, ids, use_cache=use_cache).equal(text)

    @torch.no_grad()
    def test_generate_sampling_follows_the_seed(self) -> None:
        model, ids = self._model_and_ids()
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            how = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
            texts.append(self._greedy(model, ids, **how))
        assert texts[0].shape == (3 * len(ids), ids.shape[1] + NEW_TOKENS)
        assert texts[0].equal(texts[1])
        assert not texts[0][0].equal(texts[0][1])

    @torch.no_grad()
    def test_generate_beams_are_the_same_without_a_cache(self) -> None:
        model, ids = self._model_and_ids()
        for how in ({}, {"do_sample": True}, {"num_return_sequences": 2, "length_penalty": 2.0}):
            texts = []
            for use_cache in (True, False):
                torch.manual_seed(1)
                texts.append(self._greedy(model, ids, num_beams=4, use_cache=use_cache, **how))
            assert texts[0].equal(texts[1])

    @torch.no_grad()
    def test_generate_returns_scores_logits_and_hidden_states(self) -> None:
        model, ids = self._model_and_ids()
        out = self._greedy(
            model,
            ids,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
        )
        full = model(out.sequences[:, :-1], use_cache=False, output_hidden_states=True)
        new = full.logits[:, ids.shape[1] - 1 :]
        for given in (out.logits, out.scores):
            torch.testing.assert_close(torch.stack(given, 1), new, atol=1e-4, rtol=1e-4)
        assert isinstance(out.past_key_values, Cache)
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
        assert [len(step) for step in out.hidden_states] == [len(full.hidden_states)] * NEW_TOKENS
        for layer, whole in enumerate(full.hidden_states):
            steps = torch.cat([step[layer] for step in out.hidden_states], dim=1)
            torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_generate_padding_in_front_changes_nothing(self) -> None:
        model, ids = self._model_and_ids()
        padded = torch.cat((torch.zeros_like(ids[:, :5]), ids), dim=1)
        mask = (torch.arange(padded.shape[1]) >= 5).long().expand(len(ids), -1)
        text = self._greedy(model, padded, attention_mask=mask)
        assert text[:, 5:].equal(self._greedy(model, ids))

    @torch.no_grad()
    def test_generate_assisted_ways_are_greedy(self) -> None:
        model, ids = self._model_and_ids()
        ids = self._greedy(model, ids[:1], max_new_tokens=80)
        other = copy.deepcopy(model)
        torch.manual_seed(2)
        randomize(other)
        for how in (
            {"assistant_model": copy.deepcopy(model)},
            {"assistant_model": other},
            {"prompt_lookup_num_tokens": 3},
            {"assistant_early_exit": 1},
        ):
            for tokens in (1, NEW_TOKENS):
                expected = self._greedy(model, ids, max_new_tokens=tokens)
                assert self._greedy(model, ids, max_new_tokens=tokens, **how).equal(expected), how

    @torch.no_grad()
    def test_generate_goes_on_from_its_cache(self) -> None:
        model, ids = self._model_and_ids()
        whole = self._greedy(model, ids)
        first = self._greedy(model, ids, max_new_tokens=4, return_dict_in_generate=True)
        again = self._greedy(
            model,
            first.sequences,
            max_new_tokens=NEW_TOKENS - 4,
            past_key_values=first.past_key_values,
        )
        assert again.equal(whole)

    @torch.no_grad()
    def test_generate_takes_back_what_is_cropped(self) -> None:
        model, ids = self._model_and_ids()
        out = self._greedy(model, ids, return_dict_in_generate=True)
        cache = out.past_key_values
        cache.crop(0)
        cache.crop(-6)
        kept = out.sequences[:, : cache.get_seq_length() + 1]
        text = self._greedy(model, kept, max_new_tokens=6, past_key_values=cache)
        assert text.equal(out.sequences)

    @torch.no_grad()
    def test_generate_from_embeddings_is_from_ids(self) -> None:
        model, ids = self._model_and_ids()
        embeds = model.get_input_embeddings()(ids)
        expected = self._greedy(model, ids)[:, ids.shape[1] :]
        for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert self._greedy(model, None, inputs_embeds=embeds, **how).equal(expected)

    @torch.no_grad()
    def test_generate_over_other_caches(self) -> None:
        model, ids = self._model_and_ids()
        expected = self._greedy(model, ids)
        for kind in ("dynamic", "static"):
            assert self._greedy(model, ids, cache_implementation=kind).equal(expected)
        how = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        assert self._greedy(model, ids, **how).shape == expected.shape

    @torch.no_grad()
    def test_generate_prefills_in_chunks(self) -> None:
        model, ids = self._model_and_ids()
        text = self._greedy(model, ids, prefill_chunk_size=5)
        assert text.equal(self._greedy(model, ids))

    @torch.no_grad()
    def test_generate_stops(self) -> None:
        model, ids = self._model_and_ids()
        text = self._greedy(model, ids[:1])
        end = int(text[0, ids.shape[1] + 3])
        stop = text[0, ids.shape[1] :].tolist().index(end) + 1
        got = self._greedy(model, ids[:1], eos_token_id=end)
        assert got.equal(text[:, : ids.shape[1] + stop])

        class AtLength(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                return torch.full((len(input_ids),), input_ids.shape[1] >= ids.shape[1] + 2)

        criteria = StoppingCriteriaList([AtLength()])
        got = self._greedy(model, ids[:1], stopping_criteria=criteria)
        assert got.equal(text[:, : ids.shape[1] + 2])

    @torch.no_grad()
    def test_generate_streams(self) -> None:
        model, ids = self._model_and_ids()
        parts: list[Tensor] = []

        class Streamer:
            def put(self, value: Tensor) -> None:
                parts.append(value.flatten())

            def end(self) -> None:
                parts.append(torch.tensor([-1]))

        text = self._greedy(model, ids[:1], streamer=Streamer())
        assert torch.cat(parts).tolist() == [*text[0].tolist(), -1]

    @torch.no_grad()
    def test_forward_keeps_the_logits_asked_for(self) -> None:
        model, ids = self._model_and_ids()
        full = model(ids).logits
        for keep in (1, 3, torch.tensor([0, 2, 5])):
            got = model(ids, logits_to_keep=keep).logits
            wanted = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_forward_takes_a_whole_mask(self) -> None:
        model, ids = self._model_and_ids()
        tokens = ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        padded = torch.ones_like(ids)
        padded[0, :5] = 0
        whole = causal & padded.bool()[:, None]
        whole |= torch.eye(tokens, dtype=torch.bool)
        expected = model(ids, attention_mask=padded).logits
        got = model(ids, attention_mask=whole[:, None]).logits
        torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(got[0, 5:], expected[0, 5:], atol=1e-4, rtol=0)
