"""The bodies of requests: OpenAI's fields that are heeded, vLLM's extra ones, and no others."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json

from ic.inference.engine.request import MOST_LOGPROBS, SEED_LIMIT, Sampling
from ic.serving.errors import ApiError, invalid
from ic.serving.unsupported import (
    IN_CHAT,
    IN_COMPLETIONS,
    IN_MESSAGES,
    IN_STREAM_OPTIONS,
    Unsupported,
    supported,
)

Prompt = str | list[int]
# OpenAI's defaults, which differ from those of a measurement.
_TEMPERATURE = 1.0
_COMPLETION_TOKENS = 16
_MOST_CHOICES = 128


class _Strict(BaseModel):
    """Refuses unknown fields and values of another type: nothing is converted or left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Of a streamed answer.

    Attributes:
        include_usage: a last chunk says how many tokens prompt and answer had.
    """

    include_usage: bool | None = None


class Drawing(_Strict, ABC):
    """What completions and chat have in common. Null leaves a field at its default."""

    UNSUPPORTED: ClassVar[Unsupported] = {}

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    user: str | None = None
    # vLLM's extra fields, by its names.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    @abstractmethod
    def num_answers(self) -> int:
        """Choices of all prompts."""

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def with_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Of `Sampling`: none, those of drawn tokens, or those of so many likeliest, too."""

    @abstractmethod
    def asked_tokens(self, room_tokens: int) -> int:
        """Most tokens of the answer, for which the prompt leaves so much room."""

    def sampling(self, choice: int, max_tokens: int) -> Sampling:
        """How one of the choices is drawn; each has a seed of its own, as in vLLM.

        Raises:
            ApiError: a value out of its range.
        """
        given = {
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "ignore_end": self.ignore_eos,
        }
        stop = self.stop or ()
        temperature = self.temperature
        try:
            return Sampling(
                max_tokens=max_tokens,
                temperature=_TEMPERATURE if temperature is None else temperature,
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                seed=None if self.seed is None else _next_seed(self.seed, choice),
                logprobs=self.num_logprobs,
                **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            )
        except ValueError as error:
            named = re.search(r"'(\w+)'", str(error))
            raise invalid(str(error), named[1] if named else None, "invalid_value") from None

    def check(self) -> None:
        """Raises:
        ApiError: fields that do not go together.
        """
        if self.stream_options is not None and not self.streamed:
            raise invalid(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                "stream_options",
            )


def _prompts(value: Any) -> list[Prompt]:
    """The prompts of a completion: one text, one list of tokens, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(each) is int for each in value):
            return [value]
        if all(isinstance(each, str) for each in value):
            return list(value)
        if all(isinstance(each, list) for each in value) and all(
            type(token) is int for each in value for token in each
        ):
            return list(value)
    raise PydanticCustomError(
        "prompt",
        "Expected a string, or an array of strings, of token ids or of arrays of token ids, with "
        "at least one entry.",
    )


class CompletionBody(Drawing):
    """The body of /v1/completions."""

    UNSUPPORTED: ClassVar = IN_COMPLETIONS

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_prompts),
        WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array"}]}),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def num_answers(self) -> int:
        return len(self.prompt) * self.choices

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def asked_tokens(self, room_tokens: int) -> int:
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise invalid(
                "This server gives no log-probabilities of prompts: leave out 'echo' or "
                "'logprobs'.",
                "echo",
                "unsupported_value",
            )


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(Drawing):
    """The body of /v1/chat/completions."""

    UNSUPPORTED: ClassVar = IN_CHAT

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def num_answers(self) -> int:
        return self.choices

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked_tokens(self, room_tokens: int) -> int:
        # `check` lets both through where they are equal. Neither may be 0.
        return self.max_completion_tokens or self.max_tokens or max(room_tokens, 1)

    def check(self) -> None:
        super().check()
        named = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(named) > 1:
            raise invalid(
                f"'max_completion_tokens' is {self.max_completion_tokens} and 'max_tokens', its "
                f"older name, {self.max_tokens}: give one of them, or both with the same value.",
                "max_completion_tokens",
                "invalid_value",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid(
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
                "top_logprobs",
            )


Body = TypeVar("Body", bound=Drawing)


def parse(kind: type[Body], body: bytes) -> Body:
    """The checked body of a request.

    Raises:
        ApiError: it is no JSON object, or a field is unknown, unsupported or of another type.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}.") from None
    if not isinstance(value, dict):
        raise invalid("The JSON body of your request must be an object.")
    value = supported(value, kind.UNSUPPORTED)
    if isinstance(options := value.get("stream_options"), dict):
        value["stream_options"] = supported(options, IN_STREAM_OPTIONS, "stream_options.")
    if isinstance(messages := value.get("messages"), list):
        value["messages"] = [
            supported(message, IN_MESSAGES, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    try:
        parsed = kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error) from None
    parsed.check()
    return parsed


def _explained(error: ValidationError) -> ApiError:
    """The first thing that is wrong, with the path to it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ""
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():  # or the name of a branch of a union, such as list[str]
            path += f".{part}" if path else part
    path = re.sub(r"\.(str|bool|int|float)$", "", path)
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return invalid(f"Unknown parameter: '{path}'.", path, "unknown_parameter")
    return invalid(f"Invalid '{path}': {first['msg']}", path, "invalid_value")


def _next_seed(seed: int, choice: int) -> int:
    """The seed of a choice; the largest number is followed by the smallest."""
    moved = seed + choice
    return moved if moved < SEED_LIMIT or seed >= SEED_LIMIT else moved - 2 * SEED_LIMIT
