"""In: a Graph. Out: who makes and who reads each value, and the Graph again with other ops.

What every pass needs, and nothing a pass decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from openlpu.graph import Graph, Op, Param, Step, types


class Wires:
    """Producers and readers of a graph's values."""

    def __init__(self, graph: Graph) -> None:
        self.maker: dict[str, Op] = {op.out: op for op in graph.ops}
        self.readers: dict[str, list[Op]] = {op.out: [] for op in graph.ops}
        self._output = graph.output
        for op in graph.ops:
            for name in op.src:
                self.readers.setdefault(name, []).append(op)

    def sole_reader(self, value: str) -> Op | None:
        """The one op that reads a value; None if there are several, or if it is the output."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value != self._output else None

    def made_by(self, value: str, kind: str) -> Op | None:
        """The op that makes a value, if it is of this kind."""
        op = self.maker.get(value)
        return op if op is not None and op.kind == kind else None


def with_ops(graph: Graph, ops: Iterable[Op]) -> Graph:
    """The graph with these ops, without those that nothing needs; raises GraphError if illegal."""
    kept: list[Op] = []
    needed = {graph.output}
    for op in reversed(list(ops)):
        if op.out in needed:
            kept.append(op)
            needed.update(op.src)
    result = replace(graph, ops=tuple(reversed(kept)))
    types(result)
    return result


def replaced(graph: Graph, changes: Mapping[str, tuple[Op, ...]]) -> Graph:
    """The graph with the op that makes each named value replaced by others (or by none)."""
    return with_ops(graph, (new for op in graph.ops for new in changes.get(op.out, (op,))))


def with_attrs(op: Op, **values: int | float | str) -> Op:
    """The op with these attributes set."""
    return replace(op, attrs=tuple(sorted({**dict(op.attrs), **values}.items())))


def with_params(op: Op, change: Callable[[Param], Param]) -> Op:
    """The op with each param changed."""
    return replace(op, params=tuple(change(param) for param in op.params))


def with_step(param: Param, kind: str, *args: int | str) -> Param:
    """The param with one more step at the end of its recipe."""
    return replace(param, recipe=(*param.recipe, Step(kind, args)))
