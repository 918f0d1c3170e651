"""In: queries, keys and values of one layer. Out: tasks that append, attend chunk by chunk, merge.

The chunks of a sequence are cut into tiles of as many positions as the chip has lanes. A group of
chunks, one tile a plane where that is possible, is one run of a section; a step runs it as often as
the longest context needs. Tile u of a group lies in plane u mod P.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from openlpu.graph import Op
from openlpu.numerics.attention import DENOMINATOR_BITS, softmax_factor
from openlpu.numerics.quant import R127, TINY
from openlpu.schedule import layout as layouts
from openlpu.schedule.constants import BYTE, WORD
from openlpu.schedule.context import (
    FIRST_BASE,
    MINUS_INF,
    ROW_BASE,
    SCALE_BASE,
    SET_BASE,
    Cache,
    Geometry,
    State,
)
from openlpu.schedule.deliver import Send, Visit, deliver
from openlpu.schedule.expression import Accumulator, Expression, Leaf, Node, Operand, side_of
from openlpu.schedule.functions import as_node, exp2, quantization_scale, quantization_step
from openlpu.schedule.lower import FEW_VECTORS, Lowering
from openlpu.schedule.matrix import Tile, accumulators, act, install, load
from openlpu.schedule.memory import Buffer
from openlpu.schedule.ports import Ports


class Attention:
    """Lowers the attention of one layer, in three sections."""

    def __init__(self, g: Geometry, cache: Cache, state: State, ports: Ports) -> None:
        self.g = g
        self.cache = cache
        self.state = state
        self.ports = ports

    # -- before: queries, keys, values ----------------------------------------------------------

    def prepare(self, low: Lowering, op: Op) -> None:
        """Quantize the queries, append keys and values, and begin the sums."""
        g = self.g
        of_keys = layouts.keys(g.kv_heads, g.head_dim, low.chip)
        of_queries = layouts.queries(g.heads, g.kv_heads, g.head_dim, low.chip)
        for source, layout in ((op.src[1], of_keys), (op.src[2], of_keys), (op.src[0], of_queries)):
            low.prepare(source, layout)
        for v in range(g.vectors):
            low.b.tag(f"{op.out} append")
            key = self._stored(low, op.src[1], of_keys, v)
            value = self._stored(low, op.src[2], of_keys, v)
            for j in range(g.share):
                self._query(low, op.src[0], of_queries, v, j)
            low.b.tag(f"{op.out} append")
            self._append(low, v, key, value)
        low.b.tag(f"{op.out} begin")
        for v in range(g.vectors):
            for j in range(g.share):
                e = Expression()
                e.write(e.op("mov", MINUS_INF), self.state.top[v, j])
                e.write(e.op("mov", 0), self.state.sums[v, j])
                e.write(e.op("mov", 0), self.state.out[v, j])
                low.evaluate(e)

    def _mask(self, low: Lowering, v: int, h: int) -> Buffer | None:
        """The lanes of a head, or None where its vector has no other."""
        if self.g.heads_of(v) == 1 and self.g.head_dim == self.g.lanes:
            return None
        lanes = np.arange(self.g.lanes)
        return low.mask(lanes // self.g.head_dim == h)

    def _query(self, low: Lowering, source: str, layout: layouts.Layout, v: int, j: int) -> None:
        g = self.g
        factor = float(np.float32(softmax_factor(g.head_dim)))
        masks = [self._mask(low, v, h) for h in range(g.heads_of(v))]
        word, tops = low.vector_with_tops(source, layout, v * g.share + j, masks)
        for h, (mask, amax) in enumerate(zip(masks, tops, strict=True)):
            e = Expression()
            limited, step = quantization_step(e, Leaf(amax))
            x: Operand = Leaf(word)
            if mask is not None:
                x = e.op("and", x, Leaf(mask))
            e.write(e.op("ftoi", e.op("fmul", x, step)), *self.state.queries[v, h, j])
            scale = e.op("fmul", quantization_scale(e, limited), factor)
            e.write(scale, self.state.scales[v, h, j])
            low.evaluate(e)

    def _stored(
        self, low: Lowering, source: str, layout: layouts.Layout, v: int
    ) -> tuple[Buffer, list[Buffer]]:
        """A key or value vector as bytes, and the scale of each of its heads."""
        masks = [self._mask(low, v, h) for h in range(self.g.heads_of(v))]
        word, tops = low.vector_with_tops(source, layout, v, masks)
        e = Expression()
        total: Operand | None = None
        scales = []
        for mask, top in zip(masks, tops, strict=True):
            limited, step = quantization_step(e, Leaf(top))
            x: Operand = Leaf(word)
            if mask is not None:
                x = e.op("and", x, Leaf(mask))
            q = e.op("ftoi", e.op("fmul", x, step))
            total = q if total is None else e.op("add", total, q)
            scales.append(low.scratch())
            e.write(quantization_scale(e, limited), scales[-1])
        assert total is not None
        out = low.scratch(BYTE)
        e.write(total, out)
        *scales, out = low.evaluate(e, *scales, out)
        return out, scales

    def _append(
        self,
        low: Lowering,
        v: int,
        key: tuple[Buffer, list[Buffer]],
        value: tuple[Buffer, list[Buffer]],
    ) -> None:
        """Send the new position's vectors past every slice that may keep them."""
        g, chip = self.g, low.chip
        first = chip.latency.base_load  # the earliest cycle at which a base holds
        for u in range(g.units):
            address, lane = self.ports.key_address(u)
            slices = self.cache.slices[u]
            top = self._limit(low, (*self.cache.keys[v, u], *self.cache.values[v, u]))
            bases = [
                Visit(s, "setbase", base=SET_BASE, lane=lane + 2 * i, limit=top)
                for i, s in enumerate(slices)
            ]
            writes = [
                [Visit(s, "write", word=words[i], base=SET_BASE) for i, s in enumerate(slices)]
                for words in (self.cache.keys[v, u], self.cache.values[v, u])
            ]
            deliver(
                low.b,
                [
                    Send(0, address, bases),
                    Send(first, key[0], writes[0]),
                    Send(first + 1, value[0], writes[1]),
                ],
                low.rows,
                first + 2,
            )
            self._append_scales(low, v, u, key[1], value[1])

    def _limit(self, low: Lowering, words: tuple[int, ...]) -> int:
        """The largest base that keeps every word in its bank."""
        bank = low.chip.words_per_bank
        return min(bank - 1 - word % bank for word in words)

    def _append_scales(
        self, low: Lowering, v: int, u: int, keys: list[Buffer], values: list[Buffer]
    ) -> None:
        address, lane = self.ports.scale_address(u)
        slices = self.cache.scale_slices[u]
        kept = [self.cache.key_scales[v, h, u] for h in range(len(keys))]
        kept += [self.cache.value_scales[v, h, u] for h in range(len(values))]
        top = self._limit(low, tuple(word for words in kept for word in words))
        bases = [Visit(s, "setbase", base=SET_BASE, lane=lane, limit=top) for s in slices]
        sends = [Send(0, address, bases)]
        at = low.chip.latency.base_load
        together = 2 if low.chip.slices_per_hop % 2 == 0 else 1  # slices at one position
        for scale, words in zip([*keys, *values], kept, strict=True):
            for b in range(0, WORD, together):
                part = slice(b, b + together)
                some = replace(scale, slices=scale.slices[part], words=scale.words[part])
                # from the other side than the scale: both are fetched at the same time
                lane_map = self.ports.lane_map(1 - side_of(scale, low.chip))
                sends.append(Send(at, lane_map, []))
                visits = [
                    Visit(slices[b + i], "scatter", part=i, word=words[b + i], base=SET_BASE)
                    for i in range(together)
                ]
                sends.append(Send(at, some, visits, with_map=len(sends) - 1))
                at += 1
        deliver(low.b, sends, low.rows, at)

    # -- a group of chunks ----------------------------------------------------------------------

    def attend(self, low: Lowering, op: Op) -> None:
        """One group of chunks: scores, weights, weighted values, merged into the sums."""
        for v in range(self.g.vectors):
            self._vector(low, op, v)

    def _side(self, low: Lowering, u: int) -> int:
        return int(u % self.g.planes >= low.chip.planes_per_hemisphere)

    def _tile(self, low: Lowering, v: int, u: int, *, values: bool) -> Tile:
        kept = self.cache.values if values else self.cache.keys
        groups = ((0, 0, self.g.tile_words(u)),)
        return Tile(self.cache.slices[u], kept[v, u], groups, values, self.g.key_base(u))

    def _rows(self, buffer: Buffer) -> Buffer:
        """Rows of this sequence of a lasting buffer."""
        return replace(buffer, base=ROW_BASE)

    def _vector(self, low: Lowering, op: Op, v: int) -> None:
        g = self.g
        pairs = [(j, h) for j in range(g.share) for h in range(g.heads_of(v))]
        low.b.tag(f"{op.out} scores")
        scores = self._products_of_keys(low, v, pairs)
        tops: dict[tuple[int, int, int], Buffer] = {}
        weights = {}
        largest: dict[tuple[int, int, int], Buffer] = {}
        # Waves, so that the latencies of one hide behind the work of another. While the first ones'
        # maxima are found, and the last one's, the VXM waits: there each vector goes alone.
        waves = [
            [(j, h, c) for h in range(g.heads_of(v)) for c in range(g.chunks_per_group)]
            for j in range(g.share)
        ]
        words: dict[tuple[int, int, int], list[Buffer]] = {}
        for wave in waves:
            low.b.tag(f"{op.out} scores")
            places = low.places_for_maxima(len(wave), alone=wave is not waves[-1])
            scaled = [
                self._scaled(low, op, v, *key, scores, place)
                for key, place in zip(wave, places, strict=True)
            ]
            words.update(zip(wave, (w for w, _ in scaled), strict=True))
            low.b.tag(f"{op.out} softmax")
            found = low.maxima([place for _, place in scaled], "fmax")
            tops.update(zip(wave, found, strict=True))
        for wave in waves:
            low.b.tag(f"{op.out} softmax")
            places = low.places_for_maxima(len(wave), alone=wave is waves[-1])
            for key, place in zip(wave, places, strict=True):
                weights[key] = self._weights(low, v, key[1], key[2], words[key], tops[key], place)
            low.b.tag(f"{op.out} values")
            found = low.maxima([weights[key][2] for key in wave], "max")
            largest.update(zip(wave, found, strict=True))
        low.b.tag(f"{op.out} sum of weights")
        totals = self._totals(low, {key: entry[1] for key, entry in weights.items()})
        low.b.tag(f"{op.out} values")
        sums = self._products_of_values(low, v, weights, largest)
        low.b.tag(f"{op.out} rescale")  # early enough: it fills what the products leave free
        factors = [self._rescale(low, v, j, tops) for j in range(g.share)]
        low.b.tag(f"{op.out} merge")
        for j in range(g.share):
            self._merge(low, v, j, factors[j], largest, totals, sums)

    def _products_of_keys(
        self, low: Lowering, v: int, pairs: list[tuple[int, int]]
    ) -> dict[tuple[int, int, int], Accumulator]:
        """(share, head, unit) -> integer scores of the unit's positions."""
        g = self.g
        found = {}
        for u in range(g.units):
            plane = u % g.planes
            load(low.b, plane, self._tile(low, v, u, values=False))
            install(low.b, plane)
            for j, h in pairs:
                x = self._rows(self.state.queries[v, h, j][self._side(low, u)])
                into = accumulators(low.b, plane, low.rows)
                found[j, h, u] = act(low.b, into, x, low.rows, add=False)
        return found

    def _units(self, c: int) -> list[int]:
        return [c * self.g.tiles_per_chunk + i for i in range(self.g.tiles_per_chunk)]

    def _scaled(
        self,
        low: Lowering,
        op: Op,
        v: int,
        j: int,
        h: int,
        c: int,
        scores: dict[tuple[int, int, int], Accumulator],
        place_of_top: tuple[Buffer, ...],
    ) -> tuple[list[Buffer], tuple[Buffer, ...]]:
        """Visible scores as words per tile (-inf where hidden), and their maximum."""
        e = Expression()
        position = Leaf(self._rows(self.ports.position()))
        first = self.ports.first_visible()
        top: Operand | None = None
        outs = []
        for u in self._units(c):
            scale = Buffer(
                self.cache.scale_slices[u], self.cache.key_scales[v, h, u], 1, 0, SCALE_BASE
            )
            product = e.op("fmul", Leaf(self._rows(self.state.scales[v, h, j])), Leaf(scale))
            t = e.op("fmul", e.op("itof", Leaf(scores[j, h, u])), product)
            place = Leaf(self.cache.places[u])
            visible = e.op("le", place, position)
            if first is not None:
                after_first = e.op("le", Leaf(replace(first, base=FIRST_BASE)), place)
                visible = e.op("and", visible, after_first)
            t = e.op("sel", visible, t, MINUS_INF)
            outs.append(low.scratch())
            e.write(t, outs[-1])
            top = t if top is None else e.op("fmax", top, t)
        assert top is not None
        e.write(top, *place_of_top)
        done = low.evaluate(e, *outs, *place_of_top)
        return done[: len(outs)], tuple(done[len(outs) :])

    def _weights(
        self,
        low: Lowering,
        v: int,
        h: int,
        c: int,
        words: list[Buffer],
        top: Buffer,
        place_of_largest: tuple[Buffer, ...],
    ) -> tuple[list[Buffer], list[list[Buffer]], tuple[Buffer, ...]]:
        """Per tile: weights times value scales; limbs of the denominator; the largest weight."""
        e = Expression()
        largest: Operand | None = None
        outs, limbs = [], []
        for i, u in enumerate(self._units(c)):
            t = Leaf(words[i])
            power = exp2(e, e.op("fsub", t, Leaf(top)), below_zero=True)
            hidden = e.op("eq", t, MINUS_INF)  # not kept from the start: it is read again
            power = e.op("sel", hidden, 0, power)
            total = e.op("ftoi", e.op("fmul", power, float(2**DENOMINATOR_BITS)))
            side = self._side(low, u)
            for k in range(3):
                limbs.append(low.scratch(BYTE, side=side, outer=True))
                e.write(total, limbs[-1])
                if k < 2:
                    total = e.op("shr", e.op("add", total, 128), 8)
            scale = Buffer(
                self.cache.scale_slices[u], self.cache.value_scales[v, h, u], 1, 0, SCALE_BASE
            )
            w = e.op("sel", hidden, 0, e.op("fmul", power, Leaf(scale)))
            outs.append(low.scratch())
            e.write(w, outs[-1])
            largest = w if largest is None else e.op("max", largest, w)
        assert largest is not None
        e.write(largest, *place_of_largest)
        done = low.evaluate(e, *outs, *limbs, *place_of_largest)
        n = len(outs)
        for word in words:
            low.memory.give_back(word, _over(done, low.rows))
        tiles = [done[n + 3 * i : n + 3 * i + 3] for i in range(n)]
        return done[:n], tiles, tuple(done[4 * n :])

    def _totals(
        self, low: Lowering, limbs: dict[tuple[int, int, int], list[list[Buffer]]]
    ) -> dict[tuple[int, int, int], Buffer]:
        """The exact sums of weights, as integers in every lane."""
        g = self.g
        for plane in range(min(g.planes, g.units)):
            load(low.b, plane, low.ones(plane))
            install(low.b, plane)
        found = {}
        for key, tiles in limbs.items():
            e = Expression()
            total: Operand | None = None
            for i, u in enumerate(self._units(key[2])):
                plane = u % g.planes
                for k, limb in enumerate(tiles[i]):
                    into = accumulators(low.b, plane, low.rows)
                    part: Operand = Leaf(act(low.b, into, limb, low.rows, add=False))
                    if k:
                        part = e.op("shl", part, 8 * k)
                    total = part if total is None else e.op("add", total, part)
            assert total is not None
            out = low.scratch()
            e.write(total, out)
            found[key] = low.evaluate(e, out)[0]
        return found

    def _products_of_values(
        self,
        low: Lowering,
        v: int,
        weights: dict[
            tuple[int, int, int],
            tuple[list[Buffer], list[list[Buffer]], tuple[Buffer, ...]],
        ],
        largest: dict[tuple[int, int, int], Buffer],
    ) -> dict[tuple[int, int, int], list[Accumulator]]:
        """(share, head, chunk) -> sums of 7-bit weights times values."""
        g = self.g
        bytes_of: dict[tuple[int, int, int], list[Buffer]] = {}
        for key, (words, _, _) in weights.items():
            e = Expression()
            top = Leaf(largest[key])
            usable = e.op("fle", float(TINY), top)
            step = e.op("sel", usable, e.op("fdiv", 127.0, top), 0)
            outs = []
            for i, u in enumerate(self._units(key[2])):
                outs.append(low.scratch(BYTE, side=self._side(low, u), outer=True))
                e.write(e.op("ftoi", e.op("fmul", Leaf(words[i]), step)), outs[-1])
            bytes_of[key] = low.evaluate(e, *outs)
            for word in words:
                low.memory.give_back(word, _over(bytes_of[key], low.rows))
        sums: dict[tuple[int, int, int], list[Accumulator]] = {key: [] for key in weights}
        for u in range(g.units):
            plane = u % g.planes
            c, i = divmod(u, g.tiles_per_chunk)
            load(low.b, plane, self._tile(low, v, u, values=True))
            install(low.b, plane)
            for key in weights:
                if key[2] == c:
                    into = accumulators(low.b, plane, low.rows)
                    sums[key].append(act(low.b, into, bytes_of[key][i], low.rows, add=False))
        return sums

    def _rescale(
        self, low: Lowering, v: int, j: int, tops: dict[tuple[int, int, int], Buffer]
    ) -> list[tuple[Buffer, Buffer]]:
        """Per chunk: what the sums so far, and the chunk's own, are multiplied by; the new maximum.

        Of the two powers of numerics section 6 one is 2^0. The first chunk that is seen at all
        takes the place of the sums (0 and 1), one that is not seen changes nothing (1 and 0)."""
        e = Expression()
        state = self._rows(self.state.top[v, j])
        highest = e.op("mov", Leaf(state))
        known = [low.scratch()]  # the maximum before each chunk, and the last one
        e.write(highest, known[0])
        own = []  # each chunk's
        for c in range(self.g.chunks_per_group):
            parts = {k: [Leaf(b)] for k, b in tops.items()}
            m = as_node(e, self._of_heads(low, e, v, j, c, parts))
            own.append(low.scratch())
            e.write(m, own[-1])
            highest = e.op("fmax", highest, m)
            known.append(low.scratch())
            e.write(highest, known[-1])
        e.write(highest, state)
        found = low.evaluate(e, *known, *own)
        known, own = found[: len(known)], found[len(known) :]
        return [
            self._factors(low, before, m, after)
            for before, m, after in zip(known, own, known[1:], strict=False)
        ]

    def _factors(
        self, low: Lowering, before: Buffer, own: Buffer, highest: Buffer
    ) -> tuple[Buffer, Buffer]:
        """What the sums before a chunk, and its own, are multiplied by; from maxima."""
        e = Expression()
        top, m = Leaf(before), Leaf(own)
        rises = e.op("flt", top, m)
        z = exp2(e, e.op("fsub", e.op("sel", rises, top, m), Leaf(highest)), below_zero=True)
        idle, fresh = e.op("eq", m, MINUS_INF), e.op("eq", top, MINUS_INF)
        again = e.op("flt", top, m)  # not kept: its operands are read again
        # 2^0, or 2^-126 where the maximum is a NaN
        one = e.op("sel", e.op("fle", Leaf(highest), Leaf(highest)), 1.0, 2.0**-126)
        outs = low.scratch(), low.scratch()
        e.write(e.op("sel", fresh, 0, e.op("sel", again, z, one)), outs[0])
        e.write(e.op("sel", idle, 0, e.op("sel", again, one, z)), outs[1])
        x, y = low.evaluate(e, *outs)
        return x, y

    def _merge(
        self,
        low: Lowering,
        v: int,
        j: int,
        factors: list[tuple[Buffer, Buffer]],
        largest: dict[tuple[int, int, int], Buffer],
        totals: dict[tuple[int, int, int], Buffer],
        sums: dict[tuple[int, int, int], list[Accumulator]],
    ) -> None:
        """Chunks in order into the running sum and output of a query vector."""
        e = Expression()
        state = [self._rows(kept[v, j]) for kept in (self.state.sums, self.state.out)]
        total, out = (e.op("mov", Leaf(buffer)) for buffer in state)
        for c, pair in enumerate(factors):
            a, l, o = (
                self._of_heads(low, e, v, j, c, part)
                for part in (
                    {k: [Leaf(b)] for k, b in largest.items()},
                    {k: [Leaf(b)] for k, b in totals.items()},
                    {k: [Leaf(s) for s in found] for k, found in sums.items()},
                )
            )
            x, y = (Leaf(buffer) for buffer in pair)
            o = e.op("fmul", e.op("itof", o), e.op("fmul", a, float(R127)))
            l = e.op("fmul", e.op("itof", l), float(2.0**-DENOMINATOR_BITS))
            total = e.op("fadd", e.op("fmul", total, x), e.op("fmul", l, y))
            out = e.op("fadd", e.op("fmul", out, x), e.op("fmul", o, y))
        for value, buffer in zip((total, out), state, strict=True):
            e.write(value, buffer)
        low.evaluate(e)

    def _of_heads(
        self,
        low: Lowering,
        e: Expression,
        v: int,
        j: int,
        c: int,
        part: dict[tuple[int, int, int], list[Leaf]],
    ) -> Operand:
        """What belongs to each head, in its lanes; several leaves of a head are added."""
        found: Operand | None = None
        for h in range(self.g.heads_of(v)):
            value: Operand = part[j, h, c][0]
            for more in part[j, h, c][1:]:
                value = e.op("add", value, more)
            if found is None:
                found = value
            else:
                mask = self._mask(low, v, h)
                assert mask is not None
                found = e.op("sel", Leaf(mask), value, found)
        assert found is not None
        return found

    # -- after ----------------------------------------------------------------------------------

    def finish(self, low: Lowering, op: Op) -> None:
        """The attention's rows, divided by their sums."""
        g = self.g
        of_queries = layouts.queries(g.heads, g.kv_heads, g.head_dim, low.chip)
        low.b.tag(f"{op.out} divide")
        outs: list[Buffer] = []
        keys = [(v, j) for v in range(g.vectors) for j in range(g.share)]
        together = len(keys) if len(keys) <= FEW_VECTORS else 1
        for first in range(0, len(keys), together):
            e = Expression()
            sizes: Operand | None = None
            buffers = []
            for v, j in keys[first : first + together]:
                inverse = e.op("fdiv", 1.0, Leaf(self.state.sums[v, j]))
                used = _used(low, of_queries[v * g.share + j])
                y: Node = e.op("fmul", Leaf(self.state.out[v, j]), inverse)
                if used is not None:
                    y = e.op("and", y, Leaf(used))
                size = e.op("and", y, 0x7FFFFFFF)
                sizes = size if sizes is None else e.op("max", sizes, size)
                buffers.append(low.scratch())
                e.write(y, buffers[-1])
            assert sizes is not None
            pair = low.both_sides()
            e.write(sizes, *pair)
            *found, west, east = low.evaluate(e, *buffers, *pair)
            outs += found
            if together == len(keys):
                low.know_top(op.out, of_queries, (west, east))
        low.know(op.out, of_queries, outs)
        low.outside[op.out] = (g.heads * g.head_dim, of_queries)


def _over(written: list[Buffer], rows: int) -> int:
    """The cycle at which an expression that wrote these buffers is over."""
    return max(buffer.ready + (rows - 1) * buffer.period for buffer in written)


def _used(low: Lowering, row: layouts.Layout) -> Buffer | None:
    """A mask of the lanes in use, or None where all are."""
    return None if (row >= 0).all() else low.mask(row >= 0)
