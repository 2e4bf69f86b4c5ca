"""The pool of pages keeps its books whatever is taken, held, registered and released."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ic.inference.engine.pages import NULL_PAGE, PagePool, page_key

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 5)),
        st.tuples(st.just("share"), st.integers(0, 9)),
        st.tuples(st.just("register"), st.integers(0, 9)),
        st.tuples(st.just("release"), st.integers(0, 9)),
    ),
    max_size=60,
)


@given(num_pages=st.integers(1, 9), steps=STEPS)
def test_no_page_is_lost_or_given_twice(num_pages: int, steps: list[tuple[str, int]]) -> None:
    """Against a model: which holders have which pages, and which content was written where."""
    pool = PagePool(num_pages)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for number, (what, argument) in enumerate(steps):
        if what == "take":
            before = {page for pages in held for page in pages}
            pages = pool.take(argument)
            assert (pages is None) == (argument > num_pages - len(before))
            if pages is not None:
                assert len(set(pages)) == argument
                assert not before & set(pages)
                held.append(pages)
                for page in pages:
                    content.pop(page, None)
        elif held and what == "share":
            page_list = held[argument % len(held)]
            found = pool.find(content[page] for page in page_list if page in content)
            pool.hold(found)
            held.append(found)
        elif held and what == "register":
            for page in held[argument % len(held)]:
                if page not in content:
                    content[page] = page_key(b"", [number, page])
                    pool.register(page, content[page])
        elif held:
            pool.release(held.pop(argument % len(held)))
        used = {page for pages in held for page in pages}
        assert NULL_PAGE not in used
        assert pool.num_used == len(used)
        assert pool.num_available == num_pages - len(used)
        assert all(pool.find([key]) == [page] for page, key in content.items() if page in used)
        # What is kept is found with what was written there, and nothing else is found.
        kept = {page for page, key in content.items() if pool.find([key])} - used
        assert all(pool.find([content[page]]) == [page] for page in kept)
        assert pool.num_kept == len(kept)
    for pages in held:
        pool.release(pages)
    assert pool.num_used == 0
    assert pool.take(num_pages + 1) is None
    assert sorted(pool.take(num_pages) or []) == list(range(1, num_pages + 1))


def test_keys_tell_pages_apart_by_all_before_them() -> None:
    first = page_key(b"", [1, 2])
    assert first == page_key(b"", (1, 2))
    assert len({first, page_key(b"", [2, 1]), page_key(first, [1, 2]), page_key(b"", [1])}) == 4
    # As tokens are written in eight bytes each, no number runs into the next.
    assert page_key(b"", [1, 0]) != page_key(b"", [256, 0])


def test_the_longest_unused_page_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4)
    pages = pool.take(2) or []
    keys = [b"a", b"ab"]
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key)
    other = pool.take(1) or []
    pool.register(other[0], b"c")
    pool.release(pages)
    pool.release(other)
    assert (pool.num_kept, pool.num_used, pool.num_available) == (3, 0, 4)
    taken = pool.take(2)
    assert taken is not None
    assert pool.find(keys) == pages[:1]  # the free page, and the end of the older two
    assert pool.find([b"c"]) == other
    pool.hold(pages[:1])  # it is used again, so the other one is now the oldest
    pool.release(pages[:1])
    assert pool.take(1) == other
    assert pool.find([b"c"]) == []


def test_the_first_page_with_a_content_is_the_one_found() -> None:
    pool = PagePool(2)
    first, second = pool.take(2) or []
    pool.register(first, b"a")
    pool.register(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([first, second])
    assert pool.num_kept == 1
    with pytest.raises(ValueError, match="num_pages=0: must be at least 1"):
        PagePool(0)


def test_forgotten_pages_are_free() -> None:
    pool = PagePool(3)
    pages = pool.take(2) or []
    for page, key in zip(pages, (b"a", b"b"), strict=True):
        pool.register(page, key)
    pool.release(pages[:1])
    pool.forget()
    assert (pool.num_used, pool.num_kept, pool.num_available) == (1, 0, 2)
    assert pool.find([b"a"]) == pool.find([b"b"]) == []
    pool.release(pages[1:])
    assert sorted(pool.take(3) or []) == [1, 2, 3]
