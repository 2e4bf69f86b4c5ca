"""What OpenAI's own client gets is what the model says, whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer
from tests.serving.served import NAME, Served, greedy

TOKENIZER = ByteTokenizer()
PROMPT = "The pass key is 27 14."


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client()


def text_of(folder: Path, prompt_ids: list[int], new_tokens: int) -> str:
    return str(TOKENIZER.decode(greedy(folder, prompt_ids, new_tokens), skip_special_tokens=True))


def test_a_completion_is_what_generate_answers(client: openai.OpenAI, folder: Path) -> None:
    ids = TOKENIZER(PROMPT)["input_ids"]
    expected = text_of(folder, ids, 24)
    for prompt in (PROMPT, ids):
        found = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=24, temperature=0, seed=3
        )
        assert found.choices[0].text == expected
        assert found.choices[0].finish_reason == "length"
        assert found.usage.prompt_tokens == len(ids)
        assert found.usage.completion_tokens == 24
        assert found.usage.total_tokens == len(ids) + 24
    echoed = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=4, temperature=0, echo=True
    )
    assert echoed.choices[0].text == PROMPT + text_of(folder, ids, 4)
    # OpenAI's default is 16 tokens.
    short = client.completions.create(model=NAME, prompt=PROMPT, temperature=0)
    assert short.choices[0].text == text_of(folder, ids, 16)
    assert short.usage.completion_tokens == 16


def test_several_prompts_and_choices(client: openai.OpenAI, folder: Path) -> None:
    prompts = ["one", "two and a half"]
    found = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=6, temperature=0)
    expected = [text_of(folder, TOKENIZER(p)["input_ids"], 6) for p in prompts]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert found.usage.prompt_tokens == len("".join(prompts))  # each prompt once
    assert found.usage.completion_tokens == 24


def test_choices_are_drawn_apart_and_the_same_again(client: openai.OpenAI) -> None:
    def drawn(**options: Any) -> list[str]:
        found = client.completions.create(
            model=NAME, prompt=PROMPT, n=3, max_tokens=12, temperature=1.5, **options
        )
        return [choice.text for choice in found.choices]

    first = drawn(seed=1)
    assert len(set(first)) == 3
    assert drawn(seed=1) == first
    assert drawn(seed=2) != first
    # OpenAI's default temperature is 1.
    asked: Any = {"model": NAME, "prompt": PROMPT, "n": 3, "seed": 1}
    by_default = [choice.text for choice in client.completions.create(**asked).choices]
    at_one = client.completions.create(**asked, temperature=1)
    assert by_default == [choice.text for choice in at_one.choices]
    assert len(set(by_default)) > 1
    # vLLM's extra fields reach the engine: the likeliest token alone is greedy.
    alone = drawn(seed=1, extra_body={"top_k": 1})
    assert len(set(alone)) == 1
    assert drawn(seed=5, extra_body={"min_p": 1.0}) == alone


def test_chat_is_the_model_s_template(client: openai.OpenAI, folder: Path) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Why is "}, {"type": "text", "text": "it so?"}],
        },
    ]
    plain = [messages[0], {"role": "user", "content": "Why is it so?"}]
    ids = TOKENIZER.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    found = client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=20, temperature=0
    )
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == text_of(folder, ids, 20)
    assert found.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("choices", [1, 2])
def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, choices: int) -> None:
    asked: Any = {
        "model": NAME,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 20,
        "temperature": 0.8,
        "seed": 7,
        "n": choices,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *steps, last = chunks
    assert all(chunk.usage is None for chunk in steps)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    for index in range(choices):
        mine = [chunk.choices[0] for chunk in steps if chunk.choices[0].index == index]
        assert [m.delta.role for m in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(m.delta.content or "" for m in mine) == whole.choices[index].message.content
        assert [m.finish_reason for m in mine if m.finish_reason] == [
            whole.choices[index].finish_reason
        ]
        tokens = [t for m in mine if m.logprobs for t in m.logprobs.content]
        expected = whole.choices[index].logprobs.content
        assert [t.token for t in tokens] == [t.token for t in expected]
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in expected], abs=1e-4)


@torch.no_grad()
def test_log_probabilities_are_the_model_s(client: openai.OpenAI, folder: Path) -> None:
    ids = TOKENIZER(PROMPT)["input_ids"]
    answer = greedy(folder, ids, 8)
    logits = MLAForCausalLM.from_pretrained(folder)(torch.tensor([ids + answer])).logits[0]
    expected = logits.log_softmax(-1)[len(ids) - 1 : -1]
    tops = expected.topk(3)

    found = (
        client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3
        )
        .choices[0]
        .logprobs
    )
    own = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert found.token_logprobs == pytest.approx(own.tolist(), abs=1e-4)
    for each, values in zip(found.top_logprobs, tops.values, strict=True):
        assert sorted(each.values(), reverse=True) == pytest.approx(values.tolist(), abs=1e-4)
    assert found.text_offset[0] == 0
    assert found.text_offset[3] == sum(map(len, found.tokens[:3]))

    content = (
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        .choices[0]
        .logprobs.content
    )
    chat = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True
    )["input_ids"]
    answer = greedy(folder, chat, 8)
    # A byte is a token of this model; and there are ids that stand for nothing.
    spelled = [TOKENIZER.decode([token]).encode() for token in range(256, len(TOKENIZER))]
    expected_bytes = [*(bytes([byte]) for byte in range(256)), *spelled]
    for each, token in zip(content, answer, strict=True):
        if token < len(TOKENIZER):
            assert bytes(each.bytes) == expected_bytes[token]
        else:
            assert (each.bytes, each.token) == (None, f"token_id:{token}")
    assert all(len(each.top_logprobs) == 3 for each in content)
    assert all(each.top_logprobs[0].logprob == pytest.approx(each.logprob) for each in content)


def test_stop_strings_end_an_answer(client: openai.OpenAI, folder: Path) -> None:
    text = text_of(folder, TOKENIZER(PROMPT)["input_ids"], 60)
    stop = next(
        text[i : i + 2]
        for i in range(5, 50)
        if text[i : i + 2].isprintable() and "\N{REPLACEMENT CHARACTER}" not in text[i : i + 2]
    )
    for given in (stop, ["never there", stop]):
        found = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=60, temperature=0, stop=given
        )
        assert found.choices[0].text == text[: text.index(stop)]
        assert found.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt")
