"""In: linears with weights in groups of 32, and what they read. Out: tasks for groups, their sums
in order.

A row is quantized by groups of 32 lanes. For each group a copy of its bytes, zero outside the
group, meets the plane's weights: one product vector a group. The VXM scales the products and adds
them in the order of the groups. A group's scale and the sum of its bytes come into every lane by
products too: with a plane of chosen weights for the scale's bytes, and a plane of ones for the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from openlpu.chip import EAST, WEST
from openlpu.errors import DoesNotFit, UnsupportedModel
from openlpu.graph import Op
from openlpu.graph.ops import weights_and_biases
from openlpu.numerics import GROUP, SUPERLANE
from openlpu.schedule.constants import BYTE, WORD
from openlpu.schedule.expression import Accumulator, Expression, Leaf, Node, Operand
from openlpu.schedule.functions import inverse_root, quantization_scale, quantization_step
from openlpu.schedule.grouped_weights import HALF, GroupedStore
from openlpu.schedule.layout import Layout
from openlpu.schedule.lower import Lowering
from openlpu.schedule.matrix import Tile, accumulators, act, install, load
from openlpu.schedule.memory import Buffer
from openlpu.schedule.reduce import reduce_lanes

_ABS = 0x7FFFFFFF
# Flips a byte b in 0..255 into the signed byte b - 128; added to a word made of such bytes, it
# gives back what they lack, modulo 2^32.
_FLIP = 0x80808080 - (1 << 32)
_ELEMENTS_TOGETHER = 6  # output vectors times rows that one expression computes
_PARTS = 4  # lanes with weight 64 that make a byte's weight 256
_SCALE_LANES = 1 + _PARTS


@dataclass(frozen=True, slots=True)
class Place:
    """Where the 32 features of a group stand: the vector, its first lane, its number among the
    vector's groups."""

    vector: int
    lane: int
    number: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A quantized value: per side and vector the bytes of each of its groups, alone; per group the
    scale and the sum of the bytes (if somebody wants it) in every lane."""

    layout: Layout
    places: list[Place]
    sides: tuple[list[Buffer], list[Buffer]]
    scales: dict[int, Buffer]
    sums: dict[int, Buffer] | None

    def groups_of(self, vector: int) -> list[int]:
        """The groups that stand in a vector."""
        return [g for g, place in enumerate(self.places) if place.vector == vector]


@dataclass(slots=True)
class _Job:
    """A tile and the groups it multiplies, as numbers of its vector's copies."""

    vector: int
    first: int
    count: int
    groups: list[int]
    tiles: list[Tile]
    plane: int


class Grouped:
    """Lowers the linears of one section whose weights lie in blocks."""

    def __init__(self, low: Lowering, store: GroupedStore) -> None:
        self.low = low
        self.store = store
        self.chip = low.chip
        if self.chip.lanes % GROUP:
            raise UnsupportedModel(
                f"{self.chip.name} has {self.chip.lanes} lanes, no multiple of a group of {GROUP}"
            )
        self._rows: dict[str, Rows] = {}
        self._known: dict[tuple[str, bytes], Buffer] = {}
        self._loads = [0] * self.chip.planes

    # -- rows to int8 ---------------------------------------------------------------------------

    def rows(self, value: str) -> Rows:
        """A g8 value, ready for the planes."""
        if value not in self._rows:
            _, op = self.low._op(value)
            if op.kind != "quant" or op.integer("group", 0) != GROUP:
                raise UnsupportedModel(f"the chip cannot compute {op.kind} %{value} in groups")
            self._rows[value] = self._quantize(op)
        return self._rows[value]

    def _quantize(self, op: Op) -> Rows:
        low, source = self.low, op.src[0]
        width = low.width_of(source)
        layout = low.layout_of(source, width)
        places = self._places(layout, width, op.out)
        minima = any(
            param.format == "q4_1"
            for _, reader in low.ops.values()
            if op.out in reader.src
            for param in reader.params
        )
        words, largest = self._with_sizes(source, layout)
        low.b.tag(f"{op.out} quant")
        spread = self._next_plane(WEST)
        ones = self._next_plane(EAST)
        load(low.b, spread, self._spreading(spread))
        install(low.b, spread)
        if minima:
            load(low.b, ones, low.ones(ones))
            install(low.b, ones)
        found = Rows(layout, places, ([], []), {}, {} if minima else None)
        for k, word in enumerate(words):
            out = low.scratch()
            top = reduce_lanes(low.b, *largest[k], "max", GROUP, low.rows, (out,))[0]
            mine = found.groups_of(k)
            halves = self._copies(found, word, top, [places[g] for g in mine], spread)
            self._to_every_lane(found, halves, mine, spread, ones)
        return found

    def _with_sizes(
        self, source: str, layout: Layout
    ) -> tuple[list[Buffer], list[tuple[Buffer, Buffer]]]:
        """A value's vectors as words, and the bits of their magnitudes in both hemispheres."""
        low = self.low
        norm = low.ops[source][1] if source in low.ops else None
        if norm is not None and norm.kind == "rmsnorm" and norm.integer("heads", 1) == 1:
            e, values = self._normed(norm, low.ops[source][0], layout)
            return self._written(e, values)
        low.prepare(source, layout)
        words, largest = [], []
        for v in range(len(layout)):
            e = Expression()
            found = self._written(e, [low._operand(e, source, layout, v)])
            words += found[0]
            largest += found[1]
        return words, largest

    def _normed(self, norm: Op, place: int, layout: Layout) -> tuple[Expression, list[Operand]]:
        """A norm of whole rows, its last part still an expression."""
        low, source = self.low, norm.src[0]
        words, top = low._with_largest(source, layout, f"{norm.out} rmsnorm")
        amax, sums = low.squares(words, top, None)
        e = Expression()
        inverse = inverse_root(e, sums, Leaf(amax), low.width_of(source), norm.number("eps"))
        values: list[Operand] = []
        for word, row in zip(words, layout, strict=True):
            y = e.op("fmul", Leaf(word), inverse)
            if norm.params:
                gain = low.constants.of_op(place, "gain", row, layered=low.layered)
                y = e.op("fmul", y, Leaf(gain))
            values.append(y)
        return e, values

    def _written(
        self, e: Expression, values: list[Operand]
    ) -> tuple[list[Buffer], list[tuple[Buffer, Buffer]]]:
        """Evaluate values into memory, and their magnitudes into that of both hemispheres."""
        low = self.low
        words = [low.scratch() for _ in values]
        pairs = [low.both_sides() for _ in values]
        for value, word, pair in zip(values, words, pairs, strict=True):
            node = value if isinstance(value, Node) else e.op("mov", value)
            e.write(node, word)
            e.write(e.op("and", node, _ABS), *pair)
        done = low.evaluate(e, *words, *(side for pair in pairs for side in pair))
        n = len(words)
        return done[:n], [(done[n + 2 * i], done[n + 2 * i + 1]) for i in range(n)]

    def _places(self, layout: Layout, width: int, name: str) -> list[Place]:
        """The place of each group. Raises UnsupportedModel where one does not stand together."""
        at = {int(f): (v, lane) for (v, lane), f in np.ndenumerate(layout) if f >= 0}
        places, numbers = [], [0] * len(layout)
        for first in range(0, width, GROUP):
            vector, lane = at[first]
            stands = layout[vector, lane : lane + GROUP]
            if lane % GROUP or not np.array_equal(stands, np.arange(first, first + GROUP)):
                raise UnsupportedModel(
                    f"%{name}: the {GROUP} features from {first} on do not stand together on "
                    f"{self.chip.name}; heads must be multiples of {GROUP} wide, or --precision w8"
                )
            places.append(Place(vector, lane, numbers[vector]))
            numbers[vector] += 1
        return places

    def _copies(
        self, found: Rows, word: Buffer, top: Buffer, places: list[Place], spread: int
    ) -> Buffer:
        """One vector's bytes, a copy for each group on both sides; two bytes of its scales for
        each group, beside the plane that spreads them. Copy i of row r is element i * rows + r."""
        low = self.low
        rows, memory = low.rows, low.memory
        e = Expression()
        limited, step = quantization_step(e, Leaf(top))
        q = e.op("ftoi", e.op("fmul", Leaf(word), step))
        half = self._scale_bytes(e, quantization_scale(e, limited))
        pair = [
            memory.scratch(BYTE, rows * len(places), hemisphere=side, outer=True)
            for side in (WEST, EAST)
        ]
        halves = memory.scratch(HALF, rows * len(places), hemisphere=self._side(spread), outer=True)
        parts: list[list[Buffer]] = [[], [], []]
        for i, place in enumerate(places):
            alone: Node = q
            if self.chip.lanes > GROUP:
                alone = e.op("and", q, Leaf(self._mask(place.lane, GROUP)))
            scale = e.op("and", half, Leaf(self._mask(place.lane, _SCALE_LANES)))
            outs = [part(buffer, i, rows) for buffer in (*pair, halves)]
            e.write(alone, *outs[:2])
            e.write(scale, outs[2])
            for buffers, buffer in zip(parts, outs, strict=True):
                buffers.append(buffer)
        written = low.b.evaluate(e, rows)
        west, east, both = (
            whole(buffer, [written[b] for b in buffers], rows)
            for buffer, buffers in zip((*pair, halves), parts, strict=True)
        )
        found.sides[WEST].append(west)
        found.sides[EAST].append(east)
        return both

    def _scale_bytes(self, e: Expression, scale: Node) -> Node:
        """Two signed bytes a lane: of bytes 0 and 2 of a scale in the first lane of each superlane,
        of bytes 1 and 3 in the next ones."""
        flipped = e.op("xor", scale, _FLIP)
        lanes = np.arange(self.chip.lanes) % SUPERLANE
        first = Leaf(self.low.mask(lanes == 0))
        mine = e.op("sel", first, flipped, e.op("shr", flipped, 8))
        low = e.op("and", mine, 0xFF)
        return e.op("or", low, e.op("and", e.op("shr", mine, 8), 0xFF00))

    def _mask(self, lane: int, count: int) -> Buffer:
        lanes = np.arange(self.chip.lanes)
        return self.low.mask((lanes >= lane) & (lanes < lane + count))

    def _to_every_lane(
        self, found: Rows, halves: Buffer, groups: list[int], spread: int, ones: int
    ) -> None:
        """The scales of one vector's groups, and the sums of their bytes, in every lane."""
        low = self.low
        most = self.chip.accumulators // (2 * low.rows)
        if most == 0:
            raise DoesNotFit(
                f"accumulators of {self.chip.name}",
                2 * low.rows,
                self.chip.accumulators,
                "vectors",
                ("fewer --rows",),
            )
        for first in range(0, len(groups), most):
            mine = groups[first : first + most]
            n = len(mine)
            copies = n * low.rows
            limbs = [
                act(
                    low.b,
                    accumulators(low.b, spread, copies),
                    part(one_byte(halves, b), first, low.rows, n),
                    copies,
                    add=False,
                )
                for b in range(HALF)
            ]
            e = Expression()
            upper = e.op("shl", Leaf(limbs[1]), 16)
            out = low.memory.scratch(WORD, copies, hemisphere=None, outer=False)
            e.write(e.op("add", e.op("add", Leaf(limbs[0]), upper), _FLIP), out)
            outs = [out]
            if found.sums is not None:
                x = part(found.sides[self._side(ones)][-1], first, low.rows, n)
                total = act(low.b, accumulators(low.b, ones, copies), x, copies, add=False)
                outs.append(low.memory.scratch(WORD, copies, hemisphere=None, outer=False))
                e.write(e.op("itof", Leaf(total)), outs[1])
            written = low.b.evaluate(e, copies)
            for i, g in enumerate(mine):
                found.scales[g] = part(written[out], i, low.rows)
                if found.sums is not None:
                    found.sums[g] = part(written[outs[1]], i, low.rows)

    def _spreading(self, plane: int) -> Tile:
        """Weights 1, 64, 64, 64, 64, 0, ... down the rows of each superlane: with a word's bytes
        0, 1, 1, 1, 1 they give byte 0 + 256 * byte 1 in every lane."""
        chip = self.chip
        side, width = self._side(plane), chip.install_streams
        rows = np.arange(max(width, SUPERLANE)) % SUPERLANE
        weights = np.where(rows == 0, 1, np.where(rows < _SCALE_LANES, 256 // _PARTS, 0))
        table = weights.reshape(-1, width)  # [words, slices]
        slices, words = self.store.constant(
            "spreading",
            side,
            np.repeat(table.T[:, :, None], chip.lanes, axis=2).astype(np.uint8),
        )
        groups = tuple((g, g % len(table), 1) for g in range(chip.lanes // width))
        return Tile(slices, words, groups, True)

    # -- products -------------------------------------------------------------------------------

    def words(self, value: str, layout: Layout, into: list[Buffer] | None) -> list[Buffer]:
        """The vectors of a linear in memory; into: where, if that matters."""
        place, op = self.low._op(value)
        known = [self._known.get((value, row.tobytes())) for row in layout]
        missing = [v for v, buffer in enumerate(known) if buffer is None or into is not None]
        if missing:
            outs = [into[v] if into is not None else None for v in missing]
            found = self._multiply(op, place, layout[missing], outs)
            for v, buffer in zip(missing, found, strict=True):
                self._known[value, layout[v].tobytes()] = known[v] = buffer
        return [buffer for buffer in known if buffer is not None]

    def _multiply(
        self, op: Op, place: int, layout: Layout, into: list[Buffer | None]
    ) -> list[Buffer]:
        x = self.rows(op.src[0])
        self.low.b.tag(f"{op.out} linear")
        by_rows = self._rows_are_fewer(op, x.layout, layout)
        found: list[Buffer] = []
        for first in range(0, len(layout), self._together()):
            block = layout[first : first + self._together()]
            sums: list[Buffer] = []
            segments = self._segments(x, len(block), by_rows)
            for n, groups in enumerate(segments):
                products = self._products(op, place, x, block, groups, by_rows)
                last = n == len(segments) - 1
                outs = [
                    (into[first + v] if last else None) or self.low.scratch()
                    for v in range(len(block))
                ]
                e = Expression()
                values = self._sums(e, op, place, x, block, groups, products, sums)
                for v, (value, out) in enumerate(zip(values, outs, strict=True)):
                    biased = last and len(op.params) > op.integer("weights", 1)
                    e.write(self._biased(e, place, block[v], value) if biased else value, out)
                sums = self.low.evaluate(e, *outs)
            found += sums
        return found

    def _together(self) -> int:
        """Output vectors of one expression; they share what they read of each group."""
        return max(1, _ELEMENTS_TOGETHER // self.low.rows)

    def _segments(self, x: Rows, vectors: int, by_rows: bool) -> list[list[int]]:
        """The groups, cut so that the products of a part leave half of the accumulators free."""
        groups = list(range(len(x.places)))
        planes = self.chip.planes if by_rows else self.chip.planes_per_hemisphere
        per_vector = self.chip.lanes // GROUP
        room = max(1, self.chip.accumulators // 2 // (self.low.rows * vectors))
        size = max(1, room // per_vector) * per_vector * planes if room >= per_vector else room
        return [groups[i : i + size] for i in range(0, len(groups), size)]

    def _products(
        self, op: Op, place: int, x: Rows, block: Layout, groups: list[int], by_rows: bool
    ) -> list[dict[int, Accumulator]]:
        """Per output vector and group the integer products."""
        products: list[dict[int, Accumulator]] = [{} for _ in block]
        waiting: dict[int, tuple[int, _Job]] = {}
        jobs = [self._jobs(op, place, x, outputs, groups, by_rows) for outputs in block]
        for turn in range(max(len(mine) for mine in jobs)):
            for v, mine in enumerate(jobs):
                if turn >= len(mine):
                    continue
                job = mine[turn]
                for tile in job.tiles:
                    load(self.low.b, job.plane, tile)
                if job.plane in waiting:
                    before, done = waiting.pop(job.plane)
                    self._act(x, done, products[before])
                install(self.low.b, job.plane)
                waiting[job.plane] = v, job
        for v, job in waiting.values():
            self._act(x, job, products[v])
        return products

    def _jobs(
        self, op: Op, place: int, x: Rows, outputs: Layout, groups: list[int], by_rows: bool
    ) -> list[_Job]:
        """The tiles of an output vector for some of the groups, each with a plane."""
        form = self._format(op, outputs)
        layered = self.low.layered
        found = []
        for k in dict.fromkeys(x.places[g].vector for g in groups):
            mine = [g for g in groups if x.places[g].vector == k]
            key = (place, k, outputs.tobytes())
            if key not in self.store.tiles:
                shared = not by_rows and self._is_turned(op)
                side = self.store.side_of(place, outputs) if shared else None
                size = self._filled(x.layout[k : k + 1] if by_rows else outputs[None])
                plane = self._next_plane(side, size)
                where = (outputs, plane, form)
                if by_rows:
                    tiles = self.store.by_rows(place, x.layout[k], *where, layered=layered)
                else:
                    tiles = self.store.by_columns(place, k, x.layout[k], *where, layered=layered)
                self.store.tiles[key] = tiles, plane
            tiles, plane = self.store.tiles[key]
            first = x.places[mine[0]].number
            found.append(_Job(k, first, len(mine), mine, tiles, plane))
        return found

    def _act(self, x: Rows, job: _Job, products: dict[int, Accumulator]) -> None:
        """The products of a tile with each of its groups."""
        rows, side = self.low.rows, self._side(job.plane)
        copies = part(x.sides[side][job.vector], job.first, rows, job.count)
        into = accumulators(self.low.b, job.plane, job.count * rows)
        done = act(self.low.b, into, copies, job.count * rows, add=False)
        for i, g in enumerate(job.groups):
            products[g] = replace(done, slot=done.slot + i * rows, ready=done.ready + i * rows)

    def _sums(
        self,
        e: Expression,
        op: Op,
        place: int,
        x: Rows,
        block: Layout,
        groups: list[int],
        products: list[dict[int, Accumulator]],
        before: list[Buffer],
    ) -> list[Node]:
        """numerics section 3, grouped: the running sums of output vectors over some groups."""
        scales = [self._halves(place, "scale", outputs, x) for outputs in block]
        minima = [
            self._halves(place, "minimum", outputs, x)
            if self._format(op, outputs) == "q4_1"
            else None
            for outputs in block
        ]
        y: list[Operand] = [Leaf(buffer) for buffer in before] or [0 for _ in block]
        for g in groups:
            scale = e.op("mov", Leaf(x.scales[g]))
            total: Node | None = None
            for v in range(len(block)):
                product = e.op("fmul", scale, e.op("htof", Leaf(scales[v][g])))
                dot = e.op("itof", Leaf(products[v][g]))
                y[v] = e.op("fadd", e.op("fmul", dot, product), y[v])
                minimum = minima[v]
                if minimum is not None:
                    assert x.sums is not None
                    total = total or e.op("mov", Leaf(x.sums[g]))
                    product = e.op("fmul", scale, e.op("htof", Leaf(minimum[g])))
                    y[v] = e.op("fadd", e.op("fmul", total, product), y[v])
        return [value for value in y if isinstance(value, Node)]

    def _halves(self, place: int, name: str, outputs: Layout, x: Rows) -> list[Buffer]:
        layered = self.low.layered
        return self.store.scales(place, name, outputs, len(x.places), layered=layered)

    def _biased(self, e: Expression, place: int, outputs: Layout, value: Node) -> Node:
        bias = self.low.constants.of_op(place, "bias", outputs, layered=self.low.layered)
        return e.op("fadd", value, Leaf(bias))

    def _format(self, op: Op, outputs: Layout) -> str:
        """The block format of an output vector's weights."""
        weights, _ = weights_and_biases(op)
        ends = np.cumsum([op.params[i].shape[0] for i in weights])
        which = {int(i) for i in np.searchsorted(ends, outputs[outputs >= 0], side="right")}
        forms = {op.params[weights[i]].format for i in which}
        if len(forms) != 1:
            raise UnsupportedModel(f"%{op.out}: one vector of outputs has weights in {forms}")
        return forms.pop()

    def _rows_are_fewer(self, op: Op, inputs: Layout, outputs: Layout) -> bool:
        """Whether storing by rows takes fewer words. What rope reads is wanted in two layouts,
        which share their columns."""
        rows = len(outputs) * self._filled(inputs)
        columns = len(inputs) * self._filled(outputs)
        if self._is_turned(op):
            columns -= self._filled(outputs)
        return rows < columns

    def _is_turned(self, op: Op) -> bool:
        """Whether a rope reads the op, by way of slices and norms."""
        for _, rope in self.low.ops.values():
            source = rope.src[0] if rope.kind == "rope" else ""
            while source in self.low.ops and source != op.out:
                before = self.low.ops[source][1]
                source = before.src[0] if before.kind in ("slice", "rmsnorm") else ""
            if source == op.out:
                return True
        return False

    def _filled(self, layout: Layout) -> int:
        width = self.chip.install_streams
        return int((layout.reshape(len(layout), -1, width) >= 0).any(axis=2).sum())

    def _side(self, plane: int) -> int:
        return int(plane >= self.chip.planes_per_hemisphere)

    def _next_plane(self, side: int | None, size: int = 1) -> int:
        """The plane with the least to load so far, of one side if it must; size: of what comes."""
        half = self.chip.planes_per_hemisphere
        planes = range(self.chip.planes) if side is None else range(side * half, side * half + half)
        plane = min(planes, key=lambda p: (self._loads[p], p % half, p))
        self._loads[plane] += size
        return plane


def part(buffer: Buffer, number: int, rows: int, count: int = 1) -> Buffer:
    """Copies number .. number + count - 1 of a buffer of copies, `rows` elements each."""
    at = number * rows
    return replace(
        buffer,
        words=tuple(word + at * buffer.step for word in buffer.words),
        count=count * rows,
        ready=buffer.ready + at * buffer.period,
    )


def one_byte(buffer: Buffer, b: int) -> Buffer:
    """Byte b of each element."""
    return replace(buffer, slices=buffer.slices[b : b + 1], words=buffer.words[b : b + 1])


def whole(buffer: Buffer, copies: list[Buffer], rows: int) -> Buffer:
    """A buffer of copies that are written, element after element when read one a cycle."""
    ready = max(
        copy.ready + max(0, (rows - 1) * (copy.period - 1)) - i * rows
        for i, copy in enumerate(copies)
    )
    return replace(buffer, ready=ready, period=1)
