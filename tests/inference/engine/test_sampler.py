"""Draws against the processors of transformers, and against probabilities that are known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ic.inference.engine import sampler as sampler_module
from ic.inference.engine.request import Sampling
from ic.inference.engine.sampler import Sampler

CPU = torch.device("cpu")
VOCABULARY = 24
GRID = 20_000


def logits_of(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.2 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)


def shares(logits_V: Tensor, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The probability of each token: draws at evenly spaced numbers, so that none is left to luck."""
    sampler = Sampler(len(logits_V), 1, CPU)
    slots = [sampler.add(sampling, [3, 5, 5])] * GRID  # one request, as often as there are numbers
    with monkeypatch.context() as patch:
        grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
        patch.setattr(sampler_module, "_uniform", lambda keys_R, steps_R: grid)
        drawn = sampler.draw(logits_V.expand(GRID, -1), slots)
    return drawn.tokens_B.bincount(minlength=len(logits_V)) / GRID


def theirs(logits_V: Tensor, sampling: Sampling, context: list[int]) -> Tensor:
    """The probabilities that `transformers` draws from."""
    processors: list[Any] = []
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    ids = torch.tensor([context])
    scores: Tensor = LogitsProcessorList(processors)(ids, logits_V.float()[None].clone())
    return scores.softmax(-1)[0]


CASES = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 12, "top_p": 0.95, "min_p": 0.08, "temperature": 0.8},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.5, "temperature": 1.3, "top_p": 0.8},
]


@pytest.mark.parametrize("asked", CASES, ids=str)
def test_draws_from_the_distribution_of_transformers(
    asked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(**{"temperature": 1.0, **asked})  # type: ignore[arg-type]
    for seed, dtype in itertools.product((0, 1), (torch.float32, torch.bfloat16)):
        logits_V = logits_of(1, seed, dtype)[0]
        expected = theirs(logits_V, sampling, [3, 5, 5])
        found = shares(logits_V, sampling, monkeypatch)
        # Evenly spaced numbers fall into an interval as often as it is long, up to one of them.
        torch.testing.assert_close(found, expected, atol=1.01 / GRID, rtol=0)
        assert torch.equal(found > 0, expected > 0), "not the same tokens are left out"


def test_equal_logits_are_kept_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them a sort puts first is no reason to prefer it."""
    logits_V = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    expected = torch.tensor([2.0, 1.0, 1.0, 1.0]).softmax(0)
    for sampling in (Sampling(temperature=1, top_k=2), Sampling(temperature=1, top_p=0.5)):
        found = shares(logits_V, sampling, monkeypatch)
        torch.testing.assert_close(found[:4], expected, atol=1.01 / GRID, rtol=0)
        assert found[4] == 0


def test_a_share_that_is_reached_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token holds it, and no other is kept; transformers has it so."""
    logits_V, sampling = torch.tensor([4.0, 2, 2]).log(), Sampling(temperature=1, top_p=0.5)
    assert theirs(logits_V, sampling, [0]).tolist() == [1, 0, 0]
    assert shares(logits_V, sampling, monkeypatch).tolist() == [1, 0, 0]


def test_penalties_of_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count what was drawn, once or each time, and leave the prompt alone."""
    sampling = Sampling(temperature=1, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(VOCABULARY, 1, CPU)
    slot = sampler.add(sampling, [3, 5, 5], generated=[7, 7])
    logits_V, counts_V = logits_of(1)[0], torch.zeros(VOCABULARY)
    counts_V[7] = 2
    for step in range(20):
        adjusted_V = logits_V - 0.25 * counts_V - 0.5 * (counts_V > 0)
        # The middle of the interval of one token after the other.
        shares_V = adjusted_V.double().softmax(0)
        target = step % VOCABULARY
        middle = shares_V[:target].sum() + shares_V[target] / 2
        with monkeypatch.context() as patch:
            patch.setattr(sampler_module, "_uniform", lambda *_, at=middle: at[None])
            (draw,) = sampler.draw(logits_V[None], [slot]).fetch()
        assert draw.token_id == target
        counts_V[target] += 1


def test_greedy_rows_are_penalised_too() -> None:
    sampler = Sampler(4, 2, CPU)
    logits_BV = torch.tensor([[1.0, 0.9, 0.0, -1.0]]).expand(2, -1)
    slots = [
        sampler.add(Sampling(repetition_penalty=1.2), [0]),
        sampler.add(Sampling(presence_penalty=0.2), [0]),
    ]
    drawn = [[x.token_id for x in sampler.draw(logits_BV, slots).fetch()] for _ in range(3)]
    # 1 / 1.2 < 0.9, then both are divided; 1 - 0.2 < 0.9, then both have been drawn.
    assert drawn == [[1, 0], [0, 1], [0, 0]]


def splitmix64(state: int) -> Any:
    """In Python's integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        yield mixed ^ mixed >> 31


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    # The first three that its authors' program prints for the seed 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert list(itertools.islice(splitmix64(0), 3)) == published
    for key in (0, 1, -1, 2**63 - 1, -(2**63)):
        expected = [number >> 32 for number in itertools.islice(splitmix64(key), 100)]
        found = sampler_module._uniform(torch.full((100,), key), torch.arange(100))
        assert (found * 2**32).long().tolist() == expected


def test_the_largest_number_draws_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that has a probability, as the smallest does: the first and last tokens have none."""
    sampler = Sampler(VOCABULARY, 1, CPU)
    slot = sampler.add(Sampling(temperature=1), [0])
    logits_V = logits_of(1)[0]
    logits_V[:2] = logits_V[-3:] = -torch.inf
    largest = torch.tensor([1 - 2.0**-32], dtype=torch.float64)
    for number, token in ((largest, VOCABULARY - 4), (torch.zeros_like(largest), 2)):
        monkeypatch.setattr(sampler_module, "_uniform", lambda *_, at=number: at)
        assert sampler.draw(logits_V[None], [slot]).fetch()[0].token_id == token


def test_draws_of_real_seeds_have_the_right_frequencies() -> None:
    """Chi-squared over the steps of one seed, and over the first step of many: seeds are fixed."""
    logits_V = logits_of(1)[0]
    expected = logits_V.double().softmax(0).numpy()
    one = Sampler(VOCABULARY, 1, CPU)
    slot = one.add(Sampling(temperature=1, seed=11), [0])
    steps = [int(one.draw(logits_V[None], [slot]).tokens_B) for _ in range(4000)]
    many = Sampler(VOCABULARY, 4000, CPU)
    slots = [many.add(Sampling(temperature=1, seed=seed), [0]) for seed in range(4000)]
    seeds = many.draw(logits_V.expand(4000, -1), slots).tokens_B.tolist()
    for drawn in (steps, seeds):
        counts = torch.tensor(drawn).bincount(minlength=VOCABULARY).numpy()
        assert chisquare(counts, expected * len(drawn)).pvalue > 0.01


MIXED = [
    Sampling(temperature=1.0, seed=5),
    Sampling(),
    Sampling(temperature=0.7, seed=6, top_k=6, top_p=0.8),
    Sampling(temperature=1.2, seed=7, frequency_penalty=0.5, logprobs=2),
    Sampling(temperature=0.9, seed=8, min_p=0.05, top_p=0.9),
    Sampling(temperature=1.0, seed=5, repetition_penalty=1.3),
    Sampling(temperature=1.5, seed=9, top_k=2),
    Sampling(temperature=1.5, seed=9, top_k=12),
]


def alone(sampling: Sampling, logits_TV: Tensor) -> list[int | None]:
    sampler = Sampler(VOCABULARY, 1, CPU)
    slot = sampler.add(sampling, [1, 2])
    return [sampler.draw(logits_V[None], [slot]).fetch()[0].token_id for logits_V in logits_TV]


def test_a_row_draws_the_same_in_any_batch() -> None:
    """Rows come and go, in other slots and another order; one is preempted and comes back."""
    steps = 30
    logits_BTV = torch.stack([logits_of(steps, seed) for seed in range(len(MIXED))])
    expected = [alone(s, logits_TV) for s, logits_TV in zip(MIXED, logits_BTV, strict=True)]
    assert len({tuple(row) for row in expected}) == len(MIXED)
    sampler = Sampler(VOCABULARY, len(MIXED), CPU)
    generator = torch.Generator().manual_seed(0)
    slots: dict[int, int] = {}
    drawn: list[list[int]] = [[] for _ in MIXED]
    while min(map(len, drawn)) < steps:
        wanted = [row for row in range(len(MIXED)) if len(drawn[row]) < steps]
        for row in wanted:
            if torch.rand((), generator=generator) < 0.5:
                if row in slots:
                    sampler.remove(slots.pop(row))
                else:
                    slots[row] = sampler.add(MIXED[row], [1, 2], drawn[row])
        order = torch.randperm(len(MIXED), generator=generator).tolist()
        rows = [row for row in order if row in slots and row in wanted]
        if rows:
            logits_BV = torch.stack([logits_BTV[row, len(drawn[row])] for row in rows])
            found = sampler.draw(logits_BV, [slots[row] for row in rows]).fetch()
            for row, draw in zip(rows, found, strict=True):
                assert draw.token_id is not None
                drawn[row].append(draw.token_id)
    assert drawn == expected


def test_without_a_seed_draws_differ() -> None:
    logits_TV = logits_of(40)
    assert alone(Sampling(temperature=1), logits_TV) != alone(Sampling(temperature=1), logits_TV)
    assert alone(Sampling(temperature=1, seed=-1), logits_TV) == alone(
        Sampling(temperature=1, seed=-1), logits_TV
    )


def test_log_probabilities_are_the_model_s_own() -> None:
    """Before temperature and penalties; each row has as many as it asked for."""
    sampler = Sampler(VOCABULARY, 3, CPU)
    asked = [
        Sampling(temperature=0.5, seed=1, logprobs=3, presence_penalty=2.0),
        Sampling(),
        Sampling(logprobs=0),
    ]
    slots = [sampler.add(sampling, [1]) for sampling in asked]
    logits_BV = logits_of(3)
    first, none, last = sampler.draw(logits_BV, slots).fetch()
    logprobs_BV = logits_BV.log_softmax(-1)
    assert none.logprob is None
    assert first.logprob is not None
    assert last.logprob is not None
    assert last.logprob.top == ()
    assert last.logprob.logprob == logprobs_BV[2].max()
    assert first.logprob.token_id == first.token_id
    assert first.logprob.logprob == logprobs_BV[0, first.token_id]
    order = logprobs_BV[0].argsort(descending=True)[:3].tolist()
    assert first.logprob.top == tuple((token, float(logprobs_BV[0, token])) for token in order)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_numbers_fails_alone(bad: float) -> None:
    logits_BV = logits_of(len(MIXED))
    found = {}
    for broken in (False, True):
        sampler = Sampler(VOCABULARY, 2 * len(MIXED), CPU)
        slots = [sampler.add(sampling, [1, 2]) for sampling in MIXED + MIXED]
        rows = torch.cat([logits_BV, logits_BV])
        if broken:
            rows[len(MIXED) :, 3] = bad
        drawn = sampler.draw(rows, slots)
        assert bool((drawn.tokens_B < VOCABULARY).all()), "cannot be fed back"
        found[broken] = drawn.fetch()
    assert found[True][: len(MIXED)] == found[False][: len(MIXED)]
    assert all(draw.token_id is not None for draw in found[False])
    assert all(draw.token_id is draw.logprob is None for draw in found[True][len(MIXED) :])
    nothing = Sampler(3, 1, CPU)
    slot = nothing.add(Sampling(temperature=1), [0])
    assert nothing.draw(torch.full((1, 3), -torch.inf), [slot]).fetch()[0].token_id is None


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whatever asked for one would raise."""
    with FakeTensorMode():
        sampler = Sampler(VOCABULARY, len(MIXED), CPU)
        slots = [sampler.add(sampling, [1, 2], [3]) for sampling in MIXED]
        drawn = sampler.draw(torch.empty(len(MIXED), VOCABULARY), slots)
        assert drawn.tokens_B.shape == drawn.failed_B.shape == (len(MIXED),)
        with pytest.raises(Exception, match=r"aten._local_scalar_dense|DataDependent"):
            drawn.fetch()


def test_slots_are_given_back() -> None:
    sampler = Sampler(VOCABULARY, 2, CPU)
    slots = [sampler.add(Sampling(temperature=1, seed=1, presence_penalty=1), [1]) for _ in "ab"]
    with pytest.raises(RuntimeError, match="all 2 slots"):
        sampler.add(Sampling(), [1])
    logits_BV = logits_of(2)
    sampler.draw(logits_BV, slots)
    sampler.remove(slots[0])
    again = sampler.add(Sampling(), [1])
    # Nothing is left of what was there before.
    assert sampler.draw(logits_BV[:1], [again]).fetch()[0].token_id == int(logits_BV[0].argmax())
