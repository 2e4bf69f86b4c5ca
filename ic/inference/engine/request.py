"""What is asked of the engine, and what it answers step by step. Imports no PyTorch.

What is out of range is refused in OpenAI's words, because a server passes them on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

MOST_LOGPROBS = 20  # OpenAI's limit: more would make the answer of a token larger than a page
# A generator's seed is a signed number of 64 bits.
SEED_LIMIT = 2**63


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn, and when they end.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: divides the logits; 0 takes the likeliest token, from 0 to 2.
        top_k: draw from so many likeliest tokens; 0 for any number.
        top_p: draw from the likeliest tokens that hold this share of the probability (nucleus
            sampling, arXiv 1904.09751), above 0 and up to 1.
        min_p: draw from the tokens that are at least this share as likely as the likeliest
            (arXiv 2407.01082), from 0 to 1.
        presence_penalty: taken from the logit of each token that was drawn before, from -2 to 2.
        frequency_penalty: the same for each time that it was drawn, from -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt
            and the answer (arXiv 1909.05858), above 0; 1 for none.
        stop: strings that end the answer, and are left out of it.
        stop_token_ids: tokens that end the answer, beside the tokenizer's own end.
        ignore_end: go on after the tokenizer's end, as measurements do.
        seed: of this request's draws; None for another one each time.
        logprobs: None for no log-probabilities, 0 for those of the drawn tokens, n for those of
            the n likeliest too, up to 20.

    Raises:
        ValueError: a value of another type or out of its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("top_k", self.top_k, 0)
        _check_decimal("temperature", self.temperature, 0, 2)
        _check_decimal("top_p", self.top_p, 0, 1, without_low=True)
        _check_decimal("min_p", self.min_p, 0, 1)
        _check_decimal("presence_penalty", self.presence_penalty, -2, 2)
        _check_decimal("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_decimal("repetition_penalty", self.repetition_penalty, 0, without_low=True)
        for text in self.stop:
            if not isinstance(text, str):
                raise _wrong_type("stop", "an array of strings", text)
            if not text:
                raise ValueError(
                    "Invalid 'stop': empty string. Expected strings of at least one character."
                )
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0)
        if self.seed is not None:
            _check_integer("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MOST_LOGPROBS)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Whether a model of so many tokens can draw those that are named.

        Raises:
            ValueError: it cannot.
        """
        for token in self.stop_token_ids:
            if token >= vocabulary:
                raise ValueError(
                    f"Invalid 'stop_token_ids': token {token} is not in the vocabulary of "
                    f"{vocabulary} tokens."
                )


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        id: the caller's name for it, which no other request in work may have.
        prompt_ids: tokens of the prompt, one at least.
        sampling: how it is continued.

    Raises:
        ValueError: no id, or a prompt without a token.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("Invalid 'id': empty string. Expected at least one character.")
        if not self.prompt_ids:
            raise ValueError("Invalid 'prompt': empty array. Expected at least one token.")


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # at a stop string or token
    LENGTH = "length"  # at `max_tokens`, or at the model's last position
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the probabilities of one drawn token and of the likeliest ones.

    Attributes:
        top: (token, logarithm), the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Output:
    """What one step gave one request.

    Attributes:
        token_ids: new tokens.
        text: new text in whole characters; a stop string is withheld.
        logprobs: one for each new token, or None if none were asked for.
        finish: why the answer ended; None while it goes on.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that were found in the cache.
        error: what went wrong, where `finish` is an error.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] | None
    finish: Finish | None
    prompt_tokens: int
    cached_tokens: int
    error: str | None = None


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(name, "an integer", value)
    if value < low:
        raise _out_of_range(name, "integer below minimum", f">= {low}", value)
    if high is not None and value > high:
        raise _out_of_range(name, "integer above maximum", f"<= {high}", value)


def _check_decimal(
    name: str, value: object, low: float, high: float = float("inf"), *, without_low: bool = False
) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong_type(name, "a decimal", value)
    if without_low and not value > low:
        raise _out_of_range(name, "decimal below minimum", f"> {low}", value)
    if not value >= low:
        raise _out_of_range(name, "decimal below minimum", f">= {low}", value)
    if not value <= high or value == float("inf"):
        raise _out_of_range(name, "decimal above maximum", f"<= {high}", value)


def _wrong_type(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"Invalid type for '{name}': expected {expected}, but got {value!r} instead.")


def _out_of_range(name: str, what: str, expected: str, value: object) -> ValueError:
    return ValueError(
        f"Invalid '{name}': {what} value. Expected a value {expected}, but got {value} instead."
    )
