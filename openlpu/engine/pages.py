"""In: how many positions a sequence needs, and its tokens. Out: pages of the K/V pool.

A page holds the K/V of 64 positions. By the contract they depend on the tokens up to them alone, so
a full page serves every sequence that begins with the same tokens: it is shared while somebody
holds it, and kept, as long as there is room, when nobody does. The pool belongs to a runner and
grows by doubling, so a short chat never pays for a long context.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from typing import Protocol

from openlpu.errors import DoesNotFit
from openlpu.graph.step import PAGE

_ROOT = 0
_Prefix = tuple[int, tuple[int, ...]]  # the prefix before a page, by number; the page's tokens


class Pool(Protocol):
    """What owns the pages' memory: `pages` exist now, `grow` makes it that many in all."""

    @property
    def pages(self) -> int: ...

    def grow(self, pages: int) -> None: ...


def pages_for(positions: int) -> int:
    """Pages that hold this many positions."""
    return -(-positions // PAGE)


class PageTable:
    """Who holds which page. The lowest free page is lent first, so that equal runs use equal
    memory; then the kept page that nobody wanted for longest."""

    def __init__(self, pool: Pool, *, limit: int | None = None, share: bool = True) -> None:
        """limit: most pages of the pool. share: whether full pages may serve several sequences."""
        self._pool = pool
        self.limit = limit
        self._share = share
        have = pool.pages if limit is None else min(limit, pool.pages)
        self._free = list(range(have - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # full, held by nobody; oldest first
        self._pages: dict[_Prefix | None, int] = {}
        self._prefixes: dict[int, _Prefix] = {}  # page -> its entry in _pages
        self._numbers: dict[int, int] = {}  # page -> number of the prefix that ends with it
        self._next_number = _ROOT + 1

    @property
    def free(self) -> int:
        """Pages that exist and are held by nobody, kept ones among them."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return len(self._holders)

    @property
    def kept(self) -> int:
        """Full pages that nobody holds, but whose tokens may come again."""
        return len(self._kept)

    # -- memory ---------------------------------------------------------------------------------

    def extend(self, held: list[int], positions: int) -> None:
        """Add pages to `held` until it covers `positions`; all of them or none.

        Raises DoesNotFit if the pool would pass its limit.
        """
        missing = pages_for(positions) - len(held)
        while missing > len(self._free) + len(self._kept):
            self._grow(missing - len(self._free) - len(self._kept))
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evicted()
            self._holders[page] = 1
            held.append(page)

    def release(self, held: list[int], *, keep: int = 0) -> None:
        """Take back the pages of `held` beyond those that cover `keep` positions."""
        first = pages_for(keep)
        for page in reversed(held[first:]):  # the longest prefix is the first to be evicted
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._prefixes:
                self._kept[page] = None
            else:
                self._free.append(page)
        self._free.sort(reverse=True)
        del held[first:]

    def _evicted(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._pages[self._prefixes.pop(page)]
        del self._numbers[page]
        return page

    def _grow(self, missing: int) -> None:
        before = len(self._free) + len(self._kept) + len(self._holders)
        least = before + missing
        if self.limit is not None and least > self.limit:
            raise DoesNotFit(
                "the K/V pool",
                least,
                self.limit,
                "pages",
                ("a shorter context", "fewer sequences"),
            )
        wanted = max(least, 2 * before)
        wanted = wanted if self.limit is None else min(wanted, self.limit)
        self._pool.grow(wanted)
        self._free += range(before, wanted)
        self._free.sort(reverse=True)

    # -- prefixes -------------------------------------------------------------------------------

    def find(self, held: list[int], tokens: Items[int]) -> None:
        """Hold the known pages that go on from `held` for `tokens`, in order."""
        while (prefix := self.next_prefix(held, tokens)) in self._pages:
            page = self._pages[prefix]
            self._holders[page] = self._holders.get(page, 0) + 1
            self._kept.pop(page, None)
            held.append(page)

    def next_prefix(self, held: Items[int], tokens: Items[int]) -> _Prefix | None:
        """What the next full page after `held` would be found by, or None if there is none that
        could be shared."""
        start = PAGE * len(held)
        number = self._numbers.get(held[-1]) if held else _ROOT
        if not self._share or number is None or start + PAGE > len(tokens):
            return None
        return number, tuple(tokens[start : start + PAGE])

    def offer(self, held: Items[int], tokens: Items[int], start: int, stop: int) -> None:
        """The K/V of tokens[start:stop] have been computed in `held`: full pages may be shared."""
        for place in range(start // PAGE, stop // PAGE):
            page = held[place]
            if page in self._prefixes:
                continue
            prefix = self.next_prefix(held[:place], tokens)
            if prefix is None:  # the page before serves this sequence alone
                return
            if prefix in self._pages:  # another page of the same content came first
                return
            self._pages[prefix] = page
            self._prefixes[page] = prefix
            self._numbers[page] = self._next_number
            self._next_number += 1

    def is_shared(self, page: int) -> bool:
        """Whether others may hold the page, now or later: it must not be written any more."""
        return page in self._prefixes

    def forget_kept(self) -> None:
        """Free what nobody holds."""
        while self._kept:
            self._free.append(self._evicted())
        self._free.sort(reverse=True)
