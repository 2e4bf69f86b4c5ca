"""Who answers in this process: our engine, or the loop of transformers over the same model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ic.inference.engine.engine import Engine
from ic.inference.engine.options import EngineOptions
from ic.inference.engine.request import Request, Sampling
from ic.inference.loading import Loaded
from ic.studies.serving.timing import RequestTimes


class Side(Protocol):
    """Answers prompts that arrive at once."""

    def answer(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTimes]:
        """When the tokens of each came.

        Raises:
            ValueError: what cannot be answered at this size; other cells can.
            RunFailedError: who answers failed.
        """

    def close(self) -> None:
        """Give back what it holds."""


class EngineSide:
    """Our engine, with all options."""

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        self._engine = Engine(loaded, options)

    def answer(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTimes]:
        sampling = Sampling(max_tokens=output_tokens, ignore_end=True)
        requests = [
            Request(str(number), tuple(prompt), sampling) for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            self._engine.check(request)
        began = time.perf_counter()
        found = {x.id: RequestTimes(len(x.prompt_ids), began) for x in requests}
        for output in self._engine.generate(requests):
            if output.error is not None:
                raise ValueError(output.error)
            times = found[output.request_id]
            times.cached_tokens = output.cached_tokens
            if output.token_ids:
                times.arrivals.append((time.perf_counter(), len(output.token_ids)))
        return list(found.values())

    def close(self) -> None:
        del self._engine


class GenerateSide:
    """`model.generate`, which begins and ends with all rows together."""

    def __init__(self, loaded: Loaded) -> None:
        self._model = loaded.model

    def answer(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTimes]:
        positions = self._model.config.get_text_config().max_position_embeddings
        if len(prompts[0]) + output_tokens > positions:
            raise ValueError(f"longer than the model's {positions} positions")
        ids_BT = torch.tensor(prompts, device=self._model.device)
        clock = _Clock()
        began = time.perf_counter()
        self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=GenerationConfig(
                max_new_tokens=output_tokens, do_sample=False, pad_token_id=0
            ),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        arrivals = [(when, 1.0) for when in clock.times_s]
        return [RequestTimes(len(prompt), began, 0, list(arrivals)) for prompt in prompts]

    def close(self) -> None:
        del self._model


class _Clock(StoppingCriteria):
    """Never stops; notes when each token is known, as a reader of the answer would learn it."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        input_ids[:, -1].tolist()
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
