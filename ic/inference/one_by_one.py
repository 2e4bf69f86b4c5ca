"""Answers requests one after the other, for models that the engine does not run.

It takes the same requests and gives the same outputs as `ic.inference.engine.engine.Engine`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ic.inference.caches import TransformersCache, new_cache, piece_tokens
from ic.inference.engine.detokenize import Detokenizer, Detokenizers
from ic.inference.engine.request import Finish, Output, Request, TokenLogprob
from ic.inference.engine.sampler import Sampler
from ic.inference.loading import Loaded
from ic.inference.model_facts import end_tokens, positions_of


@dataclass
class _Answer:
    """The request that is being answered.

    Attributes:
        num_read: tokens of its prompt that the cache holds.
    """

    request: Request
    detokenizer: Detokenizer
    slot: int
    cached_tokens: int
    num_read: int
    drawn: list[int] = field(default_factory=list)


class OneByOne:
    """One request after the other, over one cache that goes over from prompt to prompt.

    Args:
        loaded: a causal language model of `transformers`.
        prefill_chunk_tokens: longest piece of a prompt that is processed at once.
    """

    def __init__(self, loaded: Loaded, prefill_chunk_tokens: int) -> None:
        self._model = loaded.model
        self._chunk_tokens = prefill_chunk_tokens
        vocabulary = loaded.model.config.get_text_config().vocab_size
        self._sampler = Sampler(vocabulary, 1, loaded.model.device)
        self._detokenizers = Detokenizers(
            loaded.tokenizer, end_tokens(loaded.model, loaded.tokenizer)
        )
        self._waiting: deque[Request] = deque()
        self._answer: _Answer | None = None
        self._cancelled: list[Output] = []
        self._cache: TransformersCache | None = None
        self._cached: list[int] = []  # tokens that the cache holds

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do or to say."""
        return bool(self._waiting or self._answer or self._cancelled)

    def check(self, request: Request) -> None:
        """Whether `add` would take the request.

        Raises:
            ValueError: longer than the model's positions, or a token out of the vocabulary.
        """
        positions = positions_of(self._model.config)
        prompt, answer = len(request.prompt_ids), request.sampling.max_tokens
        if prompt + answer > positions:
            raise ValueError(
                f"This model's maximum context length is {positions} tokens. However, you "
                f"requested {prompt + answer} tokens ({prompt} in the prompt, {answer} in the "
                "completion). Please reduce the length of the prompt or completion."
            )
        request.sampling.check_vocabulary(self._model.config.get_text_config().vocab_size)

    def add(self, request: Request) -> None:
        """Take a request in.

        Raises:
            ValueError: as `check`.
        """
        self.check(request)
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request; unknown ids are ignored. The next step says that it was cancelled."""
        answer = self._answer
        if answer is not None and answer.request.id == request_id:
            self._cancelled.append(self._output(answer, finish=Finish.CANCELLED))
            self._end(answer)
        for request in [each for each in self._waiting if each.id == request_id]:
            self._waiting.remove(request)
            prompt = len(request.prompt_ids)
            self._cancelled.append(
                Output(request_id, (), "", None, Finish.CANCELLED, prompt, cached_tokens=0)
            )

    @torch.no_grad()
    def step(self) -> list[Output]:
        """Read a piece of the next prompt, or continue the answer by one token."""
        outputs, self._cancelled = self._cancelled, []
        if self._answer is None and self._waiting:
            self._answer = self._begin(self._waiting.popleft())
        if (answer := self._answer) is not None:
            logits_1V = self._forward(self._next_tokens(answer))
            if answer.num_read == len(answer.request.prompt_ids):
                outputs.append(self._draw(answer, logits_1V))
        return outputs

    def tokens_read(self, request_id: str) -> int:
        """Tokens of a prompt that are read; 0 unless it is at hand."""
        answer = self._answer
        return answer.num_read if answer is not None and answer.request.id == request_id else 0

    def _begin(self, request: Request) -> _Answer:
        kept = self._keep_common(request.prompt_ids)
        return _Answer(
            request,
            self._detokenizers.begin(request.sampling),
            self._sampler.add(request.sampling, request.prompt_ids),
            cached_tokens=kept,
            num_read=kept,
        )

    def _next_tokens(self, answer: _Answer) -> list[int]:
        """The next piece of the prompt, which counts as read, or else the token drawn last."""
        if answer.drawn:
            return answer.drawn[-1:]
        prompt, start = answer.request.prompt_ids, answer.num_read
        piece = piece_tokens(self._model, self._chunk_tokens, len(prompt))
        answer.num_read = min(start + piece, len(prompt))
        return list(prompt[start : answer.num_read])

    def _forward(self, tokens: list[int]) -> Tensor:
        """Append tokens to the cache -> the logits (1, V) behind them."""
        ids_1T = torch.tensor([tokens], device=self._model.device)
        output = self._model(ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cached += tokens
        logits: Tensor = output.logits
        return logits[:, -1]

    def _draw(self, answer: _Answer, logits_1V: Tensor) -> Output:
        (draw,) = self._sampler.draw(logits_1V, [answer.slot]).fetch()
        if draw.token_id is None:
            self._end(answer)
            return self._output(
                answer,
                finish=Finish.ERROR,
                error="the model's logits are not numbers: its weights or its precision (dtype) "
                "do not suit this prompt",
            )
        answer.drawn.append(draw.token_id)
        text, finish = answer.detokenizer.push(draw.token_id), None
        if answer.detokenizer.stopped:
            finish = Finish.STOP
        elif len(answer.drawn) == answer.request.sampling.max_tokens:
            text += answer.detokenizer.finish()
            finish = Finish.STOP if answer.detokenizer.stopped else Finish.LENGTH
        if finish is not None:
            self._end(answer)
        return self._output(answer, (draw.token_id,), text, draw.logprob, finish)

    def _keep_common(self, prompt: tuple[int, ...]) -> int:
        """Crop the cache to what the prompt has in common with it -> tokens that it holds."""
        most = min(len(self._cached), len(prompt) - 1)
        common = next((i for i in range(most) if self._cached[i] != prompt[i]), most)
        kept = 0 if self._cache is None else self._cache.croppable_length(common)
        if kept and self._cache is not None:
            self._cache.keep(kept)
        else:
            cache = new_cache(self._model, 0)
            assert isinstance(cache, TransformersCache)
            self._cache = cache
        self._cached = self._cached[:kept]
        return kept

    def _end(self, answer: _Answer) -> None:
        self._sampler.remove(answer.slot)
        self._answer = None

    def _output(
        self,
        answer: _Answer,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprob: TokenLogprob | None = None,
        finish: Finish | None = None,
        error: str | None = None,
    ) -> Output:
        request = answer.request
        asked = request.sampling.logprobs is not None
        return Output(
            request.id,
            token_ids,
            text,
            ((logprob,) if logprob else ()) if asked else None,
            finish,
            len(request.prompt_ids),
            answer.cached_tokens,
            error,
        )
