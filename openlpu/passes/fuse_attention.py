"""In: a Graph after fuse_qkv. Out: attention reads Q, K, V as one matrix, norms and rope included.

The pattern is exactly what the reference does for a fused source: slices in order, a norm of each
query and key head or none, rope on both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from openlpu.graph import Graph, Op, Param
from openlpu.passes.rewrite import Wires, replaced, with_attrs


@dataclass(frozen=True, slots=True)
class _Part:
    """One source of an attention, followed back to its slice."""

    whole: str
    start: int
    width: int
    turned: bool
    norm: Op | None


def fuse_attention(graph: Graph) -> Graph:
    """slices (+ head norms) + rope + attention -> attention over the whole; bits unchanged."""
    wires, changes = Wires(graph), dict[str, tuple[Op, ...]]()
    for op in graph.ops:
        if op.kind == "attention" and len(op.src) == 3:
            fused = _fused(op, wires)
            if fused is not None:
                changes[op.out] = (fused,)
    return replaced(graph, changes)


def _fused(op: Op, wires: Wires) -> Op | None:
    heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
    counts = (heads, kv_heads, kv_heads)
    found = [_part(name, count, wires) for name, count in zip(op.src, counts, strict=True)]
    parts = [part for part in found if part is not None]
    if len(parts) < 3:
        return None
    start = 0
    for part in parts:
        if part.whole != parts[0].whole or part.start != start:
            return None
        start += part.width
    q, k, v = parts
    if not (q.turned and k.turned) or v.turned or v.norm is not None:
        return None
    fused = replace(op, src=(q.whole,))
    if q.norm is None and k.norm is None:
        return with_attrs(fused, rope=1)
    gains = _gains(op, q.norm, k.norm)
    if gains is None or q.norm is None:
        return None
    return replace(with_attrs(fused, rope=1, eps=q.norm.number("eps")), params=gains)


def _gains(op: Op, q: Op | None, k: Op | None) -> tuple[Param, ...] | None:
    """The gains of both head norms, if the fused form can express them."""
    bits = 16 if op.text("format", "i8") == "i8" else 64
    if q is None or k is None or q.number("eps") != k.number("eps"):
        return None
    if any(norm.integer("bits", 16) != bits or len(norm.params) != 1 for norm in (q, k)):
        return None
    return (*q.params, *k.params)


def _part(value: str, heads: int, wires: Wires) -> _Part | None:
    """Follow one source back through rope and a head norm to its slice."""
    op = wires.maker.get(value)
    turned, norm = False, None
    if op is not None and op.kind == "rope":
        if op.integer("heads") != heads:
            return None
        turned, op = True, wires.maker.get(op.src[0])
    if op is not None and op.kind == "rmsnorm":
        if op.integer("heads", 1) != heads:
            return None
        norm, op = op, wires.maker.get(op.src[0])
    if op is None or op.kind != "slice":
        return None
    return _Part(op.src[0], op.integer("start"), op.integer("width"), turned, norm)
