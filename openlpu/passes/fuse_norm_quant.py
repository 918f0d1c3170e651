"""In: a Graph with norms and quantizations. Out: a norm that only one quantization reads does both.

The fused op reads a row once and writes int8; the reference defines it as the two ops in order, so
no bit changes.
"""

from __future__ import annotations

from openlpu.graph import Graph, Op, attrs
from openlpu.passes.rewrite import Wires, replaced


def fuse_norm_quant(graph: Graph) -> Graph:
    """rmsnorm (16 bits) + quant (no Hadamard) -> rmsnorm_quant."""
    wires, changes = Wires(graph), dict[str, tuple[Op, ...]]()
    for op in graph.ops:
        norm = wires.made_by(op.src[0], "rmsnorm") if op.kind == "quant" else None
        if norm is not None and _expressible(norm, op) and wires.sole_reader(norm.out) is op:
            changes[op.out] = (_fused(norm, op),)
    return replaced(graph, changes)


def _expressible(norm: Op, quant: Op) -> bool:
    return norm.integer("bits", 16) == 16 and not quant.integer("hadamard", 0)


def _fused(norm: Op, quant: Op) -> Op:
    options = attrs(
        eps=norm.number("eps"),
        group=quant.integer("group", 0),
        heads=norm.integer("heads", 1),
    )
    return Op("rmsnorm_quant", quant.out, norm.src, norm.params, options)
