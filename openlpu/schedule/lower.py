"""In: plain ops and the layouts that their readers want. Out: tasks of a section, op by op.

Values are pulled: whoever needs a value in a layout asks for it, and what makes it follows. Row-
wise values are words [vectors] of rows; quantized ones bytes in both hemispheres, with a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import EAST, WEST
from openlpu.errors import UnsupportedModel
from openlpu.graph import Op
from openlpu.graph.ops import weights_and_biases
from openlpu.numerics import SUPERLANE
from openlpu.schedule import layout as layouts
from openlpu.schedule.constants import BYTE, Constants
from openlpu.schedule.expression import Accumulator, Expression, Leaf, Node, Operand
from openlpu.schedule.functions import (
    MAGNITUDE,
    as_node,
    inverse_root,
    joined,
    quantization_scale,
    quantization_step,
    silu,
)
from openlpu.schedule.layout import Layout
from openlpu.schedule.matrix import Tile, accumulators, act, install, load
from openlpu.schedule.memory import Buffer
from openlpu.schedule.section import SectionBuilder
from openlpu.schedule.tasks import Tasks
from openlpu.schedule.weights import WeightStore

FEW_VECTORS = 6  # of a value that one expression makes
_FEW_TILES = 24  # of a plane in one product; latency counts more than full streams
Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Quantized:
    """int8 rows: bytes per vector in each hemisphere, one scale a row in every lane."""

    sides: tuple[tuple[Buffer, ...], tuple[Buffer, ...]]
    scale: Buffer
    layout: Layout


@dataclass(frozen=True, slots=True)
class Norm:
    """What a norm knows of each vector: its largest magnitude and the reciprocal root, as words."""

    amax: list[Buffer]
    inverse: list[Buffer]


class GroupedLinears(Protocol):
    """Gives the vectors of a linear whose weights lie in blocks, in memory."""

    def words(self, value: str, layout: Layout, into: list[Buffer] | None) -> list[Buffer]: ...


class Lowering(Tasks):
    """Lowers the ops of one section."""

    def __init__(
        self,
        builder: SectionBuilder,
        constants: Constants,
        store: WeightStore,
        ops: Mapping[str, tuple[int, Op]],
        rows: int,
        *,
        layered: bool,
    ) -> None:
        """ops: by the value each makes, with its place (see Fill)."""
        super().__init__(builder, constants, store, rows)
        self.ops = ops
        self.layered = layered
        self._words: dict[tuple[str, bytes], Buffer] = {}
        self._norms: dict[tuple[str, bytes], Norm] = {}
        self._quantized: dict[str, Quantized] = {}
        self._products: dict[tuple[str, bytes], list[Accumulator]] = {}
        self._tops: dict[tuple[str, bytes], tuple[Buffer, Buffer]] = {}
        self.outside: dict[str, tuple[int, Layout]] = {}  # width and layout of values from before
        self.rope: Callable[[Layout, int], tuple[Buffer, Buffer]] | None = None
        self.grouped: GroupedLinears | None = None  # who lowers linears with weights in blocks

    # -- buffers --------------------------------------------------------------------------------

    def know(self, value: str, layout: Layout, buffers: list[Buffer]) -> None:
        """A value that lies in memory."""
        for row, buffer in zip(layout, buffers, strict=True):
            self._words[value, row.tobytes()] = buffer

    # -- words ----------------------------------------------------------------------------------

    def words(self, value: str, layout: Layout, into: list[Buffer] | None = None) -> list[Buffer]:
        """A value as words in memory, one buffer a vector; into: where, if that matters."""
        if into is None and all((value, row.tobytes()) in self._words for row in layout):
            return [self._words[value, row.tobytes()] for row in layout]
        if self.grouped is not None and value in self.ops and self._op(value)[1].kind == "linear":
            found = self.grouped.words(value, layout, into)
            self.know(value, layout, found)
            return found
        found = []
        at_once = max(1, self.chip.accumulators // 2 // self.rows) * self.chip.planes
        for first in range(0, len(layout), at_once):
            block = layout[first : first + at_once]
            self.prepare(value, block)
            for v in range(len(block)):
                expression = Expression()
                buffer = self.scratch(nearest=True) if into is None else into[first + v]
                expression.write(self._operand(expression, value, block, v), buffer)
                found += self.evaluate(expression, buffer)
        self.know(value, layout, found)
        return found

    def words_with_top(
        self,
        value: str,
        layout: Layout,
        into: list[Buffer] | None = None,
        top: tuple[Buffer, Buffer] | None = None,
    ) -> list[Buffer]:
        """The same, by one expression that finds the largest magnitude on its way; top: where."""
        if len(layout) > FEW_VECTORS:
            return self.words(value, layout, into)
        self.prepare(value, layout)
        e = Expression()
        buffers = into or [self.scratch() for _ in layout]
        sizes: list[Node] = []
        for v, buffer in enumerate(buffers):
            node = as_node(e, self._operand(e, value, layout, v))
            e.write(node, buffer)
            sizes.append(e.op("and", node, MAGNITUDE))
        pair = top or self.both_sides()
        e.write(joined(e, "max", sizes), *pair)
        *words, west, east = self.evaluate(e, *buffers, *pair)
        self.know(value, layout, words)
        self.know_top(value, layout, (west, east))
        return words

    def know_top(self, value: str, layout: Layout, pair: tuple[Buffer, Buffer]) -> None:
        """The largest magnitudes over a value's vectors, lane by lane, in both hemispheres."""
        self._tops[value, layout.tobytes()] = pair

    def vector_with_tops(
        self, value: str, layout: Layout, v: int, masks: list[Buffer | None]
    ) -> tuple[Buffer, list[Buffer]]:
        """One vector of a value, and the bits of its largest magnitude within each mask's lanes."""
        self.prepare(value, layout)
        e = Expression()
        node = as_node(e, self._operand(e, value, layout, v))
        size = e.op("and", node, MAGNITUDE)
        buffer, pairs = self.scratch(), []
        e.write(node, buffer)
        for mask in masks:
            pairs.append(self.both_sides())
            e.write(
                e.op("mov", size) if mask is None else e.op("and", size, Leaf(mask)), *pairs[-1]
            )
        done = self.evaluate(e, buffer, *(side for pair in pairs for side in pair))
        self.know(value, layout[v : v + 1], done[:1])
        tops = [self.over_lanes(done[1 + 2 * i], done[2 + 2 * i], "max") for i in range(len(pairs))]
        return done[0], tops

    def _op(self, value: str) -> tuple[int, Op]:
        if value not in self.ops:
            raise UnsupportedModel(f"%{value} is used across an attention; the chip cannot keep it")
        return self.ops[value]

    def prepare(self, value: str, layout: Layout) -> None:
        """Everything a value's expression reads: products, norms, values of other layouts."""
        if all((value, row.tobytes()) in self._words for row in layout):
            return
        place, op = self._op(value)
        match op.kind:
            case "linear":
                self.products(op, place, layout)
            case "add" | "swiglu":
                self._prepare_together(op, layout)
                for source in op.src:
                    self.prepare(source, layout)
            case "slice":
                self.prepare(op.src[0], layouts.shifted(layout, op.integer("start")))
            case "rope":
                dim = self._head_dim(op, layout)
                self.prepare(op.src[0], layout)
                self.prepare(op.src[0], layouts.other_halves(layout, dim))
            case "rmsnorm":
                self.norm(op, layout)
            case _:
                raise UnsupportedModel(f"the chip cannot compute {op.kind} %{value} here")

    def _prepare_together(self, op: Op, layout: Layout) -> None:
        """Where both sources are columns of one product: all vectors of the first one, which has
        the longer way to go, then those of the second."""
        made = []
        for source in op.src:
            if source not in self.ops or (source, layout[0].tobytes()) in self._words:
                return
            cut = self._op(source)[1]
            if cut.kind != "slice" or cut.src[0] not in self.ops:
                return
            made.append((cut.src[0], layouts.shifted(layout, cut.integer("start"))))
        place, linear = self._op(made[0][0])
        if made[1][0] == made[0][0] and linear.kind == "linear":
            self.products(linear, place, np.concatenate([made[0][1], made[1][1]]))

    def _operand(self, e: Expression, value: str, layout: Layout, v: int) -> Operand:
        """Vector v of a value as part of an expression; `_prepare` came before."""
        known = self._words.get((value, layout[v].tobytes()))
        if known is not None:
            return Leaf(known)
        place, op = self._op(value)
        self.b.tag(f"{op.out} {op.kind}")
        match op.kind:
            case "linear":
                return self._dequantized(e, op, place, layout, v)
            case "add":
                a, b = (self._operand(e, source, layout, v) for source in op.src)
                return e.op("fadd", a, b)
            case "swiglu":
                gate, up = (self._operand(e, source, layout, v) for source in op.src)
                return e.op("fmul", silu(e, gate), up)
            case "slice":
                return self._operand(e, op.src[0], layouts.shifted(layout, op.integer("start")), v)
            case "rope":
                dim = self._head_dim(op, layout)
                turned = layouts.other_halves(layout, dim)
                own = self._operand(e, op.src[0], layout, v)
                other = self._operand(e, op.src[0], turned, v)
                assert self.rope is not None
                cosine, sine = self.rope(layout[v], dim)
                a = e.op("fmul", own, Leaf(cosine))
                return e.op("fadd", a, e.op("fmul", other, Leaf(sine)))
            case "rmsnorm":
                norm = self.norm(op, layout)
                source = Leaf(self.words(op.src[0], layout)[v])
                y = e.op("fmul", source, Leaf(norm.inverse[v]))
                if op.params:
                    width = op.params[0].shape[0]
                    gain = np.where(layout[v] >= 0, layout[v] % width, -1).astype(np.int32)
                    y = e.op("fmul", y, Leaf(self._constant(place, "gain", gain)))
                return y
        raise AssertionError(op.kind)

    def _head_dim(self, op: Op, layout: Layout) -> int:
        return self.width_of(op.src[0]) // op.integer("heads")

    def width_of(self, value: str) -> int:
        if value in self.outside:
            return self.outside[value][0]
        _, op = self._op(value)
        if op.kind == "linear":
            weights, _ = weights_and_biases(op)
            return sum(op.params[i].shape[0] for i in weights)
        if op.kind == "slice":
            return op.integer("width")
        return self.width_of(op.src[0])

    def _constant(self, place: int, name: str, layout: Layout) -> Buffer:
        return self.constants.of_op(place, name, layout, layered=self.layered)

    # -- products -------------------------------------------------------------------------------

    def products(self, op: Op, place: int, layout: Layout) -> list[list[Accumulator]]:
        """The integer products of a linear, per output vector; several are to be added up."""
        if self.grouped is not None:  # its sums are no integers, and lie in memory
            self.words(op.out, layout)
            return []
        missing = [row for row in layout if (op.out, row.tobytes()) not in self._products]
        if missing:
            self._multiply(op, place, np.stack(missing))
        return [self._products[op.out, row.tobytes()] for row in layout]

    def _multiply(self, op: Op, place: int, layout: Layout) -> None:
        x = self.quantized(op.src[0])
        self.b.tag(f"{op.out} linear")
        jobs: list[list[tuple[Tile, ...]]] = [[] for _ in range(self.chip.planes)]
        work: list[list[tuple[int, int, int]]] = [[] for _ in range(self.chip.planes)]
        num_inputs, num_outputs = len(x.layout), len(layout)
        by_rows = self._rows_are_fewer(x.layout, layout)
        firsts: dict[tuple[int, int], Accumulator] = {}
        for v, outputs in enumerate(layout):
            split = self._shares(v, num_outputs, num_inputs)
            for part in range(split):
                ks = range(num_inputs)[part::split]
                words = len(ks) * self._groups(x.layout[:1] if by_rows else outputs[None])
                plane = self._next_plane(place, part, outputs, by_rows, words)
                for k in ks:
                    if by_rows:
                        tiles = self.store.by_rows(
                            place, x.layout[k], outputs, plane, layered=self.layered
                        )
                    else:
                        tiles = self.store.by_columns(
                            place, k, x.layout[k], outputs, plane, layered=self.layered
                        )
                    jobs[plane].append(tuple(tiles))
                    work[plane].append((v, k, part))
        self._run_tiles(jobs, work, x, firsts)
        for v, outputs in enumerate(layout):
            parts = [sums for (vector, _), sums in sorted(firsts.items()) if vector == v]
            self._products[op.out, outputs.tobytes()] = parts

    def _shares(self, v: int, num_outputs: int, num_inputs: int) -> int:
        """Over how many planes an output vector's inputs are spread: the last vectors, too few for
        all planes, are."""
        rest = num_outputs % self.chip.planes
        if v < num_outputs - rest:
            return 1
        return max(1, min(num_inputs, self.chip.planes // rest))

    def _run_tiles(
        self,
        jobs: list[list[tuple[Tile, ...]]],
        work: list[list[tuple[int, int, int]]],
        x: Quantized,
        sums: dict[tuple[int, int], Accumulator],
    ) -> None:
        """Load each plane's tiles in order. While many are left, the next one is loaded before the
        last one multiplies, which keeps the streams full; else rows that wait go first."""

        def multiply(plane: int, turn: int) -> None:
            v, k, part = work[plane][turn]
            side = int(plane >= self.chip.planes_per_hemisphere)
            add = (v, part) in sums
            into = sums[v, part] if add else accumulators(self.b, plane, self.rows)
            sums[v, part] = act(self.b, into, x.sides[side][k], self.rows, add=add)

        for turn in range(max(len(tiles) for tiles in jobs) + 1):
            for plane, tiles in enumerate(jobs):
                first = False
                if 0 < turn <= len(tiles):
                    side = int(plane >= self.chip.planes_per_hemisphere)
                    ready = x.sides[side][work[plane][turn - 1][1]].ready
                    soon = self.b.planes[plane].installed + self.chip.lanes // 32
                    first = turn == len(tiles) or (len(tiles) <= _FEW_TILES and ready <= soon)
                    if first:
                        multiply(plane, turn - 1)
                if turn < len(tiles):
                    for tile in tiles[turn]:
                        load(self.b, plane, tile)
                    if turn and not first:
                        multiply(plane, turn - 1)
                    install(self.b, plane)

    def _rows_are_fewer(self, inputs: Layout, outputs: Layout) -> bool:
        """Whether storing by rows takes fewer words, columns being shared with other layouts."""
        rows = len(outputs) * self._groups(inputs)
        columns = len(inputs) * self._groups(outputs)
        return rows < columns - self._groups(outputs)

    def _groups(self, layout: Layout) -> int:
        width = self.chip.install_streams
        return int((layout.reshape(len(layout), -1, width) >= 0).any(axis=2).sum())

    def _next_plane(self, place: int, k: int, outputs: Layout, by_rows: bool, words: int) -> int:
        """Planes in turn, west and east by turns; where columns over input vector k lie already,
        their hemisphere; and the other one where `words` words more do not fit."""
        side = None if by_rows else self.store.side_of(place, k, outputs)
        half = self.chip.planes_per_hemisphere
        if side is not None:
            return side * half + self.next_turn() % half
        plane = self.next_plane()
        rooms = [self.store.room(side, layered=self.layered) for side in (WEST, EAST)]
        own, other = rooms[plane // half], rooms[1 - plane // half]
        if own < min(words, other) or (self.rows > 1 and own + words < other):
            plane = (plane + half) % self.chip.planes
        return plane

    def _dequantized(self, e: Expression, op: Op, place: int, layout: Layout, v: int) -> Node:
        sums = self.products(op, place, layout[v : v + 1])[0]
        scale = self.quantized(op.src[0]).scale
        total: Operand = Leaf(sums[0])
        for more in sums[1:]:
            total = e.op("add", total, Leaf(more))
        weight_scale = Leaf(self._constant(place, "scale", layout[v]))
        y = e.op("fmul", e.op("itof", total), e.op("fmul", Leaf(scale), weight_scale))
        if len(op.params) > op.integer("weights", 1):
            y = e.op("fadd", y, Leaf(self._constant(place, "bias", layout[v])))
        return y

    # -- rows to int8 ---------------------------------------------------------------------------

    def quantized(self, value: str) -> Quantized:
        """A q8 value, ready for the planes."""
        if value not in self._quantized:
            _, op = self._op(value)
            if op.kind != "quant" or op.integer("group", 0):
                raise UnsupportedModel(f"the chip cannot compute {op.kind} %{value} in groups yet")
            self._quantized[value] = self._quantize(op)
        return self._quantized[value]

    def _quantize(self, op: Op) -> Quantized:
        source = op.src[0]
        width = self.width_of(source)
        hadamard = op.integer("hadamard", 0)
        layout = layouts.hadamard(width, self.chip) if hadamard else self.layout_of(source, width)
        if not hadamard and self._is_plain_norm(source):
            return self._norm_quantize(op, layout)
        if hadamard:
            words = self.words(source, layout)
            self.b.tag(f"{op.out} quant")
            words, amax = self._hadamard(words)
        else:
            words, amax = self._with_largest(source, layout, f"{op.out} quant")
        e = Expression()
        limited, step = quantization_step(e, Leaf(amax))
        return self._to_bytes(e, [Leaf(word) for word in words], limited, step, layout)

    def _to_bytes(
        self, e: Expression, values: list[Operand], amax: Node, step: Node, layout: Layout
    ) -> Quantized:
        """Finish an expression: values times step as bytes on both sides, and the scale."""
        pairs = [self.both_sides(BYTE) for _ in values]
        for value, pair in zip(values, pairs, strict=True):
            e.write(e.op("ftoi", e.op("fmul", value, step)), *pair)
        scale = self.scratch()
        e.write(quantization_scale(e, amax), scale)
        west, east = ([pair[side] for pair in pairs] for side in (WEST, EAST))
        done = self.evaluate(e, *west, *east, scale)
        n = len(values)
        return Quantized((tuple(done[:n]), tuple(done[n : 2 * n])), done[-1], layout)

    def _with_largest(self, value: str, layout: Layout, tag: str) -> tuple[list[Buffer], Buffer]:
        """A value's words and the bits of its row's largest magnitude."""
        known = all((value, row.tobytes()) in self._words for row in layout)
        words = self.words(value, layout) if known else self.words_with_top(value, layout)
        self.b.tag(tag)
        pair = self._tops.get((value, layout.tobytes()))
        if pair is None:
            return words, self.largest(words)
        return words, self.over_lanes(*pair, op="max")

    def _is_plain_norm(self, value: str) -> bool:
        """A norm of whole rows without gain: its largest magnitude is fl(amax * inverse), since
        rounding keeps the order."""
        if value not in self.ops:
            return False
        _, op = self._op(value)
        return op.kind == "rmsnorm" and not op.params and op.integer("heads", 1) == 1

    def _norm_quantize(self, op: Op, layout: Layout) -> Quantized:
        """A plain norm and its quantization, by one expression once the sums are there."""
        _, norm = self._op(op.src[0])
        words, top = self._with_largest(norm.src[0], layout, f"{norm.out} rmsnorm")
        amax, sums = self.squares(words, top, None)
        e = Expression()
        inverse = inverse_root(e, sums, Leaf(amax), self.width_of(norm.src[0]), norm.number("eps"))
        limited, step = quantization_step(e, e.op("fmul", Leaf(amax), inverse))
        self.b.tag(f"{op.out} quant")
        values: list[Operand] = [e.op("fmul", Leaf(word), inverse) for word in words]
        return self._to_bytes(e, values, limited, step, layout)

    def layout_of(self, value: str, width: int) -> Layout:
        """The layout in which a row is quantized."""
        if value in self.outside:
            return self.outside[value][1]
        return layouts.dense(width, self.chip)

    def _hadamard(self, words: list[Buffer]) -> tuple[list[Buffer], Buffer]:
        """Transformed blocks (the 16 vectors of a block lie in one lane), and their largest."""
        tops, done = [], []
        for j in range(0, len(words), SUPERLANE):
            e = Expression()
            x: list[Operand] = [Leaf(word) for word in words[j : j + SUPERLANE]]
            for stride in (1, 2, 4, 8):
                y: list[Operand] = list(x)
                for i in range(SUPERLANE):
                    if not i & stride:
                        y[i] = e.op("fadd", x[i], x[i + stride])
                        y[i + stride] = e.op("fsub", x[i], x[i + stride])
                x = y
            scaled = [e.op("fmul", value, 0.25) for value in x]
            outs = [self.scratch() for _ in scaled]
            top: list[Node] = [e.op("and", value, MAGNITUDE) for value in scaled]
            while len(top) > 1:
                top = [e.op("max", a, b) for a, b in zip(top[::2], top[1::2], strict=True)]
            for value, out in zip(scaled, outs, strict=True):
                e.write(value, out)
            pair = self.both_sides()
            e.write(top[0], *pair)
            written = self.evaluate(e, *outs, *pair)
            done += written[:-2]
            tops.append(written[-2:])
        if len(tops) == 1:
            west, east = tops[0]
            return done, self.over_lanes(west, east, "max")
        e = Expression()
        all_top: Operand = Leaf(tops[0][0])
        for pair_of in tops[1:]:
            all_top = e.op("max", all_top, Leaf(pair_of[0]))
        pair = self.both_sides()
        e.write(all_top, *pair)
        west, east = self.evaluate(e, *pair)
        return done, self.over_lanes(west, east, "max")

    # -- norms ----------------------------------------------------------------------------------

    def norm(self, op: Op, layout: Layout) -> Norm:
        """The norm of whole rows, or of each head's lanes."""
        heads = op.integer("heads", 1)
        width = self.width_of(op.src[0]) // heads
        owner = np.where(layout >= 0, layout // width, -1).astype(np.int32)
        key = (op.out, owner.tobytes())
        if key in self._norms:
            return self._norms[key]
        words = self.words(op.src[0], layout)
        self.b.tag(f"{op.out} rmsnorm")
        eps = op.number("eps")
        if heads == 1:
            amax, inverse = self._inverse(words, width, eps, None)
            norm = Norm([amax] * len(words), [inverse] * len(words))
        else:
            pairs = [self._of_heads(w, o, width, eps) for w, o in zip(words, owner, strict=True)]
            norm = Norm([a for a, _ in pairs], [r for _, r in pairs])
        self._norms[key] = norm
        return norm

    def _of_heads(
        self, word: Buffer, owner: Layout, width: int, eps: float
    ) -> tuple[Buffer, Buffer]:
        """Each head of one vector alone; amax and inverse stand in the lanes of their head."""
        found = []
        for head in sorted(set(owner.tolist()) - {-1}):
            mask = self.mask(owner == head)
            found.append((mask, *self._inverse([word], width, eps, mask)))
        e = Expression()
        outs = []
        for part in (1, 2):
            value: Operand = Leaf(found[0][part])
            for entry in found[1:]:
                value = e.op("sel", Leaf(entry[0]), Leaf(entry[part]), value)
            outs.append(self.scratch())
            e.write(value, outs[-1])
        amax, inverse = self.evaluate(e, *outs)
        return amax, inverse
