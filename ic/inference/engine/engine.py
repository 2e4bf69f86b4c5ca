"""Answers many requests at once over one paged cache of latents.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ic.inference.engine.detokenize import Detokenizer, Detokenizers
from ic.inference.engine.memory import num_pages
from ic.inference.engine.options import EngineOptions
from ic.inference.engine.pages import PagePool
from ic.inference.engine.request import Finish, Output, Request, TokenLogprob
from ic.inference.engine.runner import Runner
from ic.inference.engine.sampler import Draw, Sampler, Sent
from ic.inference.engine.scheduler import Scheduler, Sequence
from ic.inference.engine.stats import EngineStats
from ic.inference.loading import Loaded
from ic.inference.model_facts import end_tokens
from ic.model import MLAForCausalLM
from ic.model.quantised_latents import code_dtype


@dataclass
class _Active:
    """A request in work.

    Attributes:
        slot: of the sampler, from when it is first let in. A request that is preempted keeps it: no
            other one is let in before it comes back.
    """

    request: Request
    sequence: Sequence
    detokenizer: Detokenizer
    slot: int | None = None


@dataclass(frozen=True)
class _InFlight:
    """Tokens that were drawn for these requests, and are on their way to the host."""

    active: tuple[_Active, ...]
    sent: Sent


class Engine:
    """Answers requests, all that run in each step. For one thread.

    A step is launched before the tokens of the one before are known on the host, so that the device
    does not wait for it. Its output is that of the step before.

    Args:
        loaded: a model of ours.
        options: sizes.

    Raises:
        ValueError: a model that is not ours, a backend that takes no rows of unequal length, or no
            memory left for the cache.
    """

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        model = loaded.model
        _check_model(loaded)
        self.options = options
        self._model: MLAForCausalLM = model
        on_gpu = model.device.type == "cuda"
        graphs = options.cuda_graphs
        if graphs and not on_gpu:
            raise ValueError(
                f"cuda_graphs=true: the model is on {model.device}; leave it out, or load the "
                "model on a GPU"
            )
        if graphs is None:
            graphs = on_gpu and model.model.operators.attention.capabilities.graph_capture
        codes = code_dtype(model.config.cache_dtype)
        pages = num_pages(model, options, codes)
        self._pool = PagePool(pages)
        self._scheduler = Scheduler(
            self._pool,
            page_tokens=options.page_tokens,
            max_batch=options.max_batch,
            chunk_tokens=options.prefill_chunk_tokens,
            prefix_cache=options.prefix_cache,
        )
        self._runner = Runner(
            model,
            num_pages=pages,
            page_tokens=options.page_tokens,
            max_batch=options.max_batch,
            codes=codes,
            graphs=graphs,
        )
        self._sampler = Sampler(model.config.vocab_size, options.max_batch, model.device)
        self._detokenizers = Detokenizers(loaded.tokenizer, end_tokens(model, loaded.tokenizer))
        self._active: dict[str, _Active] = {}
        self._in_flight: list[_InFlight] = []
        self._cancelled: list[Output] = []
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do or to say."""
        return bool(self._active or self._cancelled)

    def check(self, request: Request) -> None:
        """Whether `add` would take the request, but for its id; from any thread.

        Raises:
            ValueError: longer than the model's positions or the cache, or a token out of the
                vocabulary.
        """
        prompt, answer = len(request.prompt_ids), request.sampling.max_tokens
        asked = (
            f"However, you requested {prompt + answer} tokens ({prompt} in the prompt, {answer} in "
            "the completion). Please reduce the length of the prompt or completion."
        )
        positions = self._model.config.max_position_embeddings
        if prompt + answer > positions:
            raise ValueError(f"This model's maximum context length is {positions} tokens. {asked}")
        capacity = self._scheduler.capacity_tokens
        if prompt + answer > capacity:
            raise ValueError(
                f"The cache of this engine holds {capacity} tokens (cache_tokens). {asked}"
            )
        vocabulary = self._model.config.vocab_size
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"Invalid 'prompt': token {low if low < 0 else high} is not in the vocabulary of "
                f"{vocabulary} tokens."
            )
        request.sampling.check_vocabulary(vocabulary)

    def add(self, request: Request) -> None:
        """Take a request in; the next steps answer it.

        Raises:
            ValueError: as `check`, or an id that a request in work has.
        """
        if request.id in self._active or any(x.request_id == request.id for x in self._cancelled):
            raise ValueError(f"Invalid 'id': {request.id!r} is the id of a request in work.")
        self.check(request)
        most_tokens = len(request.prompt_ids) + request.sampling.max_tokens
        sequence = Sequence(request.id, list(request.prompt_ids), most_tokens)
        self._scheduler.add(sequence)
        detokenizer = self._detokenizers.begin(request.sampling)
        self._active[request.id] = _Active(request, sequence, detokenizer)

    def cancel(self, request_id: str) -> None:
        """End a request, and free its pages at once; unknown ids are ignored. The next step says
        that it was cancelled.
        """
        active = self._active.get(request_id)
        if active is not None:
            self._cancelled.append(_output(active, finish=Finish.CANCELLED))
            self._end(active)

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Answer these requests, and drop those that are not answered when the caller stops. What
        steps say of other requests is lost.

        Raises:
            ValueError: as `add`; none of them is taken in then.
        """
        added: set[str] = set()
        try:
            for request in requests:
                self.add(request)
                added.add(request.id)
            while not added.isdisjoint(self._active):
                yield from (output for output in self.step() if output.request_id in added)
        finally:
            for request_id in added & self._active.keys():
                self._end(self._active[request_id])

    @torch.no_grad()
    def step(self) -> list[Output]:
        """Launch a pass for all rows that decode, and a piece of one prompt; return what the step
        before gave. If it fails, all requests are given up, and others can be added.
        """
        try:
            return self._step()
        except BaseException:
            self._give_up()
            raise

    def tokens_read(self, request_id: str) -> int:
        """Tokens of a request's prompt whose passes are launched; 0 of an unknown one."""
        active = self._active.get(request_id)
        return (
            0 if active is None else min(active.sequence.num_computed, active.sequence.num_prompt)
        )

    def stats(self) -> EngineStats:
        """Counts, now and so far."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total=self._pool.num_pages,
            pages_used=self._pool.num_used,
            pages_cached=self._pool.num_kept,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._scheduler.num_preemptions,
        )

    def _step(self) -> list[Output]:
        outputs, self._cancelled = self._cancelled, []
        arrived, self._in_flight = self._in_flight, []
        plan = self._scheduler.plan()
        if plan.decode:
            sequences, logits_BV = self._runner.decode(plan.decode)
            self._runner.decode_next(self._draw(logits_BV, sequences))
        else:
            self._runner.forget()
        if (chunk := plan.chunk) is not None:
            self._let_in(self._active[chunk.sequence.id])
            logits_1V = self._runner.read(chunk)
            if logits_1V is not None:
                drawn = self._draw(logits_1V, [chunk.sequence])
                self._runner.begin_decoding(chunk.sequence, drawn)
        # Only now wait for the step before: else the device would have nothing to do while the host
        # launches the piece, which takes longer than computing a short one.
        for in_flight in arrived:
            for active, draw in zip(in_flight.active, in_flight.sent.wait(), strict=True):
                if self._active.get(active.request.id) is active:
                    outputs.append(self._take_in(active, draw))
        return outputs

    def _draw(self, logits_BV: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        """Draw the next tokens (B,) on the device, and send them to the host."""
        active = tuple(self._active[sequence.id] for sequence in sequences)
        drawn = self._sampler.draw(logits_BV, [x.slot for x in active if x.slot is not None])
        self._in_flight.append(_InFlight(active, drawn.send()))
        return drawn.tokens_B

    def _let_in(self, active: _Active) -> None:
        """Note that a request runs."""
        if active.slot is not None:
            return
        request = active.request
        active.slot = self._sampler.add(request.sampling, request.prompt_ids)
        self._prompt_tokens += active.sequence.num_prompt
        self._cached_tokens += active.sequence.num_cached or 0

    def _take_in(self, active: _Active, draw: Draw) -> Output:
        """A drawn token -> what the caller learns of it."""
        if draw.token_id is None:
            self._end(active)
            return _output(
                active,
                finish=Finish.ERROR,
                error="the model's logits are not numbers: its weights or its precision (dtype) do "
                "not suit this prompt",
            )
        self._scheduler.drawn(active.sequence, draw.token_id)
        self._generated_tokens += 1
        text, finish = active.detokenizer.push(draw.token_id), None
        if active.detokenizer.stopped:
            finish = Finish.STOP
        elif len(active.sequence.tokens) == active.sequence.most_tokens:
            text += active.detokenizer.finish()
            finish = Finish.STOP if active.detokenizer.stopped else Finish.LENGTH
        if finish is not None:
            self._end(active)
        return _output(active, (draw.token_id,), text, draw.logprob, finish)

    def _end(self, active: _Active) -> None:
        self._scheduler.remove(active.sequence)
        if active.slot is not None:
            self._sampler.remove(active.slot)
        del self._active[active.request.id]

    def _give_up(self) -> None:
        """Forget all requests, and what the cache may hold: a pass may not have been run."""
        for active in list(self._active.values()):
            self._end(active)
        self._in_flight, self._cancelled = [], []
        self._runner.forget()
        self._pool.forget()


def _output(
    active: _Active,
    token_ids: tuple[int, ...] = (),
    text: str = "",
    logprob: TokenLogprob | None = None,
    finish: Finish | None = None,
    error: str | None = None,
) -> Output:
    asked = active.request.sampling.logprobs is not None
    return Output(
        request_id=active.request.id,
        token_ids=token_ids,
        text=text,
        logprobs=((logprob,) if logprob else ()) if asked else None,
        finish=finish,
        prompt_tokens=active.sequence.num_prompt,
        cached_tokens=active.sequence.num_cached or 0,
        error=error,
    )


def _check_model(loaded: Loaded) -> None:
    model = loaded.model
    if not isinstance(model, MLAForCausalLM):
        raise ValueError(
            f"{loaded.name} is a {type(model).__name__} of transformers, and the engine serves our "
            "MLA models: convert it to one (python -m ic convert), or serve it with vLLM (vllm "
            f"serve {loaded.folder})"
        )
    if model.model.context_parallel is not None:
        raise ValueError(
            "the engine serves models on one device: load it without strategy.context_parallel_size"
        )
    can = model.model.operators.attention.capabilities
    if not can.row_lengths and not can.mask:
        raise ValueError(
            f"attention={model.config.attention_backend} takes no rows of unequal length, which "
            "the engine decodes together; use attention=torch"
        )
