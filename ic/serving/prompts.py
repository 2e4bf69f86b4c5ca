"""A checked body -> what the engine is asked, and the form of the answer."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ic.datamodules.conversations import apply_template, text_ids
from ic.inference.engine.request import Request
from ic.inference.loading import Loaded
from ic.serving.errors import ApiError, invalid
from ic.serving.requests import ChatBody, CompletionBody
from ic.serving.responses import ChatForm, CompletionForm, Form
from ic.serving.token_text import TokenTexts


@dataclass(frozen=True)
class Work:
    """What one HTTP request asks for.

    Attributes:
        requests: one for each choice of each prompt.
        form: how the answer is written.
        per_prompt: choices of each prompt, which follow each other.
    """

    requests: list[Request]
    form: Form
    per_prompt: int


class Prompts:
    """Makes prompts of one model.

    Args:
        name: what clients call the model.
        context_tokens: most tokens of a prompt with its answer.
    """

    def __init__(self, loaded: Loaded, name: str, context_tokens: int) -> None:
        self._name = name
        self._context_tokens = context_tokens
        self._tokenizer = loaded.tokenizer
        self._vocab_size = loaded.model.config.get_text_config().vocab_size
        self._texts = TokenTexts(loaded.tokenizer)
        # One thread: a tokenizer may not be used by several.
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def work(self, body: CompletionBody | ChatBody) -> Work:
        """What a body asks of the engine; the event loop goes on meanwhile.

        Raises:
            ApiError: another model, a prompt that is none, or one that is too long.
        """
        if body.model is not None and body.model != self._name:
            raise ApiError(
                404,
                f"The model '{body.model}' does not exist. This server has '{self._name}'.",
                param="model",
                code="model_not_found",
            )
        loop = asyncio.get_running_loop()
        if isinstance(body, ChatBody):
            return await loop.run_in_executor(self._thread, self._chat, body)
        return await loop.run_in_executor(self._thread, self._completion, body)

    def close(self) -> None:
        self._thread.shutdown()

    def _chat(self, body: ChatBody) -> Work:
        if self._tokenizer.chat_template is None:
            raise invalid(
                f"The model '{self._name}' has no chat template. Use /v1/completions.", "messages"
            )
        messages = [{"role": each.role, "content": each.text} for each in body.messages]
        try:
            ids, _ = apply_template(self._tokenizer, messages, "messages", prompt=True)
        except ValueError as error:
            raise invalid(str(error), "messages", "invalid_value") from None
        name = f"chatcmpl-{uuid.uuid4().hex}"
        form = ChatForm(name, self._name, self._texts)
        return Work(self._requests(name, [ids], body, "messages"), form, body.choices)

    def _completion(self, body: CompletionBody) -> Work:
        prompts, echoed = [], []
        for prompt in body.prompt:
            text = ""
            if isinstance(prompt, str):
                prompts.append(text_ids(self._tokenizer, prompt))
                text = prompt
            else:
                self._check_tokens(prompt, "prompt")
                prompts.append(prompt)
                text = str(self._tokenizer.decode(prompt)) if body.echo else ""
            echoed += [text if body.echo else ""] * body.choices
        name = f"cmpl-{uuid.uuid4().hex}"
        form = CompletionForm(name, self._name, self._texts, echoed)
        return Work(self._requests(name, prompts, body, "prompt"), form, body.choices)

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        """Raises:
        ApiError: a token that the model does not have.
        """
        if wrong := [token for token in tokens if not 0 <= token < self._vocab_size]:
            raise invalid(
                f"Invalid '{param}': token {wrong[0]} is none of the model's, which are 0 to "
                f"{self._vocab_size - 1}.",
                param,
                "invalid_value",
            )

    def _requests(
        self, name: str, prompts: list[list[int]], body: CompletionBody | ChatBody, param: str
    ) -> list[Request]:
        self._check_tokens(body.stop_token_ids or [], "stop_token_ids")
        found: list[Request] = []
        for prompt in prompts:
            if not prompt:
                raise invalid(
                    f"Invalid '{param}': empty, or without a token. Expected text or token ids "
                    "that make at least one token.",
                    param,
                    "invalid_value",
                )
            tokens = tuple(prompt)
            asked = body.asked_tokens(self._context_tokens - len(tokens))
            if len(tokens) + asked > self._context_tokens:
                raise invalid(
                    f"This model's maximum context length is {self._context_tokens} tokens. "
                    f"However, you requested {len(tokens) + asked} tokens ({len(tokens)} in the "
                    f"{param}, {asked} in the completion). Please reduce the length of the "
                    f"{param} or completion.",
                    param,
                    "context_length_exceeded",
                )
            for choice in range(body.choices):
                sampling = body.sampling(choice, asked)
                found.append(Request(f"{name}-{len(found)}", tokens, sampling))
        return found
