"""An engine over a small model, and what its requests get."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ic.inference.engine.engine import Engine
from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Finish, Output, Request, Sampling, TokenLogprob
from ic.inference.engine.scheduler import Sequence
from ic.inference.loading import Loaded
from ic.model import MLAForCausalLM
from ic.model.byte_tokenizer import ByteTokenizer

Make = Callable[..., MLAForCausalLM]
SIZES: dict[str, Any] = {"vocab_size": 320, "num_hidden_layers": 2, "eos_token_id": 257}
SMALL_PAGES: dict[str, Any] = {"page_tokens": 16, "cache_tokens": 4096}


def load(model: MLAForCausalLM, name: str = "tiny") -> Loaded:
    return Loaded(model, ByteTokenizer(), name, None, Path(name))


def engine_of(model: MLAForCausalLM, cache_dtype: str = "auto", **options: Any) -> Engine:
    model.config.set_cache_dtype(cache_dtype)
    return Engine(load(model), EngineOptions(**SMALL_PAGES | options))


def draw_prompt(tokens: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1000 + tokens)
    return tuple(torch.randint(0, 256, (tokens,), generator=generator).tolist())


def ask(name: str, prompt: Iterable[int], answer: int, **sampling: Any) -> Request:
    options = {"max_tokens": answer, "ignore_end": True, **sampling}
    return Request(name, tuple(prompt), Sampling(**options))


@dataclass
class Answer:
    """All that a request got."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    cached_tokens: int = 0
    error: str | None = None


def collect(outputs: Iterable[Output], into: dict[str, Answer]) -> None:
    for output in outputs:
        answer = into.setdefault(output.request_id, Answer())
        assert answer.finish is None
        answer.token_ids += output.token_ids
        answer.text += output.text
        answer.logprobs += output.logprobs or ()
        answer.finish, answer.cached_tokens = output.finish, output.cached_tokens
        answer.error = output.error


def finish(engine: Engine) -> dict[str, Answer]:
    """Step until nothing is left to do; then no page may be held."""
    answers: dict[str, Answer] = {}
    steps = 0
    while engine.has_work:
        collect(engine.step(), answers)
        steps += 1
        assert steps < 3000
    assert engine.stats().pages_used == 0
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    return answers


def pages_of(engine: Engine, prompt: Iterable[int]) -> list[int]:
    """Pages in which a prompt's whole pages are found."""
    sequence = Sequence("", list(prompt), 0)
    return engine._pool.find(sequence.keys(sequence.num_prompt // 16, 16))


@torch.no_grad()
def generated(model: MLAForCausalLM, request: Request) -> list[int]:
    """What `generate` of transformers answers, one request at a time."""
    prompt_BT = torch.tensor([request.prompt_ids])
    out_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=request.sampling.max_tokens,
        min_new_tokens=request.sampling.max_tokens if request.sampling.ignore_end else None,
        do_sample=False,
        pad_token_id=258,
    )
    return list(out_BT[0, len(request.prompt_ids) :].tolist())


@torch.no_grad()
def logprobs_of(model: MLAForCausalLM, tokens: list[int], first: int) -> Tensor:
    """log p of each token from index `first` on, of one pass without a cache."""
    logits_TV = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    logprobs_TV = logits_TV.log_softmax(-1)[first - 1 : -1]
    return logprobs_TV.gather(1, torch.tensor(tokens[first:])[:, None])[:, 0]
