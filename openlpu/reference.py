"""In: a Graph, a TensorSource and Batches. Out: logits: the slow, exact meaning of every op.

Whole rows of numpy, one op after the other, nothing fused: a fused op is the composition of the
plain ones. Every engine is compared with this file bit for bit. Formats f32 are the float model:
BLAS products, plain softmax; their last bits are the machine's and no part of the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import GraphError, RequestError
from openlpu.graph import Batch, F32Tensor, Graph, GroupedTensor, Op, Param, RowTensor, Tensor
from openlpu.graph.ops import types, weights_and_biases
from openlpu.graph.tensors import TensorSource
from openlpu.numerics import CHUNK, GROUP
from openlpu.numerics.attention import attend, softmax_factor
from openlpu.numerics.functions import hadamard_blocks, rmsnorm, swiglu
from openlpu.numerics.quant import F32, I8, grouped_linear, linear, quantize, quantize_groups
from openlpu.numerics.rope import cos_sin, rotate

_ROWS_AT_ONCE = 256  # attention rows; keeps temporaries in cache, never changes bits
_WEIGHTS_AT_ONCE = 1 << 19  # weights widened to float32 at once when rows are few
_SUMS_AT_ONCE = 1 << 17  # grouped sums at once
_PATIENT_ROWS = 16  # up to here widening costs more than multiplying


@dataclass(frozen=True, slots=True)
class Quantized:
    """A q8 or g8 value: int8 [R, W]; scale float32 [R], or [R, W / GROUP]."""

    q: I8
    scale: F32


Known = F32 | Quantized | NDArray[np.int32]


@dataclass(slots=True)
class _Positions:
    """Keys and values of one layer of one sequence, by position; arrays double as they fill.

    parts: per name an array [capacity, ...].
    """

    length: int = 0
    parts: dict[str, NDArray[Any]] = field(default_factory=dict)

    def put(self, first: int, values: dict[str, NDArray[Any]]) -> None:
        """Write values [n, ...] from position `first` on; what stood behind them is forgotten."""
        count = next(iter(values.values())).shape[0]
        for name, value in values.items():
            old = self.parts.get(name)
            if old is None or old.shape[0] < first + count:
                capacity = max(64, 2 * (first + count))
                grown = np.zeros((capacity, *value.shape[1:]), value.dtype)
                if old is not None:
                    grown[: self.length] = old[: self.length]
                self.parts[name] = grown
            self.parts[name][first : first + count] = value
        self.length = first + count


class Reference:
    """Runs any legal Graph. Keeps the keys and values of every (layer, slot).

    keep: whether tensors stay in memory once they were asked for.
    """

    def __init__(self, graph: Graph, source: TensorSource, *, keep: bool = True) -> None:
        types(graph)
        self.graph = graph
        self._source = source
        self._keep = keep
        self._tensors: dict[Param, Tensor] = {}
        self._kept: dict[tuple[int, int], _Positions] = {}

    def reset(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        for key in [key for key in self._kept if key[1] == slot]:
            del self._kept[key]

    def step(self, batch: Batch) -> F32:
        """Logits float32 [L, V] of the wanted rows. batch.pages is not read.

        A sequence may also go back: rows at positions it already has replace them and all later
        ones. Raises RequestError when a sequence would have a gap.
        """
        return self._value(self.graph.output, batch)

    def states(self, batch: Batch) -> F32:
        """The residual stream float32 [L, D] of the wanted rows, before the last norm."""
        return self._value(self.graph.states, batch)

    def watch(self, batch: Batch, seen: Callable[[Op, Sequence[Known]], None]) -> None:
        """Run a step; `seen` is told each op and the values of its sources before it runs."""
        self._value(self.graph.output, batch, seen)

    def _value(
        self,
        wanted: str,
        batch: Batch,
        seen: Callable[[Op, Sequence[Known]], None] | None = None,
    ) -> F32:
        """One value of the step; ops behind it do not run."""
        known: dict[str, Known] = {"tokens": batch.tokens}
        last_use = {name: i for i, op in enumerate(self.graph.ops) for name in op.src}
        # A poisoned row (NaN scale) passes through casts of NaN; the contract says what it yields.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for i, op in enumerate(self.graph.ops):
                src = [known[name] for name in op.src]
                if seen:
                    seen(op, src)
                known[op.out] = self._run(op, src, batch)
                if op.out == wanted:
                    return _f32(known[wanted])
                for name in op.src:
                    if last_use[name] == i:
                        known.pop(name, None)
        raise GraphError(f"the graph makes no value {wanted!r}")

    def _run(self, op: Op, src: list[Known], batch: Batch) -> Known:
        match op.kind:
            case "embed":
                return self._embed(op, np.asarray(src[0], np.int32))
            case "rmsnorm":
                return self._rmsnorm(op, _f32(src[0]))
            case "quant":
                return _quant(op, _f32(src[0]))
            case "rmsnorm_quant":
                return _quant(op, self._rmsnorm(op, _f32(src[0])))
            case "linear":
                return self._linear(op, src)
            case "slice":
                start = op.integer("start")
                return np.ascontiguousarray(_f32(src[0])[:, start : start + op.integer("width")])
            case "rope":
                return self._rope(_f32(src[0]), batch.positions, heads=op.integer("heads"))
            case "attention":
                return self._attention(op, [_f32(value) for value in src], batch)
            case "swiglu":
                return swiglu(_f32(src[0]), _f32(src[1]))
            case "add":
                return _f32(src[0]) + _f32(src[1])
            case "rows":
                return _rows(src[0], batch.wanted)
        raise GraphError(f"the reference has no meaning for op {op.kind!r}")

    def _tensor(self, param: Param) -> Tensor:
        if not self._keep:
            return self._source.whole(param)
        key = replace(param, name="")  # a tied head and its table may be one tensor
        if key not in self._tensors:
            self._tensors[key] = self._source.whole(param)
        return self._tensors[key]

    def _vector(self, param: Param) -> F32:
        tensor = self._tensor(param)
        assert isinstance(tensor, F32Tensor), param
        return tensor.value

    def _embed(self, op: Op, tokens: NDArray[np.int32]) -> F32:
        table = self._tensor(op.params[0])
        if isinstance(table, F32Tensor):
            return table.value[tokens]
        q = table.q[tokens].astype(np.float32)
        if isinstance(table, RowTensor):
            return q * table.scale[tokens][:, None]
        grouped = q.reshape(q.shape[0], -1, GROUP) * table.scale[tokens][:, :, None]
        if table.minimum is not None:
            grouped = grouped + table.minimum[tokens][:, :, None]
        return grouped.reshape(q.shape)

    def _rmsnorm(self, op: Op, x: F32) -> F32:
        gain = self._vector(op.params[0]) if op.params else None
        heads, eps = op.integer("heads", 1), op.number("eps")
        if op.integer("bits", 16) == 16:
            return rmsnorm(x, gain, eps=eps, heads=heads)
        return _float_rmsnorm(x, gain, eps=eps, heads=heads)

    def _linear(self, op: Op, src: list[Known]) -> F32:
        weights, biases = weights_and_biases(op)
        parts = [
            self._product(src[0], op.params[w], op.params[biases[i]] if biases else None)
            for i, w in enumerate(weights)
        ]
        match op.text("epilogue", "none"):
            case "swiglu":
                return swiglu(parts[0], parts[1])
            case "add":
                return np.concatenate(parts, axis=1) + _f32(src[1])
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def _product(self, x: Known, weight: Param, bias_param: Param | None) -> F32:
        tensor = self._tensor(weight)
        bias = None if bias_param is None else self._vector(bias_param)
        if isinstance(tensor, F32Tensor):
            y: F32 = _f32(x) @ tensor.value.T
            return y if bias is None else y + bias
        assert isinstance(x, Quantized)
        rows, (outputs, width) = x.q.shape[0], tensor.q.shape
        at_once = outputs if rows > _PATIENT_ROWS else max(1, _WEIGHTS_AT_ONCE // width)
        if isinstance(tensor, GroupedTensor):  # many passes over the sums: keep them in cache
            at_once = min(at_once, max(64, _SUMS_AT_ONCE // max(rows, 1)))
        out = np.empty((rows, outputs), np.float32)
        for start in range(0, outputs, at_once):
            part = slice(start, start + at_once)
            some_bias = None if bias is None else bias[part]
            if isinstance(tensor, RowTensor):
                w = tensor.q[part], tensor.scale[part]
                out[:, part] = linear(x.q, x.scale, *w, bias=some_bias)
            else:
                minimum = None if tensor.minimum is None else tensor.minimum[part]
                g = tensor.q[part], tensor.scale[part], minimum
                out[:, part] = grouped_linear(x.q, x.scale, *g, group=GROUP, bias=some_bias)
        return out

    def _rope(self, x: F32, positions: NDArray[np.int32], *, heads: int) -> F32:
        table = self.graph.rope
        frequency = np.array(table.turns, np.uint64)
        cosine, sine = cos_sin(frequency, positions.astype(np.int64), magnitude=table.magnitude)
        return rotate(x, cosine, sine, heads=heads)

    def _attention(self, op: Op, src: list[F32], batch: Batch) -> F32:
        heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
        q, k, v = src if len(src) == 3 else self._unfused(op, src[0], batch)
        dim = op.integer("head_dim")
        q = q.reshape(-1, kv_heads, heads // kv_heads, dim)
        k, v = k.reshape(-1, kv_heads, dim), v.reshape(-1, kv_heads, dim)
        out = np.empty_like(q)
        for slot in np.unique(batch.slots):
            at = np.flatnonzero(batch.slots == slot)
            positions = batch.positions[at].astype(np.int64)
            kept = self._kept.setdefault((op.integer("layer"), int(slot)), _Positions())
            if positions[0] > kept.length or (np.diff(positions) != 1).any():
                raise RequestError(
                    f"the rows of sequence {slot} do not continue its {kept.length} positions; "
                    "send every position once, in order"
                )
            kept.put(int(positions[0]), _kept_parts(op, k[at], v[at]))
            for first in range(0, len(at), _ROWS_AT_ONCE):
                some = slice(first, first + _ROWS_AT_ONCE)
                out[at[some]] = _attend_heads(op, q[at[some]], positions[some], kept)
        return out.reshape(-1, heads * dim)

    def _unfused(self, op: Op, qkv: F32, batch: Batch) -> tuple[F32, F32, F32]:
        """The fused source as q and k, normed per head (if there are gains) and turned, and v."""
        dim = op.integer("head_dim")
        counts = (op.integer("heads"), op.integer("kv_heads"))
        ends = np.cumsum([count * dim for count in counts])
        parts = np.split(qkv, ends, axis=1)
        turned = []
        for i, heads in enumerate(counts):
            x = np.ascontiguousarray(parts[i])
            if op.params:
                normed = rmsnorm if op.text("format", "i8") == "i8" else _float_rmsnorm
                x = normed(x, self._vector(op.params[i]), eps=op.number("eps"), heads=heads)
            turned.append(self._rope(x, batch.positions, heads=heads))
        return turned[0], turned[1], np.ascontiguousarray(parts[2])


def _f32(value: Known) -> F32:
    assert isinstance(value, np.ndarray)
    return value.astype(np.float32, copy=False)


def _rows(value: Known, wanted: NDArray[np.int32]) -> Known:
    if isinstance(value, Quantized):
        return Quantized(value.q[wanted], value.scale[wanted])
    return value[wanted]


def _quant(op: Op, x: F32) -> Quantized:
    if op.integer("hadamard", 0):
        x = hadamard_blocks(x)
    group = op.integer("group", 0)
    return Quantized(*(quantize_groups(x, group=group) if group else quantize(x)))


def _float_rmsnorm(x: F32, gain: F32 | None, *, eps: float, heads: int) -> F32:
    """The float model's norm: float64 inside, rounded once. [R, W] -> [R, W]."""
    wide = x.astype(np.float64).reshape(x.shape[0], heads, -1)
    y = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps)
    if gain is not None:
        y = y * gain
    rounded: F32 = y.reshape(x.shape).astype(np.float32)
    return rounded


def _kept_parts(op: Op, k: F32, v: F32) -> dict[str, NDArray[Any]]:
    """What attention keeps of new keys and values [n, kv_heads, d] in its format."""
    if op.text("format", "i8") == "f32":
        return {"k": k, "v": v}
    (k_q, k_scale), (v_q, v_scale) = quantize(k), quantize(v)
    return {"k": k_q, "k_scale": k_scale, "v": v_q, "v_scale": v_scale}


def _attend_heads(op: Op, q: F32, positions: NDArray[np.int64], kept: _Positions) -> F32:
    """q [r, kv_heads, share, d] over the kept positions -> same shape.

    The query heads that share a key head are rows beside each other: rows are alone."""
    rows, kv_heads, share, dim = q.shape
    repeated = np.repeat(positions, share)
    factor, window = softmax_factor(dim), op.integer("window", 0)
    out = np.empty_like(q)
    for head in range(kv_heads):
        mine = np.ascontiguousarray(q[:, head]).reshape(rows * share, dim)
        parts = {name: part[: kept.length, head] for name, part in kept.parts.items()}
        if op.text("format", "i8") == "f32":
            y = _float_attend(mine, parts["k"], parts["v"], repeated, window=window)
        else:
            y = attend(
                *quantize(mine),
                parts["k"],
                parts["k_scale"],
                parts["v"],
                parts["v_scale"],
                repeated,
                factor=factor,
                window=window,
                chunk=op.integer("chunk", CHUNK),
            )
        out[:, head] = y.reshape(rows, share, dim)
    return out


def _float_attend(q: F32, k: F32, v: F32, positions: NDArray[np.int64], *, window: int) -> F32:
    """Softmax attention in float32: q [R, d], k and v [T, d] -> [R, d]."""
    end = int(positions.max()) + 1
    j = np.arange(end)[None, :]
    hidden = j > positions[:, None]
    if window:
        hidden |= j <= positions[:, None] - window
    scores = (q @ k[:end].T) * np.float32(1.0 / np.sqrt(q.shape[1]))
    scores[hidden] = -np.inf
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    y: F32 = (e @ v[:end]) / e.sum(axis=1, keepdims=True)
    return y
