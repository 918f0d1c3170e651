"""In: how many positions a sequence needs. Out: pages of the K/V pool, each lent to one sequence.

The pool belongs to a runner and grows by doubling, so a short chat never pays for a long context.
"""

from __future__ import annotations

from typing import Protocol

from openlpu.errors import DoesNotFit
from openlpu.graph.step import PAGE


class Pool(Protocol):
    """What owns the pages' memory: `pages` exist now, `grow` makes it that many in all."""

    @property
    def pages(self) -> int: ...

    def grow(self, pages: int) -> None: ...


def pages_for(positions: int) -> int:
    """Pages that hold this many positions."""
    return -(-positions // PAGE)


class PageTable:
    """The free list. The lowest free page is lent first, so that equal runs use equal memory."""

    def __init__(self, pool: Pool, *, limit: int | None = None) -> None:
        self._pool = pool
        self._limit = limit
        self._free = list(range(pool.pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that exist and are lent to nobody."""
        return len(self._free)

    def extend(self, held: list[int], positions: int) -> None:
        """Add pages to `held` until it covers `positions`; all of them or none.

        Raises DoesNotFit if the pool would pass its limit.
        """
        missing = pages_for(positions) - len(held)
        if missing > len(self._free):
            self._grow(missing - len(self._free))
        held += [self._free.pop() for _ in range(missing)]

    def release(self, held: list[int], *, keep: int = 0) -> None:
        """Take back the pages of `held` beyond those that cover `keep` positions."""
        kept = pages_for(keep)
        self._free += held[kept:]
        self._free.sort(reverse=True)
        del held[kept:]

    def _grow(self, missing: int) -> None:
        before = self._pool.pages
        least = before + missing
        if self._limit is not None and least > self._limit:
            raise DoesNotFit(
                "the K/V pool",
                least,
                self._limit,
                "pages",
                ("a shorter context", "fewer sequences"),
            )
        wanted = max(least, 2 * before)
        self._pool.grow(wanted if self._limit is None else min(wanted, self._limit))
        self._free += range(before, self._pool.pages)
        self._free.sort(reverse=True)
