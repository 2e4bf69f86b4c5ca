"""Which request holds which pages of the cache, and which pages can serve another one.

A page is known by its content: the tokens in it and all tokens before it. Its key is a hash over
both, so equal keys mean equal latents. Imports no PyTorch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

# Rows of a batch that stand for nobody write here; no request ever holds it.
NULL_PAGE = 0


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a whole page from that of the page before (empty for the first) and its tokens."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class PagePool:
    """Pages 1 to `num_pages`, each free, held by requests, or kept for its content.

    A page is held as often as requests have taken it. Released by the last of them, it is kept if
    its content is registered, and free if not. Pages that are kept are taken back when no free one
    is left, the longest unused first.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages}: must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages, NULL_PAGE, -1))
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_used(self) -> int:
        """Pages that requests hold."""
        return len(self._holders)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds, kept for their content."""
        return len(self._kept)

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """So many pages without content, held once each; None, and no page, if there are fewer."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._free.append(page)
            page = self._free.pop()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the first keys, up to the first that no page has; none is held for it."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def num_kept_of(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds: `hold` makes so many fewer available."""
        return sum(page in self._kept for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that `find` gave once more."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def register(self, page: int, key: bytes) -> None:
        """Say what a held page contains, now that it is whole; the first page with a content stays
        the one that is found.
        """
        if page in self._key_of or key in self._page_of:
            return
        self._key_of[page] = key
        self._page_of[key] = page

    def release(self, pages: Sequence[int]) -> None:
        """Hold a request's pages once less. Its last pages are the first to be taken back: they are
        of use only to prompts that share all before them.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Forget all content: pages that are kept are free, and those that are held no longer known
        by what is in them.
        """
        self._free += self._kept
        self._kept.clear()
        self._key_of.clear()
        self._page_of.clear()
