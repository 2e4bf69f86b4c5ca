"""Who computes what in the next step. Pure bookkeeping: imports no PyTorch.

Requests are served in the order in which they arrived. Those that run decode one token a step, all
together; beside them one request, the first that is not done with it, reads a piece of its prompt.
When no page is left, the request that arrived last gives up its pages and waits again. Later it
reads its prompt and what it has drawn so far anew (recomputation). So the first request always gets
on, and no request waits for one that came after it.

A step may be planned before the tokens of the one before are known: where they go is known all the
same. A token that is drawn and not known yet is `ahead`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ic.inference.engine.pages import PagePool, page_key


@dataclass(eq=False)
class Sequence:
    """A request as the scheduler sees it.

    Attributes:
        id: the request's.
        tokens: of the prompt and the answer, as far as they are known.
        most_tokens: tokens of the prompt and the longest answer.
        num_prompt: tokens of the prompt.
        num_ahead: tokens behind `tokens` that are drawn and not known yet.
        pages: of the cache, in order; for all tokens that are computed or about to be.
        num_computed: tokens whose latents the cache holds.
        num_cached: tokens of the prompt that it found there when it was first let in.
    """

    id: str
    tokens: list[int]
    most_tokens: int
    num_prompt: int = field(init=False)
    num_ahead: int = 0
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int | None = None
    _num_registered: int = 0
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens, known or not."""
        return len(self.tokens) + self.num_ahead

    @property
    def is_reading(self) -> bool:
        """Whether more than the last token is still to be computed, or nothing has been drawn."""
        return self.num_computed < self.num_tokens - 1 or self.num_tokens == self.num_prompt

    def keys(self, count: int, page_tokens: int) -> list[bytes]:
        """Keys of the first `count` pages, whose tokens are known."""
        for index in range(len(self._keys), count):
            before = self._keys[-1] if self._keys else b""
            page = self.tokens[index * page_tokens : (index + 1) * page_tokens]
            self._keys.append(page_key(before, page))
        return self._keys[:count]


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence that are to be computed in one pass.

    Attributes:
        is_last: whether the next token is drawn after it.
    """

    sequence: Sequence
    start: int
    end: int
    is_last: bool


@dataclass(frozen=True)
class Plan:
    """What one step computes.

    Attributes:
        decode: sequences whose last token is computed, and the next one drawn.
        chunk: a piece of one that reads, or None.
        preempted: sequences that gave up their pages for it.
    """

    decode: tuple[Sequence, ...]
    chunk: Chunk | None
    preempted: tuple[Sequence, ...]


class Scheduler:
    """The order of sequences.

    Args:
        pool: pages of the cache.
        page_tokens: tokens of a page.
        max_batch: most sequences that run at once.
        chunk_tokens: longest piece of a prompt in one step.
        prefix_cache: find prompts' first pages by their content.

    Attributes:
        running, waiting: sequences in the order of their arrival; all that wait arrived after all
            that run.
        num_preemptions: how often a sequence gave up its pages.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_tokens: int,
        max_batch: int,
        chunk_tokens: int,
        prefix_cache: bool,
    ) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self.max_batch = max_batch
        self.chunk_tokens = chunk_tokens
        self.prefix_cache = prefix_cache
        self.num_preemptions = 0
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        # Who did not fit last, and into how many pages.
        self._too_long: tuple[Sequence, int] | None = None

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the cache holds, of one sequence if need be."""
        return self.pool.num_pages * self.page_tokens

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait.

        Raises:
            ValueError: it would never fit into the cache.
        """
        if sequence.most_tokens > self.capacity_tokens:
            raise ValueError(
                f"{sequence.most_tokens} tokens: the cache holds {self.capacity_tokens}"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, and release its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_up_pages(sequence)

    def plan(self) -> Plan:
        """The next step. It is to be started, in this order with others, before the next call."""
        preempted: list[Sequence] = []
        decode: list[Sequence] = []
        for sequence in list(self.running):
            is_done = sequence.num_tokens >= sequence.most_tokens
            if sequence in preempted or sequence.is_reading or is_done:
                continue
            if self._make_room(sequence, preempted):
                decode.append(sequence)
        reading = next((x for x in self.running if x.is_reading), None)
        if reading is None:
            reading = self._let_in()
        chunk = None
        if reading is not None:
            end = min(reading.num_computed + self.chunk_tokens, len(reading.tokens))
            chunk = Chunk(reading, reading.num_computed, end, end == len(reading.tokens))
        self.num_preemptions += len(preempted)
        plan = Plan(tuple(decode), chunk, tuple(preempted))
        self._started(plan)
        return plan

    def drawn(self, sequence: Sequence, token: int) -> None:
        """Learn the first token of a sequence that was ahead."""
        sequence.num_ahead -= 1
        sequence.tokens.append(token)
        self._register(sequence)

    def _started(self, plan: Plan) -> None:
        """The step will be in the cache before anything that is planned later."""
        for sequence in plan.decode:
            sequence.num_computed = sequence.num_tokens
            sequence.num_ahead += 1
            self._register(sequence)
        if (chunk := plan.chunk) is not None:
            chunk.sequence.num_computed = chunk.end
            chunk.sequence.num_ahead += chunk.is_last
            self._register(chunk.sequence)

    def _register(self, sequence: Sequence) -> None:
        """Make the pages that are whole, and whose tokens are known, known by their content."""
        if not self.prefix_cache or not sequence.pages:
            return
        whole = min(sequence.num_computed, len(sequence.tokens)) // self.page_tokens
        if whole > sequence._num_registered:
            keys = sequence.keys(whole, self.page_tokens)
            for index in range(sequence._num_registered, whole):
                self.pool.register(sequence.pages[index], keys[index])
            sequence._num_registered = whole

    def _make_room(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Whether a running sequence has a page for its last token; others may have to go for it,
        and the last of them may be the sequence itself.
        """
        if self._num_pages(sequence.num_tokens) <= len(sequence.pages):
            return True
        while (pages := self.pool.take(1)) is None:
            last = self.running.pop()
            self._give_up_pages(last)
            self.waiting.appendleft(last)
            preempted.append(last)
            if last is sequence:
                return False
        sequence.pages += pages
        return True

    def _let_in(self) -> Sequence | None:
        """The sequence that has waited longest, with pages for all its tokens, if there are enough.

        While others run, each of them is left another page, so that they do not turn it out at
        once.
        """
        if not self.waiting or len(self.running) >= self.max_batch:
            return None
        sequence = self.waiting[0]
        room = self.pool.num_available - len(self.running)
        # Looking a prompt of a million tokens up takes longer than the others' step.
        refused, refused_at = self._too_long or (None, 0)
        if sequence is refused and room <= refused_at:
            return None
        found: list[int] = []
        if self.prefix_cache:
            # The last token is always computed: its logits are asked for.
            whole = (len(sequence.tokens) - 1) // self.page_tokens
            found = self.pool.find(sequence.keys(whole, self.page_tokens))
        new = self._num_pages(len(sequence.tokens)) - len(found)
        if new > room - self.pool.num_kept_of(found):
            self._too_long = (sequence, room)
            return None
        self._too_long = None
        # Who gave up its pages in this very plan does not fit: one of them is already taken.
        assert not sequence.num_ahead
        self.pool.hold(found)
        taken = self.pool.take(new)
        assert taken is not None
        sequence.pages = found + taken
        sequence.num_computed = len(found) * self.page_tokens
        sequence._num_registered = len(found)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        self.running.append(self.waiting.popleft())
        return sequence

    def _give_up_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
