"""In: a Graph of single ops. Out: QKV as one linear, gate and up as one, residuals added in them,
norm and quantization as one.

Passes that put work where the data is at hand: the fused linear reads its source once, the fused
norm reads a row once and writes int8. The reference defines each fused op as the composition of
what it replaces, so no bit changes.
"""

from __future__ import annotations

from dataclasses import replace

from openlpu.graph import Graph, Op, attrs
from openlpu.passes.rewrite import Wires, replaced


def fuse_qkv(graph: Graph) -> Graph:
    """The linears behind the three sources of an attention -> one linear and three slices."""
    wires, changes = Wires(graph), dict[str, tuple[Op, ...]]()
    place = {op.out: i for i, op in enumerate(graph.ops)}
    for op in graph.ops:
        if op.kind != "attention" or len(op.src) != 3:
            continue
        found = [_linear_behind(source, wires) for source in op.src]
        parts = [part for part in found if part is not None]
        if len(parts) == 3 and _side_by_side(parts):
            whole = _beside(parts, f"{parts[0].out}kv")
            start = 0
            for part in parts:
                width = part.params[0].shape[0]
                cut = Op("slice", part.out, (whole.out,), (), attrs(start=start, width=width))
                changes[part.out] = (cut,)
                start += width
            first = min(parts, key=lambda part: place[part.out])
            changes[first.out] = (whole, *changes[first.out])
    return replaced(graph, changes)


def fuse_gate_up(graph: Graph) -> Graph:
    """swiglu of two linears over one value -> one linear with the epilogue swiglu."""
    wires, changes = Wires(graph), dict[str, tuple[Op, ...]]()
    for op in graph.ops:
        if op.kind != "swiglu":
            continue
        made = [wires.made_by(source, "linear") for source in op.src]
        parts = [part for part in made if part is not None]
        alone = all(wires.sole_reader(part.out) is op for part in parts)
        if len(parts) == 2 and alone and _side_by_side(parts):
            whole = _beside(parts, op.out)
            changes[op.out] = (replace(whole, attrs=attrs(epilogue="swiglu", weights=2)),)
    return replaced(graph, changes)


def fuse_residual(graph: Graph) -> Graph:
    """The sum of a linear and another value -> the linear with the epilogue add."""
    wires, changes = Wires(graph), dict[str, tuple[Op, ...]]()
    for op in graph.ops:
        if op.kind != "add":
            continue
        for value, other in (op.src[::-1], op.src):
            linear = wires.made_by(value, "linear")
            if linear is not None and _plain(linear) and wires.sole_reader(value) is op:
                fused = (linear.src[0], other)
                options = {**dict(linear.attrs), "epilogue": "add"}
                changes[op.out] = (replace(linear, out=op.out, src=fused, attrs=attrs(**options)),)
                break
    return replaced(graph, changes)


def fuse_norm_quant(graph: Graph) -> Graph:
    """rmsnorm (16 bits) + quant (no Hadamard) -> rmsnorm_quant."""
    wires, changes = Wires(graph), dict[str, tuple[Op, ...]]()
    for op in graph.ops:
        norm = wires.made_by(op.src[0], "rmsnorm") if op.kind == "quant" else None
        if norm is not None and _expressible(norm, op) and wires.sole_reader(norm.out) is op:
            changes[op.out] = (_normed_and_quantized(norm, op),)
    return replaced(graph, changes)


def _linear_behind(value: str, wires: Wires) -> Op | None:
    """The linear that makes a value, through rope and norms; each step read by one op only."""
    op = wires.maker.get(value)
    while op is not None and wires.sole_reader(op.out) is not None:
        if op.kind == "linear":
            return op
        if op.kind not in ("rope", "rmsnorm"):
            return None
        op = wires.maker.get(op.src[0])
    return None


def _plain(op: Op) -> bool:
    return op.text("epilogue", "none") == "none"


def _side_by_side(parts: list[Op]) -> bool:
    """Whether the linears read one value, do nothing after, store their weights alike, and all or
    none have a bias."""
    first = parts[0]
    return all(
        part.src == first.src
        and _plain(part)
        and part.integer("weights", 1) == 1
        and len(part.params) == len(first.params)
        and part.params[0].format == first.params[0].format
        for part in parts
    )


def _beside(parts: list[Op], out: str) -> Op:
    weights = tuple(part.params[0] for part in parts)
    biases = tuple(bias for part in parts for bias in part.params[1:])
    return Op("linear", out, parts[0].src, weights + biases, attrs(weights=len(parts)))


def _expressible(norm: Op, quant: Op) -> bool:
    return norm.integer("bits", 16) == 16 and not quant.integer("hadamard", 0)


def _normed_and_quantized(norm: Op, quant: Op) -> Op:
    options = attrs(
        eps=norm.number("eps"),
        group=quant.integer("group", 0),
        heads=norm.integer("heads", 1),
    )
    return Op("rmsnorm_quant", quant.out, norm.src, norm.params, options)
