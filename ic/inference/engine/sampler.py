"""Draws the next token of each row of a batch, on the device.

A row is processed as `transformers` does it: repetition penalty, then OpenAI's penalties, then the
temperature, top-k, top-p, min-p. What is left is drawn by inverting the cumulated weights at one
uniform number per row. That number is a hash of the row's seed and of how many tokens the row has
drawn, so a request draws the same tokens in any batch and after a preemption.

Nothing here waits for the device but `Sent.wait`, so a draw can be recorded in a CUDA graph once
its batch is known. Sorting is only done for the rows that ask for top-k or top-p.

Legend: S slots, B rows of a batch, V vocabulary, R random rows, G rows to be sorted, W width of the
sorting, L rows with log-probabilities.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ic.inference.engine.request import Sampling, TokenLogprob

# Columns of the parameters of a slot.
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _PRESENCE, _FREQUENCY, _REPETITION = range(7)
_MASK_64 = 2**64 - 1
# Constants of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Draw:
    """What was drawn for one row.

    Attributes:
        token_id: None if the row's logits hold a NaN, or nothing but infinities.
        logprob: of the model's own distribution, before penalties and temperature; None if it was
            not asked for.
    """

    token_id: int | None
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class Drawn:
    """Drawn tokens, still on the device.

    Attributes:
        tokens_B: (B,) int64, each in the vocabulary, so that they can be fed back unseen.
        failed_B: (B,) bool, rows whose logits are no numbers; their token means nothing.
    """

    tokens_B: Tensor
    failed_B: Tensor
    _likeliest: tuple[Tensor, Tensor, Tensor] | None
    _num_logprobs: tuple[int | None, ...]

    def send(self) -> Sent:
        """Begin the transfer to the host, which `Sent.wait` waits for: not for what is launched
        after it.
        """
        parts = [torch.where(self.failed_B, -1, self.tokens_B), *(self._likeliest or ())]
        if not self.tokens_B.is_cuda:
            return Sent(parts, self._num_logprobs, None)
        hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in parts]
        for host, part in zip(hosts, parts, strict=True):
            host.copy_(part, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Sent(hosts, self._num_logprobs, done)

    def fetch(self) -> list[Draw]:
        """The draws of all rows, on the host."""
        return self.send().wait()


@dataclass(frozen=True)
class Sent:
    """Drawn tokens on their way to the host."""

    _parts: list[Tensor]
    _num_logprobs: tuple[int | None, ...]
    _done: torch.cuda.Event | None

    def wait(self) -> list[Draw]:
        """The draws of all rows, on the host: the one place that waits for the device."""
        if self._done is not None:
            self._done.synchronize()
        tokens, *likeliest = (part.tolist() for part in self._parts)
        if not likeliest:
            return [Draw(None if token < 0 else token, None) for token in tokens]
        rows = iter(zip(*likeliest, strict=True))
        found = []
        for token, wanted in zip(tokens, self._num_logprobs, strict=True):
            logprob = None
            if wanted is not None:
                own, values, places = next(rows)
                top = tuple(zip(places[:wanted], values[:wanted], strict=True))
                logprob = TokenLogprob(token, own, top)
            found.append(Draw(None, None) if token < 0 else Draw(token, logprob))
        return found


@dataclass(frozen=True)
class _Plan:
    """Which rows of a batch need what; indices are on the device.

    Attributes:
        slots_B: slot of each row.
        penalised, random, logprobs: places of these rows in the batch; None for no row.
        sorted: places among the random rows, and how many of their likeliest tokens are sorted.
    """

    slots_B: Tensor
    penalised: Tensor | None
    random: Tensor | None
    sorted: tuple[tuple[Tensor, int], ...]
    masks: bool
    logprobs: Tensor | None
    most_logprobs: int
    num_logprobs: tuple[int | None, ...]


class Sampler:
    """Parameters and state of the requests that run, each in a slot, on the device.

    Args:
        vocab_size: width of the logits.
        max_rows: most requests at once.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._free = list(range(max_rows - 1, -1, -1))
        self._sampling: dict[int, Sampling] = {}
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._parameters_S7 = torch.zeros(max_rows, 7, dtype=torch.float64, device=device)
        self._keys_S = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._steps_S = torch.zeros_like(self._keys_S)
        # Made for the first request with a penalty: they are as wide as the vocabulary.
        self._counts_SV: Tensor | None = None
        self._prompt_SV: Tensor | None = None

    @torch.no_grad()
    def add(
        self, sampling: Sampling, prompt_ids: Sequence[int], generated: Sequence[int] = ()
    ) -> int:
        """Take a request in -> its slot, which `draw` is asked for.

        Args:
            prompt_ids: its prompt, for the repetition penalty.
            generated: tokens that it has drawn already, if it comes back after a preemption.

        Raises:
            RuntimeError: all slots are taken.
        """
        if not self._free:
            raise RuntimeError(f"all {len(self._sampling)} slots of the sampler are taken")
        slot = self._free.pop()
        self._sampling[slot] = sampling
        self._plans.clear()
        if sampling.temperature:
            self._keys_S[slot] = self._upload([_key(sampling.seed)], torch.int64)[0]
            self._steps_S[slot] = self._upload([len(generated)], torch.int64)[0]
        self._parameters_S7[slot] = self._upload(
            [
                sampling.temperature or 1.0,
                sampling.top_k or self.vocab_size,
                sampling.top_p,
                sampling.min_p,
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.repetition_penalty,
            ],
            torch.float64,
        )
        if _is_penalised(sampling):
            self._count(slot, prompt_ids, generated)
        return slot

    def remove(self, slot: int) -> None:
        """Give a slot back."""
        del self._sampling[slot]
        self._free.append(slot)
        self._plans.clear()

    @torch.no_grad()
    def draw(self, logits_BV: Tensor, slots: Sequence[int]) -> Drawn:
        """Draw one token for each row.

        Args:
            logits_BV: (B, V) of any floating type; not changed.
            slots: of the rows, each at most once.
        """
        plan = self._plan(tuple(slots))
        given_BV = logits_BV
        if plan.penalised is not None:
            logits_BV = self._penalise(logits_BV, plan)
        best_B, tokens_B = logits_BV.max(dim=-1)
        failed_B = ~best_B.isfinite()
        if plan.random is not None:
            best_R1 = best_B[plan.random, None].float()
            drawn_R = self._draw_random(logits_BV[plan.random].float() - best_R1, plan)
            tokens_B = tokens_B.index_copy(0, plan.random, drawn_R)
        if plan.penalised is not None:
            assert self._counts_SV is not None
            place = (plan.slots_B[plan.penalised], tokens_B[plan.penalised])
            self._counts_SV[place] += 1
        likeliest = None
        if plan.logprobs is not None:
            logprobs_LV = given_BV[plan.logprobs].float().log_softmax(dim=-1)
            own_L = logprobs_LV.gather(1, tokens_B[plan.logprobs, None])[:, 0]
            top = logprobs_LV.topk(min(plan.most_logprobs, self.vocab_size), dim=-1)
            likeliest = (own_L, top.values, top.indices)
        return Drawn(tokens_B, failed_B, likeliest, plan.num_logprobs)

    def _draw_random(self, logits_RV: Tensor, plan: _Plan) -> Tensor:
        """Tokens (R,) from logits whose largest is 0."""
        assert plan.random is not None
        slots_R = plan.slots_B[plan.random]
        parameters_R7 = self._parameters_S7[slots_R]
        logits_RV = logits_RV / parameters_R7[:, _TEMPERATURE, None].float()
        weights_RV = logits_RV.exp()
        if plan.masks:
            least_R1 = parameters_R7[:, _MIN_P, None].log().float()
            for rows_G, width in plan.sorted:
                least_G = _least_kept(logits_RV[rows_G], parameters_R7[rows_G], width)
                least_R1[rows_G, 0] = torch.maximum(least_R1[rows_G, 0], least_G)
            weights_RV = torch.where(logits_RV >= least_R1, weights_RV, 0)
        uniform_R = _uniform(self._keys_S[slots_R], self._steps_S[slots_R])
        self._steps_S[slots_R] += 1
        # In double precision, so that the order in which the device adds up does not show.
        summed_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
        wanted_R1 = (uniform_R * summed_RV[:, -1])[:, None]
        drawn_R1 = torch.searchsorted(summed_RV, wanted_R1, right=True)
        return drawn_R1[:, 0].clamp(max=self.vocab_size - 1)  # beyond it if they are no numbers

    def _penalise(self, logits_BV: Tensor, plan: _Plan) -> Tensor:
        """The logits (B, V) fp32, after the penalties of the rows that have some."""
        assert plan.penalised is not None
        assert self._counts_SV is not None
        assert self._prompt_SV is not None
        slots = plan.slots_B[plan.penalised]
        counts, parameters = self._counts_SV[slots], self._parameters_S7[slots].float()
        logits_BV = logits_BV.float()
        rows = logits_BV[plan.penalised]
        repetition = parameters[:, _REPETITION, None]
        repeated = torch.where(rows < 0, rows * repetition, rows / repetition)
        rows = torch.where((counts > 0) | self._prompt_SV[slots], repeated, rows)
        rows = rows - parameters[:, _FREQUENCY, None] * counts
        rows = rows - parameters[:, _PRESENCE, None] * (counts > 0)
        return logits_BV.index_copy(0, plan.penalised, rows)

    def _count(self, slot: int, prompt_ids: Sequence[int], generated: Sequence[int]) -> None:
        """Remember which tokens a request begins with."""
        if self._counts_SV is None or self._prompt_SV is None:
            shape = (len(self._keys_S), self.vocab_size)
            self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._prompt_SV = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._counts_SV[slot].zero_()
        self._prompt_SV[slot].zero_()
        prompt = self._upload(list(dict.fromkeys(prompt_ids)), torch.int64)
        self._prompt_SV[slot].index_fill_(0, prompt, True)
        drawn = self._upload(list(generated), torch.int64)
        self._counts_SV[slot].index_add_(0, drawn, torch.ones_like(drawn, dtype=torch.int32))

    def _plan(self, slots: tuple[int, ...]) -> _Plan:
        if (known := self._plans.get(slots)) is not None:
            return known
        asked = [self._sampling[slot] for slot in slots]
        random = [row for row, sampling in enumerate(asked) if sampling.temperature]
        # Among the random rows: those that need a few likeliest tokens, and those that need all.
        few = [place for place, row in enumerate(random) if asked[row].top_k]
        whole = [
            place
            for place, row in enumerate(random)
            if asked[row].top_p < 1 and not asked[row].top_k
        ]
        most = max((asked[random[place]].top_k for place in few), default=0)
        groups = [(few, min(most, self.vocab_size)), (whole, self.vocab_size)]
        sort = tuple((self._upload(rows, torch.int64), width) for rows, width in groups if rows)
        logprobs = [row for row, sampling in enumerate(asked) if sampling.logprobs is not None]
        plan = _Plan(
            slots_B=self._upload(slots, torch.int64),
            penalised=self._places([row for row, x in enumerate(asked) if _is_penalised(x)]),
            random=self._places(random),
            sorted=sort,
            masks=bool(sort) or any(asked[row].min_p for row in random),
            logprobs=self._places(logprobs),
            most_logprobs=max((asked[row].logprobs or 0 for row in logprobs), default=0),
            num_logprobs=tuple(sampling.logprobs for sampling in asked),
        )
        self._plans[slots] = plan
        return plan

    def _places(self, rows: list[int]) -> Tensor | None:
        return self._upload(rows, torch.int64) if rows else None

    def _upload(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers to the device. From pinned memory the host does not wait for the transfer."""
        pinned = self.device.type == "cuda"
        host = torch.tensor(values, dtype=dtype, pin_memory=pinned)
        return host.to(self.device, non_blocking=True)


def _is_penalised(sampling: Sampling) -> bool:
    return bool(
        sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    )


def _least_kept(logits_GV: Tensor, parameters_G7: Tensor, width: int) -> Tensor:
    """The smallest logit (G,) that top-k and top-p keep; equal ones are kept together.

    Top-p counts the share among the top-k, and keeps a token if those before it do not hold the
    share already.
    """
    if width == logits_GV.shape[1]:
        values_GW = logits_GV.sort(dim=-1, descending=True).values
    else:
        values_GW = logits_GV.topk(width, dim=-1).values
    rank_W = torch.arange(width, device=values_GW.device)
    among_GW = rank_W < parameters_G7[:, _TOP_K, None]
    summed_GW = (values_GW.exp() * among_GW).cumsum(dim=-1, dtype=torch.float64)
    before_GW = summed_GW.roll(1, dims=-1).index_fill(1, rank_W[:1], 0)
    share_G1 = parameters_G7[:, _TOP_P, None]
    kept_GW = among_GW & ((before_GW < share_G1 * summed_GW[:, -1:]) | (share_G1 >= 1))
    last_G1 = (kept_GW.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # below if they are no numbers
    return values_GW.gather(1, last_G1)[:, 0]


def _key(seed: int | None) -> int:
    """Where the numbers of a seed begin: 64 bits, far from those of the next seed."""
    if seed is None:
        return secrets.randbits(64) - 2**63
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _uniform(keys_R: Tensor, steps_R: Tensor) -> Tensor:
    """Numbers (R,) fp64 in [0, 1), multiples of 2^-32: the output of SplitMix64 after each step."""
    mixed_R = keys_R + (steps_R + 1) * _signed(_GAMMA)
    mixed_R = (mixed_R ^ _shifted(mixed_R, 30)) * _signed(_MIX_1)
    mixed_R = (mixed_R ^ _shifted(mixed_R, 27)) * _signed(_MIX_2)
    mixed_R = mixed_R ^ _shifted(mixed_R, 31)
    # With 32 bits no product with the sum of the weights is rounded up to that sum.
    return _shifted(mixed_R, 32).double() * 2.0**-32


def _shifted(bits_R: Tensor, by: int) -> Tensor:
    """A shift to the right that brings zeros in; that of a signed number brings its sign."""
    return (bits_R >> by) & (_MASK_64 >> by)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
