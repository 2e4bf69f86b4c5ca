"""Answers in OpenAI's form: whole ones, the chunks of streamed ones, log-probabilities."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ic.inference.engine.request import Finish, Output, TokenLogprob
from ic.serving.token_text import TokenTexts

Json = dict[str, Any]
# What OpenAI writes for a token that cannot come: JSON has no infinity.
_IMPOSSIBLE = -9999.0


@dataclass
class Choice:
    """What the engine has answered so far for one choice of one prompt."""

    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish: Finish | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    begun: bool = False

    def count(self, output: Output) -> None:
        """Count what one step gave."""
        self.num_tokens += len(output.token_ids)
        self.prompt_tokens = output.prompt_tokens
        self.cached_tokens = output.cached_tokens
        self.finish = output.finish

    def add(self, output: Output) -> None:
        """Count and keep what one step gave."""
        self.count(output)
        self.texts.append(output.text)
        self.logprobs += output.logprobs or ()

    @property
    def text(self) -> str:
        return "".join(self.texts)


def usage(choices: Sequence[Choice], per_prompt: int) -> Json:
    """Tokens of prompts and answers; a prompt with several choices counts once.

    Args:
        per_prompt: choices of each prompt, which follow each other.
    """
    first = choices[::per_prompt]
    prompt = sum(choice.prompt_tokens for choice in first)
    answers = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in first)},
    }


class Form(ABC):
    """How one request is answered: by completions or by chat.

    Args:
        id: of the answer, the same in each chunk.
        model: the name that the client knows.
        texts: of tokens, for log-probabilities.
    """

    WHOLE: str
    CHUNK: str

    def __init__(self, id: str, model: str, texts: TokenTexts) -> None:
        self.id = id
        self._head = {"created": int(time.time()), "model": model}
        self._texts = texts

    def whole(self, choices: Sequence[Choice], per_prompt: int) -> Json:
        """The answer to a request without a stream."""
        return {
            "id": self.id,
            "object": self.WHOLE,
            **self._head,
            "choices": [
                {
                    "index": index,
                    **self._content(index, choice),
                    "logprobs": self._logprobs(index, choice.logprobs) if choice.logprobs else None,
                    "finish_reason": choice.finish,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(choices, per_prompt),
        }

    def chunk(self, index: int, choice: Choice, output: Output) -> Json | None:
        """The next chunk of a stream, or None where a step brought nothing to show."""
        shown = bool(output.text or output.logprobs or output.finish or not choice.begun)
        if not shown:
            return None
        found = {
            "index": index,
            **self._delta(index, choice, output),
            "logprobs": self._logprobs(index, output.logprobs) if output.logprobs else None,
            "finish_reason": output.finish,
        }
        choice.begun = True
        return self._chunk([found])

    def last_chunk(self, choices: Sequence[Choice], per_prompt: int) -> Json:
        """The chunk with the tokens of the whole stream."""
        return {**self._chunk([]), "usage": usage(choices, per_prompt)}

    def _chunk(self, choices: list[Json]) -> Json:
        return {"id": self.id, "object": self.CHUNK, **self._head, "choices": choices}

    @abstractmethod
    def _content(self, index: int, choice: Choice) -> Json: ...

    @abstractmethod
    def _delta(self, index: int, choice: Choice, output: Output) -> Json: ...

    @abstractmethod
    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json: ...


class CompletionForm(Form):
    """Of /v1/completions.

    Args:
        echoed: for each choice the text that is put in front of it.
    """

    WHOLE = CHUNK = "text_completion"

    def __init__(self, id: str, model: str, texts: TokenTexts, echoed: Sequence[str]) -> None:
        super().__init__(id, model, texts)
        self._echoed = echoed
        self._offsets = [len(text) for text in echoed]

    def _content(self, index: int, choice: Choice) -> Json:
        return {"text": self._echoed[index] + choice.text}

    def _delta(self, index: int, choice: Choice, output: Output) -> Json:
        return {"text": output.text if choice.begun else self._echoed[index] + output.text}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json:
        offsets, tokens, tops = [], [], []
        for each in logprobs:
            token = self._texts.of(each.token_id)[0]
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
            tokens.append(token)
            tops.append(
                {self._texts.of(other)[0]: _finite(logprob) for other, logprob in each.top}
                | {token: _finite(each.logprob)}
            )
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(each.logprob) for each in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatForm(Form):
    """Of /v1/chat/completions."""

    WHOLE, CHUNK = "chat.completion", "chat.completion.chunk"

    def _content(self, index: int, choice: Choice) -> Json:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def _delta(self, index: int, choice: Choice, output: Output) -> Json:
        role = {} if choice.begun else {"role": "assistant"}
        return {"delta": {**role, "content": output.text}}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json:
        content = [
            {
                **self._token(each.token_id, each.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in each.top],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        text, found = self._texts.of(token_id)
        spelled = None if found is None else list(found)
        return {"token": text, "logprob": _finite(logprob), "bytes": spelled}


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
