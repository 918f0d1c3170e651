"""In: a HostModel or a Reference. Out: Runner, the one face of whatever can compute a step.

The engine above it schedules rows and pages without knowing which of them computes. Rows at
positions that a slot already has replace them, so a sequence may go back without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from openlpu.graph import Graph
from openlpu.graph.step import Batch
from openlpu.graph.tensors import TensorSource
from openlpu.reference import Reference

F32 = NDArray[np.float32]

MANY = 1 << 16  # sequences, where nothing else limits them


class Runner(Protocol):
    """Computes steps and owns the K/V of every slot. A HostModel is one."""

    @property
    def max_rows(self) -> int:
        """Most rows of one step."""
        ...

    @property
    def rows_of_a_sequence(self) -> int:
        """Most of them that may belong to one sequence."""
        ...

    @property
    def slots(self) -> int:
        """Most sequences that it keeps at once."""
        ...

    @property
    def shares_pages(self) -> bool:
        """Whether K/V lie in the pages that a Batch names, so that sequences may share them; else
        each slot has its own."""
        ...

    @property
    def pages(self) -> int:
        """Pages in the K/V pool."""
        ...

    def grow(self, pages: int) -> None:
        """Make the pool this large; what it holds stays."""
        ...

    def step(self, batch: Batch) -> F32:
        """Logits float32 [L, V] of the wanted rows; a fresh array."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@runtime_checkable
class HasStates(Protocol):
    """A Runner whose states can be read, not its logits only. A chip's program has no such port."""

    def states(self, batch: Batch) -> F32:
        """Like `step`, but the residual stream float32 [L, D] before the last norm."""
        ...


class ReferenceRunner:
    """The slow exact reference as a Runner. It keeps K/V by slot, so pages are only counted."""

    max_rows = rows_of_a_sequence = 512
    slots = MANY
    shares_pages = False

    def __init__(self, graph: Graph, source: TensorSource) -> None:
        self._reference: Reference | None = Reference(graph, source)
        self.pages = 16

    def grow(self, pages: int) -> None:
        """Only the count: the reference's arrays grow as they fill."""
        self.pages = pages

    def step(self, batch: Batch) -> F32:
        """Logits float32 [L, V] of the wanted rows."""
        assert self._reference is not None, "the runner is closed"
        return self._reference.step(batch)

    def states(self, batch: Batch) -> F32:
        """The residual stream float32 [L, D] of the wanted rows, before the last norm."""
        assert self._reference is not None, "the runner is closed"
        return self._reference.states(batch)

    def close(self) -> None:
        """Forget weights and K/V."""
        self._reference = None


def page_rows(tables: Iterable[list[int]]) -> NDArray[np.int32]:
    """Page lists of all slots as int32 [S, P], filled up with page 0."""
    held = list(tables)
    width = max((len(pages) for pages in held), default=1)
    rows = np.zeros((max(1, len(held)), max(1, width)), np.int32)
    for row, pages in zip(rows, held, strict=False):
        row[: len(pages)] = pages
    return rows
