"""In: a float Graph without gains on the residual stream. Out: the same function, rotated inside.

R1 turns the residual stream: what writes to it (the table, o, down) turns its outputs, what reads
it through a norm turns its inputs. R2 turns each head of V and, inversely, the inputs of o. Both
spread outliers over all channels, which is what makes 8 bits enough; in exact arithmetic neither
changes a logit, because a norm without gain depends on lengths only.
"""

from __future__ import annotations

from collections.abc import Callable

from openlpu.errors import GraphError
from openlpu.graph import Graph, Op, Param
from openlpu.numerics.rotation import SIGN_SEED
from openlpu.passes.rewrite import Wires, with_ops, with_params, with_step

Change = Callable[[Param], Param]


def rotate(graph: Graph, *, seed: int = SIGN_SEED) -> Graph:
    """Write R1 and R2 into the recipes. Raises GraphError if the stream is read unnormed."""
    wires = Wires(graph)
    changes: dict[str, list[Change]] = {}
    stream: set[str] = set()
    for op in graph.ops:
        if op.kind == "embed":
            stream.add(op.out)
            changes.setdefault(op.out, []).append(lambda p: with_step(p, "rotate_in", seed))
        elif op.kind == "attention":
            _turn_heads(op, wires, changes, seed)
        elif not stream.isdisjoint(op.src):
            _follow_stream(op, wires, stream, changes, seed)
    return with_ops(graph, (_changed(op, changes.get(op.out, [])) for op in graph.ops))


def _changed(op: Op, changes: list[Change]) -> Op:
    for change in changes:
        op = with_params(op, change)
    return op


def _follow_stream(
    op: Op, wires: Wires, stream: set[str], changes: dict[str, list[Change]], seed: int
) -> None:
    """One op that reads the stream: rows and sums carry it on, a norm hands it to its readers."""
    if op.kind == "rows":
        stream.add(op.out)
    elif op.kind == "add":
        stream.add(op.out)
        for name in op.src:
            if name not in stream:
                if wires.made_by(name, "linear") is None or wires.sole_reader(name) is not op:
                    raise GraphError(f"rotate: %{name} is added to the stream, but is no linear")
                changes.setdefault(name, []).append(lambda p: with_step(p, "rotate_out", seed))
    elif op.kind == "rmsnorm" and not op.params and op.integer("heads", 1) == 1:
        for reader in wires.readers[op.out]:
            if reader.kind != "linear":
                raise GraphError(f"rotate: {reader.kind} %{reader.out} reads a norm of the stream")
            changes.setdefault(reader.out, []).append(
                lambda p: with_step(p, "rotate_in", seed) if len(p.shape) == 2 else p
            )
    else:
        raise GraphError(f"rotate: {op.kind} %{op.out} reads the residual stream as it is")


def _turn_heads(op: Op, wires: Wires, changes: dict[str, list[Change]], seed: int) -> None:
    """R2 between the linear that makes V and the one that reads the attention."""
    heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
    v, o = wires.made_by(op.src[-1], "linear"), wires.sole_reader(op.out)
    if len(op.src) != 3 or v is None or wires.sole_reader(v.out) is not op:
        raise GraphError(f"rotate: the values of attention %{op.out} come from no linear alone")
    if o is None or o.kind != "linear":
        raise GraphError(f"rotate: attention %{op.out} is not read by one linear")
    changes.setdefault(v.out, []).append(lambda p: with_step(p, "heads_out", kv_heads, seed))
    changes.setdefault(o.out, []).append(
        lambda p: with_step(p, "heads_in", heads, seed) if len(p.shape) == 2 else p
    )
