"""In: a Graph. Out: Plan: kernels, tasks and buffers, as plain data; no address is fixed yet.

Buffers are reused once their value is dead and every thread has passed a barrier since, because
without one a slow thread may still be reading.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from openlpu.errors import GraphError, UnsupportedModel
from openlpu.graph import Graph, Op, Value, types
from openlpu.graph.ops import weights_and_biases
from openlpu.host.kernels import (
    Attend,
    Attention,
    Elementwise,
    Embed,
    Install,
    Linear,
    Quant,
    Rmsnorm,
    RmsnormQuant,
    Rope,
    Rows,
    Slice,
    Spec,
)
from openlpu.host.layout import (
    FEW_ROWS,
    MAX_ROWS,
    Barrier,
    head_bytes,
    packed_format,
    padded,
    quantized_bytes,
)
from openlpu.numerics import CHUNK, GROUP
from openlpu.numerics.attention import softmax_factor

MAX_GROUP = 32  # query heads on one key head


@dataclass(frozen=True, slots=True)
class Arg:
    """One task argument: buffer NAME (plus offset), part of the weights of op NAME, or a number."""

    kind: str  # value, weights, scales, minima, biases, queries, number
    name: str = ""
    offset_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """A kernel, its arguments in the kernel's order, and the barrier after it."""

    spec: Spec
    args: tuple[Arg, ...]
    barrier: Barrier
    wanted: bool
    op: str  # name of the op's result


@dataclass(frozen=True, slots=True)
class Plan:
    """slots: byte size of each buffer; place: value -> slot. The output has no slot: every step
    writes fresh memory. states: Graph.states, which the first `states_tasks` tasks make."""

    tasks: tuple[Task, ...]
    slots: tuple[int, ...]
    place: dict[str, int]
    output: str
    output_width: int
    states: str
    states_width: int
    states_tasks: int
    query_bytes: int
    layers: int
    kv_head_bytes: int  # of one layer: all its kv heads in one page
    kv_heads: int
    head_dim: int
    chunk: int
    part_bytes: int

    @property
    def specs(self) -> list[Spec]:
        """Distinct kernels, in order of first use."""
        return list(dict.fromkeys(task.spec for task in self.tasks))


@dataclass
class _Memory:
    """Slots with a free list by size."""

    sizes: list[int] = field(default_factory=list)
    free: dict[int, list[int]] = field(default_factory=dict)

    def take(self, size: int) -> int:
        spare = self.free.get(size)
        if spare:
            return spare.pop()
        self.sizes.append(size)
        return len(self.sizes) - 1

    def give(self, slot: int) -> None:
        self.free.setdefault(self.sizes[slot], []).append(slot)


def value_bytes(value: Value, threads: int) -> int:
    """Memory of one value for MAX_ROWS rows (quantized ones: also a copy for each thread)."""
    if value.kind == "f32":
        return MAX_ROWS * padded(value.width) * 4
    rows = max(MAX_ROWS, FEW_ROWS * threads)
    return rows * quantized_bytes(value.width, GROUP if value.kind == "g8" else 0)


def _value(name: str, offset_bytes: int = 0) -> Arg:
    return Arg("value", name, offset_bytes)


def _number(value: int) -> Arg:
    return Arg("number", "", value)


def _tasks_of(op: Op, known: dict[str, Value]) -> list[Task]:
    """Lower one op. Unsupported formats are refused by name."""
    out, source = known[op.out], known[op.src[0]]
    wanted = out.rows == "L"

    def task(spec: Spec, *args: Arg, barrier: Barrier = Barrier.ALWAYS) -> Task:
        return Task(spec, (_value(op.out), *args), barrier, wanted, op.out)

    x = _value(op.src[0])
    width = source.width
    gain = bool(op.params) and op.kind in ("rmsnorm", "rmsnorm_quant")
    match op.kind:
        case "embed":
            block_format = op.params[0].format
            if block_format == "f32":
                raise _float(op)
            spec: Spec = Embed(out.width, block_format)
            return [task(spec, *(Arg(part, op.out) for part in ("weights", "scales", "minima")))]
        case "rmsnorm":
            if op.integer("bits", 16) != 16:
                raise _float(op)
            spec = Rmsnorm(width, op.integer("heads", 1), op.number("eps"), gain)
            return [task(spec, x, Arg("biases", op.out))]
        case "rmsnorm_quant":
            spec = RmsnormQuant(width, op.integer("group", 0), op.number("eps"), gain)
            return [task(spec, x, Arg("biases", op.out), barrier=Barrier.MANY_ROWS)]
        case "quant":
            spec = Quant(width, op.integer("group", 0), op.integer("hadamard", 0) == 16)
            return [task(spec, x, barrier=Barrier.MANY_ROWS)]
        case "add" | "swiglu":
            return [task(Elementwise(width, op.kind), x, _value(op.src[1]))]
        case "slice":
            return [task(Slice(width, op.integer("start"), out.width), x)]
        case "rope":
            return [task(Rope(width, op.integer("heads")), x)]
        case "rows":
            return [task(Rows(width), x)]
        case "linear":
            return [_linear(op, source, out, task)]
        case "attention":
            return _attention(op, task)
    raise GraphError(f"the host engine has no kernel for {op.kind} %{op.out}")


def _float(op: Op) -> GraphError:
    return GraphError(
        f"{op.kind} %{op.out} is in floating point, which no contract covers; "
        "the reference runs it, the host engine runs quantized graphs"
    )


def _linear(op: Op, source: Value, out: Value, task: object) -> Task:
    assert callable(task)
    if source.kind == "f32":
        raise _float(op)
    weight_at, bias_at = weights_and_biases(op)
    weights = [op.params[i] for i in weight_at]
    blocks = padded(sum(w.shape[0] for w in weights)) // 16
    epilogue = op.text("epilogue", "none")
    spec = Linear(
        source.width,
        blocks,
        out.width,
        epilogue,
        bool(bias_at),
        packed_format(op.out, (w.format for w in weights)),
    )
    residual = _value(op.src[1]) if epilogue == "add" else _number(0)
    parts = [Arg(part, op.out) for part in ("weights", "scales", "biases")]
    result = task(spec, _value(op.src[0]), *parts, residual, Arg("minima", op.out))
    assert isinstance(result, Task)
    return result


def _attention(op: Op, task: object) -> list[Task]:
    assert callable(task)
    if op.text("format", "i8") != "i8":
        raise _float(op)
    heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
    dim = op.integer("head_dim")
    if heads > MAX_GROUP * kv_heads:  # kernels are unrolled over the group
        raise UnsupportedModel(
            f"{heads} query heads share {kv_heads} key heads; the host engine takes up to "
            f"{MAX_GROUP} for each"
        )
    fused = len(op.src) == 1
    shape = (
        heads,
        kv_heads,
        dim,
        softmax_factor(dim),
        op.integer("window", 0),
        op.integer("chunk", CHUNK),
        fused,
        op.number("eps") if op.params else None,
    )
    if fused:
        starts = (0, heads * dim * 4, (heads + kv_heads) * dim * 4)
        sources = [_value(op.src[0], start) for start in starts]
    else:
        sources = [_value(name) for name in op.src]
    args = [
        *sources,
        Arg("queries"),
        _number(op.integer("layer")),
        Arg("biases", op.out),
        Arg("biases", op.out, dim * 4),
    ]
    return [
        task(Install(*shape), *args, barrier=Barrier.SHARED_KV),
        task(Attend(*shape), *args),
    ]


def make_plan(graph: Graph, threads: int) -> Plan:
    """Lower a quantized graph; GraphError names what the host cannot run."""
    known = dict(types(graph))
    tasks = [task for op in graph.ops for task in _tasks_of(op, known)]
    attentions = [t.spec for t in tasks if isinstance(t.spec, Attention)]
    if not attentions:
        raise GraphError("the graph has no attention")
    first = attentions[0]
    if any((a.kv_heads, a.head_dim) != (first.kv_heads, first.head_dim) for a in attentions):
        raise GraphError("layers with different K/V shapes are not supported by the host engine")
    place, memory = _place(graph, tasks, known, threads)
    states = graph.states
    return Plan(
        tasks=tuple(tasks),
        slots=tuple(memory.sizes),
        place=place,
        output=graph.output,
        output_width=known[graph.output].width,
        states=states,
        states_width=known[states].width if states else 0,
        states_tasks=1 + max((i for i, task in enumerate(tasks) if task.op == states), default=-1),
        query_bytes=MAX_ROWS * max(a.heads * a.query_bytes for a in attentions),
        layers=max(op.integer("layer") for op in graph.ops if op.kind == "attention") + 1,
        kv_head_bytes=first.kv_heads * head_bytes(first.head_dim),
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        chunk=min(a.chunk for a in attentions),
        part_bytes=max(a.part_bytes for a in attentions),
    )


def _place(
    graph: Graph, tasks: list[Task], known: dict[str, Value], threads: int
) -> tuple[dict[str, int], _Memory]:
    last_use: dict[str, int] = {}
    for index, task in enumerate(tasks):
        for arg in task.args:
            if arg.kind == "value":
                last_use[arg.name] = index
    memory, place = _Memory(), {}
    dying: list[str] = []
    for index, task in enumerate(tasks):
        out = task.args[0].name
        if out != graph.output and out not in place:
            place[out] = memory.take(value_bytes(known[out], threads))
        dying += [name for name, last in last_use.items() if last == index and name in place]
        if task.barrier is Barrier.ALWAYS:
            for name in dying:
                memory.give(place[name])
            dying.clear()
    return place, memory
