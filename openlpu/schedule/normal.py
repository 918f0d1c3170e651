"""In: a Graph, fused or not. Out: the same in plain ops, cut into embedding, equal layers, head.

Fused ops are taken apart again: what is worth fusing on the chip is not what is on a CPU. Layers
must be alike but for their weights and windows; they share one schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op, attrs
from openlpu.passes.rewrite import with_ops


@dataclass(frozen=True, slots=True)
class Layer:
    """ops before the attention, the attention, ops after it; source and output name the stream."""

    before: tuple[Op, ...]
    attention: Op
    after: tuple[Op, ...]
    source: str
    output: str


@dataclass(frozen=True, slots=True)
class Parts:
    """A model: its embedding, its layers, and what follows."""

    embed: Op
    layers: tuple[Layer, ...]
    head: tuple[Op, ...]
    output: str


def plain(graph: Graph) -> Graph:
    """Every op the composition of plain ones; the values that others read keep their names."""
    ops: list[Op] = []
    same: dict[str, str] = {}  # every row's logits are computed; whoever asks takes those wanted
    for op in graph.ops:
        if op.kind == "rows":
            same[op.out] = same.get(op.src[0], op.src[0])
        else:
            src = tuple(same.get(name, name) for name in op.src)
            ops.extend(_plain(replace(op, src=src)))
    return with_ops(graph, ops)


def _plain(op: Op) -> list[Op]:
    if op.kind == "rmsnorm_quant":
        inner = f"{op.out}.normed"
        options = dict(op.attrs)
        group = options.pop("group", 0)
        norm = Op("rmsnorm", inner, op.src, op.params, attrs(**options, bits=16))
        return [norm, Op("quant", op.out, (inner,), (), attrs(group=group, hadamard=0))]
    epilogue = op.text("epilogue", "none") if op.kind == "linear" else "none"
    if epilogue == "add":
        inner = f"{op.out}.product"
        linear = Op("linear", inner, op.src[:1], op.params, _without(op, "epilogue"))
        return [linear, Op("add", op.out, (op.src[1], inner))]
    if epilogue == "swiglu":
        inner, gate, up = (f"{op.out}.{part}" for part in ("both", "gate", "up"))
        width = op.params[0].shape[0]
        linear = Op("linear", inner, op.src, op.params, _without(op, "epilogue"))
        cuts = [
            Op("slice", name, (inner,), (), attrs(start=start, width=width))
            for name, start in ((gate, 0), (up, width))
        ]
        return [linear, *cuts, Op("swiglu", op.out, (gate, up))]
    if op.kind == "attention" and len(op.src) == 1:
        return _plain_attention(op)
    return [op]


def _without(op: Op, name: str) -> tuple[tuple[str, int | float | str], ...]:
    return tuple((key, value) for key, value in op.attrs if key != name)


def _plain_attention(op: Op) -> list[Op]:
    dim, heads, kv = (op.integer(name) for name in ("head_dim", "heads", "kv_heads"))
    found: list[Op] = []
    sources = []
    start = 0
    for i, (part, count) in enumerate((("q", heads), ("k", kv), ("v", kv))):
        name = f"{op.out}.{part}"
        options = attrs(start=start, width=count * dim)
        found.append(Op("slice", name, op.src, (), options))
        start += count * dim
        if part != "v" and op.params:
            options = attrs(eps=op.number("eps"), heads=count, bits=16)
            found.append(Op("rmsnorm", f"{name}.normed", (name,), (op.params[i],), options))
            name = f"{name}.normed"
        if part != "v":
            found.append(Op("rope", f"{name}.turned", (name,), (), attrs(heads=count)))
            name = f"{name}.turned"
        sources.append(name)
    options = tuple((k, v) for k, v in op.attrs if k not in ("rope", "eps"))
    return [*found, replace(op, src=tuple(sources), params=(), attrs=options)]


def parts(graph: Graph) -> Parts:
    """Cut a plain graph. Raises UnsupportedModel where the layers are not alike."""
    ops = graph.ops
    at = [i for i, op in enumerate(ops) if op.kind == "attention"]
    if not at or ops[0].kind != "embed":
        raise UnsupportedModel("the chip runs models of an embedding and layers of attention")
    size = at[1] - at[0] if len(at) > 1 else _last_layer_end(ops, at[0]) - 1
    if any(ops[i].text("format", "i8") != "i8" for i in at):
        raise UnsupportedModel("the chip runs quantized graphs; use precision w8 or w4")
    layers: list[Layer] = []
    for i, place in enumerate(at):
        first = 1 + i * size
        body = ops[first : first + size]
        if place - first != at[0] - 1 or len(body) < size or not _alike(body, ops[1 : 1 + size]):
            raise UnsupportedModel(
                f"layer {i} is not built like layer 0; the chip needs equal ones"
            )
        source = layers[-1].output if layers else ops[0].out
        cut = place - first
        layers.append(Layer(body[:cut], body[cut], body[cut + 1 :], source, body[-1].out))
    return Parts(ops[0], tuple(layers), ops[1 + len(at) * size :], graph.output)


def _last_layer_end(ops: tuple[Op, ...], attention: int) -> int:
    """One after the second sum behind the attention: the end of the only layer."""
    sums = [i for i, op in enumerate(ops) if i > attention and op.kind == "add"]
    if len(sums) < 2:
        raise UnsupportedModel("a layer has two sums with the residual stream")
    return sums[1] + 1


def _alike(body: tuple[Op, ...], model: tuple[Op, ...]) -> bool:
    """Equal but for names, sources of weights, and the attributes that may differ."""
    may_differ = {"layer", "window"}

    def form(op: Op) -> object:
        options = tuple(item for item in op.attrs if item[0] not in may_differ)
        return op.kind, options, tuple((p.shape, p.format) for p in op.params)

    return [form(op) for op in body] == [form(op) for op in model]
