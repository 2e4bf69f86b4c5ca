"""The scheduler: everybody is served in order, and no page is held without need."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ic.inference.engine.pages import PagePool
from ic.inference.engine.scheduler import Chunk, Plan, Scheduler, Sequence

PAGE = 4


@dataclass(frozen=True)
class Asked:
    """A request of the property: when it comes, what it asks, when it ends of itself or is
    cancelled."""

    arrives: int
    shared: int
    own: int
    answer: int
    stops_after: int
    cancelled_after: int | None


ASKED = st.builds(
    Asked,
    arrives=st.integers(0, 20),
    shared=st.integers(0, 12),
    own=st.integers(1, 12),
    answer=st.integers(1, 12),
    stops_after=st.integers(1, 20),
    cancelled_after=st.none() | st.integers(0, 12),
)


def token(tokens: list[int]) -> int:
    """What the model says: a function of everything before."""
    return hash(tuple(tokens)) % 1000 + 100


class Machine:
    """Carries plans out: remembers which tokens lie where, and refuses what was never computed."""

    def __init__(self, pool: PagePool) -> None:
        self.slots: dict[tuple[int, int], int] = {}
        self.on_device: dict[str, list[int]] = {}

    def read(self, sequence: Sequence, end: int) -> list[int]:
        return [self.slots[sequence.pages[i // PAGE], i % PAGE] for i in range(end)]

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        tokens = self.on_device[sequence.id]
        for i in range(start, end):
            self.slots[sequence.pages[i // PAGE], i % PAGE] = tokens[i]
        assert self.read(sequence, end) == tokens[:end]

    def run(self, plan: Plan) -> list[Sequence]:
        """Sequences that drew a token."""
        drew = []
        for sequence in plan.decode:
            end = len(self.on_device[sequence.id])
            self.write(sequence, end - 1, end)
            drew.append(sequence)
        if plan.chunk is not None:
            chunk = plan.chunk
            self.on_device.setdefault(chunk.sequence.id, list(chunk.sequence.tokens))
            self.write(chunk.sequence, chunk.start, chunk.end)
            if chunk.end == len(self.on_device[chunk.sequence.id]):
                drew.append(chunk.sequence)
        for sequence in drew:
            tokens = self.on_device[sequence.id]
            tokens.append(token(tokens))
        return drew


@settings(max_examples=60)
@given(
    asked=st.lists(ASKED, min_size=1, max_size=8),
    num_pages=st.integers(9, 20),
    max_batch=st.integers(1, 5),
    chunk_tokens=st.integers(1, 9),
    prefix_cache=st.booleans(),
    ahead=st.integers(0, 1),
)
def test_every_request_is_answered_in_order(
    asked: list[Asked],
    num_pages: int,
    max_batch: int,
    chunk_tokens: int,
    prefix_cache: bool,
    ahead: int,
) -> None:
    """Whatever comes and goes: each sequence gets the tokens that it would get alone, nobody
    overtakes, nobody waits for ever, and in the end no page is held.
    """
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        pool,
        page_tokens=PAGE,
        max_batch=max_batch,
        chunk_tokens=chunk_tokens,
        prefix_cache=prefix_cache,
    )
    machine = Machine(pool)
    sequences: dict[str, Sequence] = {}
    order: list[str] = []
    started: list[str] = []
    finished: set[str] = set()
    in_flight: list[list[Sequence]] = []
    # The oldest gets on in each step but those in which its last token is under way.
    most_steps = 24 + sum(
        (x.shared + x.own + x.answer) // chunk_tokens + 2 + x.answer + ahead for x in asked
    )
    for step in range(most_steps):
        for index, request in enumerate(asked):
            name = str(index)
            if request.arrives == step:
                prompt = [*range(request.shared), *([1000 + index] * request.own)]
                sequences[name] = Sequence(name, prompt, len(prompt) + request.answer)
                scheduler.add(sequences[name])
                order.append(name)
            gone = request.cancelled_after
            if gone is not None and step == request.arrives + gone and name not in finished:
                scheduler.remove(sequences[name])
                finished.add(name)
        plan = scheduler.plan()
        assert len(scheduler.running) <= max_batch
        held = {page for sequence in scheduler.running for page in sequence.pages}
        assert pool.num_used == len(held)
        active = [x.id for x in (*scheduler.running, *scheduler.waiting)]
        assert active == [name for name in order if name not in finished]  # nobody overtakes
        if plan.chunk is not None:
            assert plan.chunk.end - plan.chunk.start in range(1, chunk_tokens + 1)
            if plan.chunk.sequence.id not in started:
                started.append(plan.chunk.sequence.id)
        in_flight.append(machine.run(plan))
        if len(in_flight) > ahead:
            for sequence in in_flight.pop(0):
                if sequence.id in finished:
                    continue
                new = machine.on_device[sequence.id][len(sequence.tokens)]
                scheduler.drawn(sequence, new)
                request = asked[int(sequence.id)]
                drawn = len(sequence.tokens) - sequence.num_prompt
                if drawn in (request.stops_after, request.answer):
                    scheduler.remove(sequence)
                    finished.add(sequence.id)
        if step > 20 and len(finished) == len(asked) and not any(in_flight):
            break
    assert len(finished) == len(asked)
    assert pool.num_used == 0
    assert [name for name in order if name in started] == started
    for name, sequence in sequences.items():
        alone = sequence.tokens[: sequence.num_prompt]
        while len(alone) < len(sequence.tokens):
            alone.append(token(alone))
        assert sequence.tokens == alone
        request = asked[int(name)]
        if request.cancelled_after is None:
            drawn = len(sequence.tokens) - sequence.num_prompt
            assert drawn == min(request.stops_after, request.answer)


def scheduler_of(num_pages: int, **changes: object) -> Scheduler:
    options = {"page_tokens": PAGE, "max_batch": 4, "chunk_tokens": 8, "prefix_cache": True}
    return Scheduler(PagePool(num_pages), **{**options, **changes})  # type: ignore[arg-type]


def test_prompts_share_whole_pages_but_for_the_last_token() -> None:
    scheduler = scheduler_of(20)
    first = Sequence("a", list(range(8)), 10)
    scheduler.add(first)
    plan = scheduler.plan()
    assert plan.chunk is not None
    assert (plan.chunk.start, plan.chunk.end, plan.chunk.is_last) == (0, 8, True)
    assert first.num_cached == 0
    same, longer, other = (
        Sequence("b", list(range(8)), 10),
        Sequence("c", [*range(9), 7, 7], 12),
        Sequence("d", [1, *range(8)], 10),
    )
    found = []
    for sequence in (same, longer, other):
        scheduler.add(sequence)
        plan = scheduler.plan()
        assert plan.chunk is not None
        found.append((sequence.num_cached, plan.chunk.start))
        scheduler.drawn(sequence, 5)
    assert found == [(4, 4), (8, 8), (0, 0)]
    assert same.pages[0] == longer.pages[0] == first.pages[0]
    assert same.pages[1] != first.pages[1]
    assert not set(other.pages) & {*first.pages, *same.pages, *longer.pages}


def test_the_last_to_arrive_gives_up_its_pages() -> None:
    scheduler = scheduler_of(5, prefix_cache=False)
    first, second = Sequence("a", [1] * 7, 12), Sequence("b", [2] * 6, 12)
    for sequence in (first, second):
        scheduler.add(sequence)
    assert scheduler.plan().chunk is not None
    scheduler.drawn(first, 9)
    plan = scheduler.plan()
    assert plan.decode == (first,)
    assert plan.chunk is not None
    assert plan.chunk.sequence is second
    for sequence in (first, second):
        scheduler.drawn(sequence, 9)
    assert scheduler.plan().decode == (first, second)  # first takes the fifth page
    for sequence in (first, second):
        scheduler.drawn(sequence, 9)
    assert scheduler.plan().decode == (first, second)
    for sequence in (first, second):
        scheduler.drawn(sequence, 9)
    plan = scheduler.plan()
    assert plan.decode == (first,)  # second needs a third page, and is itself the last
    assert plan.preempted == (second,)
    assert (second.pages, second.num_computed, second.tokens[6:]) == ([], 0, [9, 9, 9])
    assert scheduler.num_preemptions == 1
    scheduler.drawn(first, 9)
    scheduler.remove(first)
    plan = scheduler.plan()
    assert plan.chunk is not None
    assert plan.chunk == Chunk(second, 0, 8, is_last=False)
    assert scheduler.plan().decode == (second,)  # the ninth token, drawn before, is its last


def test_who_gave_up_its_pages_is_the_next_to_be_let_in() -> None:
    scheduler = scheduler_of(5, prefix_cache=False, max_batch=2)
    first, second, third = (Sequence(name, [1] * 7, 14) for name in "abc")
    for sequence in (first, second, third):
        scheduler.add(sequence)
    under_way: list[Sequence] = []
    while not scheduler.num_preemptions:
        plan = scheduler.plan()
        under_way = [*plan.decode, *([plan.chunk.sequence] if plan.chunk else [])]
        for sequence in under_way:
            scheduler.drawn(sequence, 9)
    assert plan.preempted == (second,)
    assert list(scheduler.waiting) == [second, third]


def test_pages_that_were_not_read_are_not_found() -> None:
    scheduler = scheduler_of(20, chunk_tokens=6)
    gone = Sequence("a", list(range(18)), 20)
    scheduler.add(gone)
    assert scheduler.plan().chunk == Chunk(gone, 0, 6, is_last=False)
    scheduler.remove(gone)
    again = Sequence("b", list(range(18)), 20)
    scheduler.add(again)
    assert scheduler.plan().chunk == Chunk(again, 4, 10, is_last=False)


def test_a_prompt_that_does_not_fit_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when there is more room."""
    scheduler = scheduler_of(6)
    first, second = Sequence("a", [1] * 10, 24), Sequence("b", [2] * 18, 20)
    looked_up: list[str] = []
    keys = Sequence.keys
    monkeypatch.setattr(
        Sequence, "keys", lambda self, *rest: (looked_up.append(self.id), keys(self, *rest))[1]
    )
    scheduler.add(first)
    scheduler.plan()
    scheduler.add(second)
    for token in range(12):
        scheduler.drawn(first, token)
        scheduler.plan()
    assert looked_up.count("b") == 1
    scheduler.remove(first)
    assert scheduler.plan().chunk == Chunk(second, 0, 8, is_last=False)
    assert looked_up.count("b") > 1


def test_what_never_fits_is_refused() -> None:
    scheduler = scheduler_of(3)
    scheduler.add(Sequence("a", [1] * 5, 12))
    with pytest.raises(ValueError, match="13 tokens: the cache holds 12"):
        scheduler.add(Sequence("b", [1] * 5, 13))
