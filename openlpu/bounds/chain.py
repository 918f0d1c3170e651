"""In: a Graph in plain ops, a Chip, the step's sizes. Out: ChainBound, the longest way through it.

Each op takes at least the cycles that its operations need in a row on this machine, whatever the
schedule; docs/bounds.md argues op by op. Cycle 0 is the step's first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from openlpu.bounds import work
from openlpu.bounds.rows import Reader, Tail, Value, later, row_trips, together, wait, whole
from openlpu.bounds.trips import alone, reach, spread, trips
from openlpu.bounds.work import Latencies, Shape, latencies
from openlpu.chip import Chip
from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op
from openlpu.numerics.functions import EXP2_COEFFICIENTS

_LONG_AGO = -(1 << 40)
_HORNER = 2 * len(EXP2_COEFFICIENTS)
_TO_SQUARES = 5  # product, to an integer, its high byte, a product, joined


@dataclass(frozen=True, slots=True)
class Bound:
    """An op. latency_cycles: the least from all it reads to all it makes, for one row. work_cycles:
    the least for all rows in the unit that has most to do. end_cycle: in this graph its result is
    not whole before."""

    op: str
    latency_cycles: int
    work_cycles: int
    end_cycle: int
    why: str

    @property
    def cycles(self) -> int:
        return max(self.latency_cycles, self.work_cycles)


@dataclass(frozen=True, slots=True)
class ChainBound:
    """bounds: every op of the graph that computes, in its order. path: those on the longest way,
    after the input that it begins with, if that is not made by an op."""

    cycles: int
    bounds: tuple[Bound, ...]
    path: tuple[str, ...]

    def of(self, op: str) -> Bound:
        return next(bound for bound in self.bounds if bound.op == op)


def chain_bound(
    graph: Graph,
    chip: Chip,
    shape: Shape,
    *,
    inputs: Mapping[str, int] | None = None,
    dense: bool = False,
) -> ChainBound:
    """inputs: values that lie in memory when the step begins, with their widths. dense: only of
    schedules that keep rows dense (docs/bounds.md, section 7). Raises UnsupportedModel."""
    return _Chain(graph, chip, shape, dict(inputs or {}), dense).run()


class _Chain:
    """Walks the ops once; values by name."""

    def __init__(
        self, graph: Graph, chip: Chip, shape: Shape, inputs: dict[str, int], dense: bool
    ) -> None:
        self.graph, self.chip, self.shape, self.dense = graph, chip, shape, dense
        self.l: Latencies = latencies(chip)
        self.ways = trips(chip)
        self.widths = work.widths(graph, inputs)
        self.readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.src:
                self.readers.setdefault(name, []).append(op)
        # A word from the nearest slice.
        fetched = chip.latency.mem_read + 1
        self.values = {name: Value(fetched, 0, 0) for name in inputs}
        self.bytes: dict[str, int] = {}  # q8 values: when their last byte may leave the VXM
        self.ends: dict[str, int] = dict.fromkeys(inputs, fetched)

    def run(self) -> ChainBound:
        bounds, before = [], dict[str, str]()
        whole_of: dict[str, str] = {}  # a slice stands for what it is cut from
        for op in self.graph.ops:
            latency, why = self._op(op)
            known = [whole_of.get(name, name) for name in op.src if name in self.ends]
            latest = max(known, key=lambda name: self.ends[name], default="")
            if op.kind in ("slice", "rows"):
                whole_of[op.out] = latest
                continue
            if latest:
                before[op.out] = latest
            bounds.append(Bound(op.out, latency, self._work(op), self.ends[op.out], why))
        # Into the nearest slice, and there for good.
        cycles = self.ends[self.graph.output] + 1 + self.chip.latency.mem_write
        name = whole_of.get(self.graph.output, self.graph.output)
        path = [name]
        while name in before:
            name = before[name]
            path.append(name)
        return ChainBound(cycles, tuple(bounds), tuple(reversed(path)))

    def _work(self, op: Op) -> int:
        chip, rows = self.chip, self.shape.rows
        busy = work.lane_operations(op, self.widths[op.out], self.shape)
        cycles = -(-busy // (chip.lanes * chip.alus))
        if op.kind == "linear":
            outputs, inputs = work.matrix(op)
            acts = -(-rows * outputs * inputs // (chip.planes * chip.lanes**2))
            loads = -(-outputs * inputs // (chip.planes * chip.install_streams * chip.lanes))
            cycles = max(cycles, acts, loads)
        return cycles

    def _op(self, op: Op) -> tuple[int, str]:
        """Enter what the op makes; its least latency and why."""
        l = self.l
        match op.kind:
            case "embed":
                # Where the row lies is read first; integer to float, times the scale.
                first = 2 * self.chip.latency.mem_read + 1 + l.convert + l.product
                self._know(op.out, Value(first, 2, l.convert + l.product))
                return first, "address, row, to float, times scale"
            case "rows":
                self._same(op)
                return 0, "the same"
            case "slice":
                value, width = self.values[op.src[0]], op.integer("width")
                tails = tuple(replace(t, outputs=min(t.outputs, width)) for t in value.tails)
                self._know(op.out, replace(value, tails=tails))
                return 0, "some columns"
            case "add":
                a, b = sorted((self.values[name] for name in op.src), key=lambda v: v.first)
                joined = replace(b, first=max(b.first, whole(self.chip, a)))
                self._know(op.out, later(joined, l.sum, 1))
                return l.sum, "a sum"
            case "rope":
                self._know(op.out, later(self.values[op.src[0]], l.product + l.sum, 3))
                return l.product + l.sum, "product, sum"
            case "swiglu":
                gate, up = (self.values[name] for name in op.src)
                gate = later(gate, l.silu, _HORNER + 7)
                self._know(op.out, later(together(gate, up), l.product, 1))
                return l.silu + l.product, "silu (product, exp2, sum, quotient), product"
            case "linear":
                return self._linear(op)
            case "rmsnorm":
                return self._norm(op)
            case "quant":
                return self._quant(op)
            case "attention":
                return self._attention(op)
        raise UnsupportedModel(work.FUSED)

    def _know(self, name: str, value: Value) -> None:
        self.values[name] = value
        self.ends[name] = whole(self.chip, value)

    def _same(self, op: Op) -> None:
        source = op.src[0]
        self.ends[op.out] = self.ends[source]
        if source in self.values:
            self.values[op.out] = self.values[source]
        if source in self.bytes:
            self.bytes[op.out] = self.bytes[source]

    # -- linears and rows -----------------------------------------------------------------------

    def _linear(self, op: Op) -> tuple[int, str]:
        l, (outputs, inputs) = self.l, work.matrix(op)
        start = self.bytes[op.src[0]] + self.ways.product
        bias = work.has_bias(op)
        post = l.convert + l.product + bias * l.sum
        tail = Tail(op.out, outputs, inputs, start, post)
        first = start + int(inputs > self.chip.lanes) + post
        self._know(op.out, Value(first, 2 + bias, post, (tail,)))
        late = wait(self.chip, outputs, inputs)
        why = f"through a plane {self.ways.product}, last tile {late}, to float, times scale"
        return self.ways.product + late + post, why

    def _readers_of_row(self, name: str) -> tuple[Reader, ...]:
        """The linears that a row goes to in int8, by its norm or quant op."""
        found = []
        for op in self.readers.get(name, ()):
            if op.kind == "quant":
                found += [self._reader(r) for r in self.readers.get(op.out, ()) if _is_linear(r)]
            elif _is_linear(op):
                found.append(self._reader(op))
        return tuple(found)

    def _reader(self, op: Op) -> Reader:
        """Columns that become values are needed late, and do not count."""
        outputs, inputs = work.matrix(op)
        cuts = self.readers.get(op.out, [])
        if not cuts or [cut.kind for cut in cuts] == ["add"]:
            return Reader(outputs, 0)
        ends = {cut: self._end_of(cut.out) for cut in cuts if cut.kind == "slice"}
        needed = [cut for cut, end in ends.items() if end in ("attention", "swiglu")]
        outputs = sum(cut.integer("width") for cut in needed)
        kinds = {ends[cut] for cut in needed}
        if kinds == {"attention"}:
            lat = self.chip.latency
            return Reader(outputs, lat.mxm_load + lat.mxm_install)
        if kinds == {"swiglu"}:
            half = wait(self.chip, outputs // 2, inputs) + self.l.silu
            return Reader(outputs, max(0, half - wait(self.chip, outputs, inputs)))
        return Reader(0, 0)

    def _end_of(self, name: str) -> str:
        """What columns end as: attention (queries, keys), value, swiglu, or another op's kind."""
        readers = self.readers.get(name, [])
        if len(readers) != 1:
            return ""
        op = readers[0]
        if op.kind in ("rope", "rmsnorm"):
            return self._end_of(op.out)
        if op.kind == "attention" and name == op.src[2]:
            return "value"
        return op.kind

    def _dense_lanes(self, width: int) -> int:
        vectors = -(-width // self.chip.lanes)
        return -(-width // vectors)

    def _norm(self, op: Op) -> tuple[int, str]:
        l, source = self.l, self.values[op.src[0]]
        heads, gain = op.integer("heads", 1), bool(op.params)
        width = self.widths[op.src[0]] // heads
        begin = whole(self.chip, source) if heads == 1 else source.first
        levels = l.divide + l.product + l.convert + l.integer  # to the high byte
        if self.dense:
            lanes = self._dense_lanes(width) if heads == 1 else width
            groups = 1 if heads == 1 else -(-width * heads // self.chip.lanes)
            largest = spread(self.chip, lanes, groups)
            squares = l.product + spread(self.chip, lanes, groups, 2)
        else:
            made = l.product + l.convert + l.integer + l.product
            own = (
                alone(self.chip, width, source.made + 1, source.since),
                alone(self.chip, width, _TO_SQUARES, made),
            )
            if heads == 1:
                both = row_trips(self.chip, source, width, self._readers_of_row(op.out), 2)
                pairs = [(both // 2 + l.integer, both - both // 2 + l.integer)]
            else:
                pairs = [(self.ways.inside + l.integer,) * 2]
            near = self.ways.inside + l.integer
            pairs += [own, (own[0], near), (near, own[1])]
            largest, squares = min(pairs, key=sum)
            squares += l.product
        squares = min(squares, self.ways.as_weights)
        root = l.root(width)
        known = begin + largest + levels + squares + root
        scaled = l.product + gain * l.product
        first = known + scaled
        tails = tuple(replace(t, post=t.post + first - begin) for t in source.tails)
        top = first if heads == 1 and not gain else None
        value = Value(first, 1 + gain, scaled, tails if heads > 1 else (), top)
        self._know(op.out, value)
        return first - begin, (
            f"largest {largest}, to 16 bits {levels}, squares and their sums {squares}, "
            f"root {root}, product {scaled}"
        )

    def _quant(self, op: Op) -> tuple[int, str]:
        if op.integer("group", 0):
            raise UnsupportedModel("the bounds are those of 8-bit weights with a scale a row")
        l, value = self.l, self.values[op.src[0]]
        width = self.widths[op.src[0]]
        turned = 0
        if op.integer("hadamard", 0):
            turned = 4 * l.sum  # the factor 1/4 is exact
            value = later(value, turned, 4)
        begin = whole(self.chip, value)
        largest = 0
        if value.top is None:
            if self.dense:
                lanes = self._dense_lanes(width)
                largest = spread(self.chip, lanes, 1, direct=value.direct)
            else:
                readers = self._readers_of_row(op.src[0])
                largest = row_trips(self.chip, value, width, readers, 1) + l.integer
                largest = min(largest, alone(self.chip, width, value.made + 1, value.since))
                if value.direct:
                    across = min(self.chip.latency.sxm_superlane, self.chip.latency.sxm_across)
                    largest = min(largest, across + l.integer)
        top = begin + largest if value.top is None else value.top
        end = max(top + l.divide, begin) + l.product + l.convert
        self.bytes[op.out] = self.ends[op.out] = end
        blocks = f"Hadamard {turned}, " if turned else ""
        why = f"{blocks}largest {largest}, quotient, product, to int8"
        return turned + end - begin, why

    # -- attention ------------------------------------------------------------------------------

    def _attention(self, op: Op) -> tuple[int, str]:
        query, key, value = (self.values[name] for name in op.src)
        at = self.shape.context - 1
        size = op.integer("kv_heads") * op.integer("head_dim")
        late = wait(self.chip, work.visible(op, at), size) - int(size > self.chip.lanes)
        out, raw_out, why = self._attend(op, query, key, value, late)
        # Of the columns of queries and keys together, the last product may belong to either; from
        # there on an element of the result is at least as far away. Values are not waited for.
        both = max(query.first, key.first)
        never = replace(value, first=_LONG_AGO)
        q, k = replace(query, first=both), replace(key, first=both)
        end, _, _ = self._attend(op, q, k, never, late=0)
        way = end - both - self.chip.latency.mxm_load - self.chip.latency.mxm_install
        tails = tuple(
            replace(tail, post=tail.post + way, local=False) for tail in together(query, key).tails
        )
        l, heads, count = self.l, op.integer("heads"), work.chunks(op, at)
        merge = l.product + l.sum
        merged = (count - 1) * merge
        since = l.convert + 2 * l.product + merged
        # The last product with values: of a chunk, perhaps the last one to be merged.
        post = since - max(0, count - 2) * merge
        width, share = heads * op.integer("head_dim"), heads // op.integer("kv_heads")
        kept = Tail(op.out, width, work.visible(op, at), raw_out, post, True, share)
        tails = (*tails, kept)
        self._know(op.out, Value(out, 3 * count, since, tails, None, count == 1))
        return out - max(query.first, key.first, value.first), why

    def _head_bytes(self, op: Op, value: Value, heads: int) -> int:
        """From a head's values to its bytes."""
        l, dim = self.l, op.integer("head_dim")
        if self.dense:
            largest = spread(self.chip, dim, -(-heads * dim // self.chip.lanes))
        else:
            largest = reach(self.chip, dim, value.made + 1, value.since)
        return largest + l.divide + l.product + l.convert

    def _over_positions(self, op: Op, made: int, since: int) -> int:
        """A maximum over the positions of a chunk."""
        at = self.shape.context - 1
        most = work.largest_chunk(op, at)
        if not self.dense:
            return reach(self.chip, most, made + 1, since)
        groups = op.integer("heads") * work.chunks(op, at)
        return spread(self.chip, self._dense_lanes(most), groups)

    def _attend(
        self, op: Op, query: Value, key: Value, value: Value, late: int
    ) -> tuple[int, int, str]:
        """The end, when the first product with values can be at the VXM, and why. late: cycles
        that the last keys, or values, come later than the first."""
        l, ways, chip = self.l, self.ways, self.chip
        heads, kv_heads = op.integer("heads"), op.integer("kv_heads")
        count = work.chunks(op, self.shape.context - 1)
        to_bytes = self._head_bytes(op, query, heads)
        q = query.first + to_bytes
        k = key.first + self._head_bytes(op, key, kv_heads)
        v = value.first + self._head_bytes(op, value, kv_heads)
        load = chip.latency.mxm_load + chip.latency.mxm_install
        # One of the two is the weights of the other; a head's length fits a plane.
        raw = min(max(q, k + load), max(k, q + load)) + ways.product
        score = raw + l.convert + l.product
        highest = self._over_positions(op, 2, l.convert + l.product)
        power = score + highest + l.sum + l.exp2
        weight = power + l.product
        largest = self._over_positions(op, 1 + 2 + _HORNER + 1, l.sum + l.exp2 + l.product)
        p = max(weight, weight + largest + l.divide) + l.product + l.convert
        raw_out = max(p, v + load) + ways.product
        out = raw_out + l.convert + l.product
        merge = l.product + l.sum
        merged = (count - 1) * merge
        # What comes late is merged last.
        last = max(merged, late + min(1, count - 1) * merge)
        # The sum of the weights is there long before: it is not worth a bound of its own.
        inverse = power + l.convert + l.integer + l.convert + merged + l.divide
        end = max(out + last, inverse) + l.product
        why = (
            f"queries to int8 {to_bytes}, scores {score - max(q, k)}, largest {highest}, "
            f"exp2 {power - score - highest}, weights to int8 {p - power} (largest {largest}), "
            f"values {out - p}, {count} chunks merged {last}, over their sum {l.product}"
        )
        return end, raw_out, why


def _is_linear(op: Op) -> bool:
    return op.kind == "linear"
