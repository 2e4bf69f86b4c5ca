"""Models of transformers behind the engine's interface: as `model.generate` answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ic.inference.engine.request import Finish, Output, Request, Sampling
from ic.inference.generate.answers import open_answers
from ic.inference.generate.options import GenerateOptions
from ic.inference.loading import load_source
from ic.inference.one_by_one import OneByOne
from tests.inference.test_transformers_model import MAKERS, cpu, prompts, save


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    return save(MAKERS[request.param](), tmp_path / request.param)


def run(answers: OneByOne, *requests: Request) -> dict[str, list[Output]]:
    for request in requests:
        answers.add(request)
    found: dict[str, list[Output]] = {request.id: [] for request in requests}
    while answers.has_work:
        for output in answers.step():
            found[output.request_id].append(output)
    return found


@torch.no_grad()
def test_answers_are_those_of_generate(folder: Path) -> None:
    loaded = load_source(cpu(folder))
    answers = OneByOne(loaded, prefill_chunk_tokens=16)
    first = prompts(1, 61)[0]
    changed = first.clone()
    changed[40] += 1
    asked = {"a": first, "b": changed, "c": first[:50]}
    sampling = Sampling(max_tokens=7, ignore_end=True, logprobs=0)
    found = run(
        answers, *(Request(name, tuple(ids.tolist()), sampling) for name, ids in asked.items())
    )
    for name, ids_T in asked.items():
        expected = loaded.model.generate(
            ids_T[None],
            attention_mask=torch.ones_like(ids_T[None]),
            do_sample=False,
            max_new_tokens=7,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids_T) :]
        outputs = found[name]
        assert [token for output in outputs for token in output.token_ids] == expected.tolist()
        text = loaded.tokenizer.decode(expected, skip_special_tokens=True)
        assert "".join(output.text for output in outputs) == text
        assert [output.finish for output in outputs] == [None] * 6 + [Finish.LENGTH]
        logprobs = loaded.model(torch.cat((ids_T, expected))[None]).logits.log_softmax(-1)
        whole = logprobs[0, len(ids_T) - 1 : -1].gather(1, expected[:, None])[:, 0]
        drawn = [each.logprob for output in outputs for each in output.logprobs or ()]
        torch.testing.assert_close(torch.tensor(drawn), whole, atol=1e-4, rtol=1e-4)
    shared = found["b"][0].cached_tokens
    assert shared in (0, 40)  # none where a layer forgets, as a sliding window does


def test_the_prompts_have_their_beginning_in_common(tmp_path: Path) -> None:
    loaded = load_source(cpu(save(MAKERS["llama"](), tmp_path / "llama")))
    answers = OneByOne(loaded, 16)
    ids = tuple(prompts(1, 61)[0].tolist())
    sampling = Sampling(max_tokens=4, ignore_end=True)
    first = run(answers, Request("a", ids, sampling))["a"]
    drawn = tuple(token for output in first for token in output.token_ids)
    longer = run(answers, Request("b", (*ids, *drawn, 5), sampling))["b"]
    assert longer[0].cached_tokens == 61 + 3


def test_a_prompt_is_read_in_pieces(tmp_path: Path) -> None:
    loaded = load_source(cpu(save(MAKERS["llama"](), tmp_path / "llama")))
    answers = OneByOne(loaded, 16)
    ids = tuple(prompts(1, 40)[0].tolist())
    answers.add(Request("a", ids, Sampling(max_tokens=2, ignore_end=True)))
    seen = []
    for _ in range(3):
        outputs = answers.step()
        seen.append((answers.tokens_read("a"), len(outputs)))
    assert seen == [(16, 0), (32, 0), (40, 1)]
    answers.cancel("a")
    answers.step()
    answers.add(Request("b", (7, *ids), Sampling(max_tokens=1, ignore_end=True)))
    answers.step()
    answers.cancel("b")  # in the middle of its prompt
    assert [output.finish for output in answers.step()] == [Finish.CANCELLED]
    assert not answers.has_work
    found = run(answers, Request("c", ids, Sampling(max_tokens=1, ignore_end=True)))["c"]
    fresh = run(OneByOne(loaded, 64), Request("c", ids, Sampling(max_tokens=1, ignore_end=True)))
    assert found[0].token_ids == fresh["c"][0].token_ids


def test_cancelled_and_too_long(tmp_path: Path) -> None:
    loaded = load_source(cpu(save(MAKERS["llama"](), tmp_path / "llama")))
    answers = open_answers(loaded, GenerateOptions(prompt="x"), None)
    for name in "abc":
        answers.add(Request(name, (5, 6, 7), Sampling(max_tokens=5, ignore_end=True)))
    answers.step()
    answers.cancel("a")
    answers.cancel("c")
    answers.cancel("unknown")
    said = {output.request_id: output.finish for output in answers.step()}
    assert said["a"] == said["c"] == Finish.CANCELLED
    while answers.has_work:
        said |= {output.request_id: output.finish for output in answers.step()}
    assert said["b"] == Finish.LENGTH
    with pytest.raises(ValueError, match="maximum context length is"):
        answers.add(Request("d", (5,), Sampling(max_tokens=10**7)))
    with pytest.raises(ValueError, match="Invalid 'stop_token_ids': token 1000000"):
        answers.add(Request("d", (5,), Sampling(stop_token_ids=(10**6,))))
    with pytest.raises(ValueError, match=r"page_tokens=16: is of our engine"):
        open_answers(loaded, GenerateOptions(prompt="x", page_tokens=16), None)
