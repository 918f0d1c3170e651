"""In: a Graph whose norms have gains. Out: the gains folded into the weights that read the norm.

A rotation of the residual stream does not commute with a gain per column, but it does with a norm
that has none. Only a norm that nothing but linears read can be folded; the norms of query and key
heads, which rope reads, keep their gains.
"""

from __future__ import annotations

from dataclasses import replace

from openlpu.graph import Graph, Op, Param
from openlpu.passes.rewrite import Wires, with_ops, with_step


def fold_gains(graph: Graph) -> Graph:
    """Move each foldable gain into the recipes of its readers' weights. Biases are untouched."""
    wires = Wires(graph)
    gains = {
        op.out: op.params[0] for op in graph.ops if op.params and _foldable(op, wires, graph.output)
    }
    return with_ops(graph, (_folded(op, gains) for op in graph.ops))


def _foldable(op: Op, wires: Wires, output: str) -> bool:
    """Whether the op is a norm of whole rows that only linears read."""
    readers = wires.readers[op.out]
    return (
        op.kind == "rmsnorm"
        and op.integer("heads", 1) == 1
        and op.out != output
        and bool(readers)
        and all(reader.kind == "linear" and reader.src == (op.out,) for reader in readers)
    )


def _folded(op: Op, gains: dict[str, Param]) -> Op:
    """The norm without its gain, or the linear with the gain of the norm it reads."""
    if op.out in gains:
        return replace(op, params=())
    gain = gains.get(op.src[0]) if op.kind == "linear" else None
    if gain is None:
        return op
    weights = op.integer("weights", 1)
    return replace(
        op,
        params=tuple(
            with_step(param, "gain", gain.source) if i < weights else param
            for i, param in enumerate(op.params)
        ),
    )
