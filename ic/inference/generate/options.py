"""What `generate` is asked. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Sampling
from ic.inference.options import InferenceOptions

# Tokens of an answer where nothing is said: to a prompt, and to a turn of a conversation.
_PROMPT_TOKENS, _TURN_TOKENS = 64, 1024


def check_utf8(name: str, text: str) -> None:
    """Refuse bytes of the command line, or of standard input, that are no text: Python hands them
    on as halves of surrogate pairs.

    Raises:
        ValueError: there are some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: not valid UTF-8 at character {error.start + 1}; convert it"
        ) from error


@dataclass
class _Prompts:
    """What is to be continued; classes of their own because help shows the last base first."""

    prompt: str = ""
    prompt_file: str | None = None
    output: str | None = None
    chat: bool = False
    system: str | None = None


@dataclass
class _Draws:
    """How the tokens are drawn."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_end: bool = False
    seed: int = 0
    logprobs: int | None = None


@dataclass
class GenerateOptions(EngineOptions, _Draws, _Prompts, InferenceOptions):
    """The verb `generate`: continue prompts.

    Attributes:
        prompt: text to continue; `-` reads it from standard input.
        prompt_file: a text file to continue, or prompts as JSON lines (`.jsonl`), each an object
            with `prompt` (text) or `messages` (a conversation), and whatever else is to stand
            beside its answer.
        output: of JSON lines, the file of the answers, a line per prompt in their order; null is
            NAME.answers.jsonl beside NAME.jsonl. Answers that are in it already are kept.
        chat: take a prompt as a user's message and let the model reply, in the tokenizer's chat
            template. Without a prompt, a conversation on the terminal: /reset begins anew, /quit
            ends it, Ctrl-C stops an answer.
        system: with `chat`, a system message in front.
        max_new_tokens: tokens after which an answer ends at the latest; null is 64, and 1024 in a
            conversation on the terminal.
        temperature: divides the logits before a token is drawn; 0 takes the likeliest, 2 at most.
        top_k: draw from so many likeliest tokens; 0 for any number.
        top_p: draw from the likeliest tokens that hold this share of the probability.
        min_p: draw from tokens at least this share as likely as the likeliest.
        presence_penalty: taken from the logit of each token that was drawn before, from -2 to 2.
        frequency_penalty: the same for each time that it was drawn, from -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and
            answer; 1 for none.
        stop: strings that end an answer, and are left out of it.
        stop_token_ids: tokens that end an answer, beside the model's own.
        ignore_end: go on after the model's own end.
        seed: of the draws; of the n-th prompt of a file it is n more.
        logprobs: of JSON lines, write the log-probability of each token, and of so many likeliest
            ones (0 to 20).
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
        cache_tokens: tokens that the cache holds, over all prompts in work; null is what a prompt
            needs, and of many prompts what fits into the GPU's memory.
        page_tokens: tokens of a page of the cache; prompts that begin alike share whole pages.
        max_batch: most prompts of a file that are answered at once.
        prefix_cache: keep pages for prompts that begin alike, as the turns of a conversation.
        cuda_graphs: record the launches of a step and replay them; null does it on a GPU.

    Raises:
        ValueError: a value out of its range.
    """

    prefill_chunk_tokens: int = 32768

    def __post_init__(self) -> None:
        InferenceOptions.__post_init__(self)
        EngineOptions.__post_init__(self)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature={self.temperature}: must be from 0 (greedy) to 2")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        self.sampling(0)  # checks the rest, in OpenAI's words

    @property
    def is_jsonl(self) -> bool:
        """Whether there are many prompts."""
        return self.prompt_file is not None and self.prompt_file.endswith(".jsonl")

    @property
    def is_conversation(self) -> bool:
        """Whether turns are read from the terminal."""
        return self.chat and not self.prompt and self.prompt_file is None

    @property
    def most_new_tokens(self) -> int:
        """`max_new_tokens`, or what it stands for."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return _TURN_TOKENS if self.is_conversation else _PROMPT_TOKENS

    def sampling(self, number: int) -> Sampling:
        """How the answer to the prompt of this number is drawn."""
        return Sampling(
            max_tokens=self.most_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_end=self.ignore_end,
            seed=self.seed + number,
            logprobs=self.logprobs,
        )

    def check_prompts(self) -> None:
        """Raises:
        ValueError: nothing is to be continued, or options that do not go with what is.
        """
        for name, text in {"prompt": self.prompt, "system": self.system or ""}.items():
            check_utf8(name, text)
        for text in self.stop:
            check_utf8("stop", text)
        if self.prompt and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file are both given: give one of the two")
        if not self.prompt and self.prompt_file is None and not self.chat:
            raise ValueError(
                "generate needs prompt=TEXT, prompt_file=FILE, or chat=true for a conversation on "
                "the terminal"
            )
        if self.system is not None and not self.chat:
            raise ValueError(
                "system is the first message of a chat: set chat=true, or leave it out"
            )
        for name in ("output", "logprobs"):
            if getattr(self, name) is not None and not self.is_jsonl:
                raise ValueError(
                    f"{name}={getattr(self, name)}: is of answers to JSON lines; give "
                    "prompt_file=NAME.jsonl, or leave it out"
                )
        if self.output is not None and not self.output.endswith(".jsonl"):
            raise ValueError(f"output={self.output!r}: must end in .jsonl")
