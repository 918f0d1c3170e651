"""In: an Op and the types of its sources. Out: the type of its result, or GraphError.

The table OPS is the list of what may stand in a graph. Each entry says what the op means; the
exact bits are in openlpu.reference and openlpu.numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from openlpu.errors import GraphError
from openlpu.graph.ir import Graph, Op, Value
from openlpu.numerics import CHUNK, GROUP, MAX_K, SUPERLANE

BLOCK_FORMATS = ("q8_0", "q4_0", "q4_1")


@dataclass(frozen=True)
class OpKind:
    """meaning: one line for the manual. attrs: the allowed attribute names."""

    meaning: str
    attrs: frozenset[str]
    infer: Callable[[Op, tuple[Value, ...]], Value]


def _demand(condition: bool, op: Op, what: str) -> None:
    if not condition:
        raise GraphError(f"{op.kind} %{op.out}: {what}")


def _embed(op: Op, src: tuple[Value, ...]) -> Value:
    _demand(len(src) == 1 and src[0].kind == "ids", op, "takes token ids")
    _demand(len(op.params) == 1 and len(op.params[0].shape) == 2, op, "takes one table [V, D]")
    return Value("f32", src[0].rows, op.params[0].shape[1])


def _same(op: Op, src: tuple[Value, ...]) -> Value:
    _demand(len(src) == 2 and src[0] == src[1], op, "takes two equal f32 matrices")
    _demand(src[0].kind == "f32", op, "takes f32")
    return src[0]


def _rows(op: Op, src: tuple[Value, ...]) -> Value:
    _demand(len(src) == 1 and src[0].rows == "R", op, "takes one matrix over R")
    return Value(src[0].kind, "L", src[0].width)


def _check_norm(op: Op, src: tuple[Value, ...]) -> None:
    _demand(len(src) == 1 and src[0].kind == "f32", op, "takes one f32 matrix")
    heads = op.integer("heads", 1)
    _demand(heads > 0 and src[0].width % heads == 0, op, "width is not a multiple of heads")
    for gain in op.params:
        _demand(gain.shape == (src[0].width // heads,), op, f"gain {gain.name} has another width")
    _demand(len(op.params) <= 1, op, "takes at most one gain")
    _demand(op.number("eps") >= 0, op, "eps is negative")


def _rmsnorm(op: Op, src: tuple[Value, ...]) -> Value:
    _check_norm(op, src)
    _demand(op.integer("bits", 16) in (16, 64), op, "bits is 16 (contract) or 64 (float)")
    return src[0]


def _quantized(op: Op, src: Value) -> Value:
    group = op.integer("group", 0)
    _demand(group in (0, GROUP), op, f"group is 0 (whole row) or {GROUP}")
    _demand(not group or src.width % group == 0, op, "width is not a multiple of the group")
    return Value("g8" if group else "q8", src.rows, src.width)


def _quant(op: Op, src: tuple[Value, ...]) -> Value:
    _demand(len(src) == 1 and src[0].kind == "f32", op, "takes one f32 matrix")
    hadamard = op.integer("hadamard", 0)
    _demand(hadamard in (0, SUPERLANE), op, f"hadamard is 0 or {SUPERLANE}")
    _demand(not hadamard or src[0].width % hadamard == 0, op, "width is not a multiple of 16")
    return _quantized(op, src[0])


def _rmsnorm_quant(op: Op, src: tuple[Value, ...]) -> Value:
    _check_norm(op, src)
    return _quantized(op, src[0])


def weights_and_biases(op: Op) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices into a linear's params: its weights, and its biases in the same order (or none)."""
    count = op.integer("weights", 1)
    return tuple(range(count)), tuple(range(count, len(op.params)))


def _linear(op: Op, src: tuple[Value, ...]) -> Value:
    _demand(bool(src), op, "takes a source")
    _demand(op.integer("weights", 1) > 0, op, "has no weights")
    weight_at, bias_at = weights_and_biases(op)
    _demand(len(weight_at) <= len(op.params), op, "has fewer params than weights")
    weights = [op.params[i] for i in weight_at]
    biases = [op.params[i] for i in bias_at]
    _demand(len(biases) in (0, len(weights)), op, "has a bias for some weights only")
    x = src[0]
    meets = {"f32": ("f32",), "q8": ("w8",), "g8": BLOCK_FORMATS}.get(x.kind, ())
    for weight in weights:
        name = weight.name
        _demand(len(weight.shape) == 2, op, f"{name} is not a matrix")
        _demand(weight.shape[1] == x.width, op, f"{name} has K {weight.shape[1]}, not {x.width}")
        _demand(weight.format in meets, op, f"{name} is {weight.format}, its source {x.kind}")
        _demand(weight.format == "f32" or x.width <= MAX_K, op, f"K is above {MAX_K}")
    for weight, bias in zip(weights, biases, strict=False):
        _demand(bias.shape == weight.shape[:1], op, f"{bias.name} does not fit {weight.name}")
    width = sum(weight.shape[0] for weight in weights)
    epilogue = op.text("epilogue", "none")
    if epilogue == "swiglu":
        _demand(len(weights) == 2 and len(src) == 1, op, "swiglu takes gate and up")
        _demand(weights[0].shape == weights[1].shape, op, "gate and up differ in shape")
        width //= 2
    elif epilogue == "add":
        _demand(len(src) == 2, op, "add takes the residual as second source")
        _demand(src[1] == Value("f32", x.rows, width), op, "the residual has another type")
    else:
        _demand(epilogue == "none" and len(src) == 1, op, "epilogue is none, add or swiglu")
    return Value("f32", x.rows, width)


def _slice(op: Op, src: tuple[Value, ...]) -> Value:
    start, width = op.integer("start"), op.integer("width")
    _demand(len(src) == 1 and src[0].kind == "f32", op, "takes one f32 matrix")
    _demand(start >= 0 and width > 0 and start + width <= src[0].width, op, "reaches outside")
    return Value("f32", src[0].rows, width)


def _rope(op: Op, src: tuple[Value, ...]) -> Value:
    heads = op.integer("heads")
    _demand(len(src) == 1 and src[0].kind == "f32", op, "takes one f32 matrix")
    _demand(heads > 0 and src[0].width % (2 * heads) == 0, op, "width is no multiple of 2 heads")
    return src[0]


def _attention(op: Op, src: tuple[Value, ...]) -> Value:
    heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
    dim = op.integer("head_dim")
    _demand(heads > 0 and kv_heads > 0 and dim > 0, op, "has no heads")
    _demand(heads % kv_heads == 0, op, "heads is not a multiple of kv_heads")
    _demand(op.text("format", "i8") in ("i8", "f32"), op, "format is i8 or f32")
    chunk = op.integer("chunk", CHUNK)
    _demand(chunk > 0 and chunk % 64 == 0, op, "chunk is not a multiple of 64")
    _demand(op.integer("window", 0) >= 0, op, "window is negative")
    widths = (heads * dim, kv_heads * dim, kv_heads * dim)
    if len(src) == 1:  # q, k and v in one matrix, rope (and head norms) included
        _demand(src[0].width == sum(widths), op, "the fused source has another width")
        _demand(op.integer("rope") == 1, op, "a fused source needs rope=1")
    else:
        _demand(tuple(v.width for v in src) == widths, op, "q, k, v have other widths")
    _demand(all(v.kind == "f32" for v in src), op, "takes f32")
    for gain in op.params:
        _demand(gain.shape == (dim,), op, f"{gain.name} is not a head gain")
    _demand(len(op.params) in (0, 2), op, "takes no gain or the gains of q and k")
    _demand(not op.params or len(src) == 1, op, "head gains stand in the fused form only")
    return Value("f32", src[0].rows, widths[0])


def _swiglu(op: Op, src: tuple[Value, ...]) -> Value:
    return _same(op, src)


OPS: dict[str, OpKind] = {
    "embed": OpKind("row of a table per token", frozenset(), _embed),
    "rmsnorm": OpKind(
        "x / sqrt(mean(x**2) + eps) (* gain), per head",
        frozenset({"eps", "heads", "bits"}),
        _rmsnorm,
    ),
    "quant": OpKind(
        "int8 with a scale per row or group, after an optional Hadamard of 16",
        frozenset({"group", "hadamard"}),
        _quant,
    ),
    "rmsnorm_quant": OpKind(
        "rmsnorm, then quant", frozenset({"eps", "heads", "group"}), _rmsnorm_quant
    ),
    "linear": OpKind(
        "x W^T (+ bias) for one or more weights side by side; then + residual, or swiglu",
        frozenset({"weights", "epilogue"}),
        _linear,
    ),
    "slice": OpKind("columns start .. start+width", frozenset({"start", "width"}), _slice),
    "rope": OpKind("rotary position on each head", frozenset({"heads"}), _rope),
    "attention": OpKind(
        "append k and v to the sequence, attend causally (within window, if any)",
        frozenset(
            {"layer", "heads", "kv_heads", "head_dim", "window", "format", "chunk", "rope", "eps"}
        ),
        _attention,
    ),
    "swiglu": OpKind("silu(gate) * up", frozenset(), _swiglu),
    "add": OpKind("sum of two matrices", frozenset(), _same),
    "rows": OpKind("the rows whose logits are wanted", frozenset(), _rows),
}


def infer(op: Op, src: tuple[Value, ...]) -> Value:
    """Type of op's result; raises GraphError when the op is malformed."""
    if op.kind not in OPS:
        raise GraphError(f"unknown op {op.kind!r}; known: {', '.join(OPS)}")
    unknown = {name for name, _ in op.attrs} - OPS[op.kind].attrs
    _demand(not unknown, op, f"unknown attributes {sorted(unknown)}")
    return OPS[op.kind].infer(op, src)


def admit(op: Op, known: dict[str, Value]) -> None:
    """Add the type of op's result to the types of the ops before it, or raise GraphError."""
    if op.out in known:
        raise GraphError(f"%{op.out} is defined twice")
    for name in op.src:
        if name not in known:
            raise GraphError(f"{op.kind} %{op.out} uses %{name} before it is defined")
    known[op.out] = infer(op, tuple(known[name] for name in op.src))


def inputs() -> dict[str, Value]:
    """The types of what every graph begins with."""
    return {"tokens": Value("ids", "R", 1)}


def types(graph: Graph) -> Mapping[str, Value]:
    """Type of every value of the graph; raises GraphError where shapes or kinds do not meet."""
    known = inputs()
    for op in graph.ops:
        admit(op, known)
    if known.get(graph.output, Value("", "", 0)).kind != "f32":
        raise GraphError(f"the output %{graph.output} is not a defined f32 value")
    return known
