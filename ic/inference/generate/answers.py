"""Who answers: the engine for our models, `OneByOne` for those of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Protocol

from ic.errors import RunFailedError
from ic.inference.engine.engine import Engine
from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Finish, Output, Request
from ic.inference.generate.options import GenerateOptions
from ic.inference.generate.reading import Reading
from ic.inference.loading import Loaded
from ic.inference.one_by_one import OneByOne
from ic.model import MLAForCausalLM

# Tokens that a CPU's cache holds for many prompts at once, if the longest one needs no more.
_MOST_CPU_TOKENS = 65536


class Answers(Protocol):
    """What `Engine` and `OneByOne` have in common; their docstrings say more."""

    @property
    def has_work(self) -> bool: ...

    def check(self, request: Request) -> None: ...

    def add(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def step(self) -> list[Output]: ...

    def tokens_read(self, request_id: str) -> int: ...


def open_answers(
    loaded: Loaded, options: GenerateOptions, lengths: Sequence[int] | None
) -> Answers:
    """Who answers with this model.

    Args:
        lengths: tokens of each prompt with its answer; None if they are not known beforehand.

    Raises:
        ValueError: options of the engine for a model that it does not run, or what `Engine` raises.
    """
    if not isinstance(loaded.model, MLAForCausalLM):
        plain = EngineOptions(prefill_chunk_tokens=options.prefill_chunk_tokens)
        for each in fields(EngineOptions):
            if getattr(options, each.name) != getattr(plain, each.name):
                raise ValueError(
                    f"{each.name}={getattr(options, each.name)}: is of our engine, and "
                    f"{loaded.name} is a model of transformers; leave it out"
                )
        return OneByOne(loaded, options.prefill_chunk_tokens)
    sizes = {each.name: getattr(options, each.name) for each in fields(EngineOptions)}
    if lengths is None:
        sizes["max_batch"] = 1
    else:
        sizes["max_batch"] = min(options.max_batch, len(lengths))
        if options.cache_tokens is None:
            on_gpu = loaded.model.device.type == "cuda"
            sizes["cache_tokens"] = _cache_tokens(options, lengths, on_gpu)
    return Engine(loaded, EngineOptions(**sizes))


def _cache_tokens(options: GenerateOptions, lengths: Sequence[int], on_gpu: bool) -> int | None:
    """Tokens for the prompts that may run at once; None for what a GPU has."""
    page = options.page_tokens
    # A request that is answered ends in a page of its own.
    needs = sorted((-(-length // page) * page for length in lengths), reverse=True)
    if len(needs) == 1:
        return needs[0]
    if on_gpu:
        return None
    return max(needs[0], min(sum(needs[: options.max_batch]), _MOST_CPU_TOKENS))


def answer(answers: Answers, request: Request, options: GenerateOptions) -> Iterator[str]:
    """The text of one answer, as it comes. Whoever stops in between cancels it. How much of a long
    prompt is read is shown on standard error.

    Raises:
        ValueError: as `Engine.add`.
        RunFailedError: the model failed.
    """
    answers.add(request)
    finish = None
    reading = Reading(len(request.prompt_ids), options.prefill_chunk_tokens)
    try:
        while finish is None:
            outputs = answers.step()
            if any(output.request_id == request.id for output in outputs):
                reading.close()
            else:
                reading.show(answers.tokens_read(request.id))
            for output in outputs:
                if output.request_id == request.id:
                    finish = output.finish
                    if finish == Finish.ERROR:
                        raise RunFailedError(output.error)
                    if output.text:
                        yield output.text
    finally:
        reading.close()
        if finish is None:
            answers.cancel(request.id)
            while answers.has_work:
                answers.step()
