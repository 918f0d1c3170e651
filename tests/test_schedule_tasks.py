"""In: random expressions, vectors, weights. Out: what their tasks leave in memory is numpy's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from chip_models import CHIPS, TINY, Bench, cut_to, random_words
from numpy.typing import NDArray

from openlpu import isa
from openlpu.chip import Chip, load_chip
from openlpu.numerics.functions import hadamard_blocks, swiglu
from openlpu.numerics.quant import linear, quantize, quantize_weight
from openlpu.schedule.expression import (
    CannotWaitError,
    Expression,
    Leaf,
    Node,
    Operand,
    arrange,
    side_of,
)
from openlpu.schedule.matrix import Tile, accumulators, act, install, load
from openlpu.schedule.maxima import can_group, group_sizes, reduce_group
from openlpu.schedule.memory import Buffer, Memory
from openlpu.schedule.mlp import build_mlp
from openlpu.schedule.reduce import reduce_lanes
from openlpu.schedule.weights import WeightStore, ranges
from openlpu.sim import ports
from openlpu.sim.step import Step

I32 = NDArray[np.int32]
I8 = NDArray[np.int8]
SMALL_HISTORY = replace(TINY, history_cycles=24, alus=8)


# -- expressions, arranged


def random_expression(
    rng: random.Random, leaves: Sequence[Leaf], outputs: Sequence[Buffer], size: int
) -> Expression:
    """Operations on leaves, immediates, and values made long ago or a moment before."""
    e = Expression()
    values: list[Operand] = list(leaves)

    def operand() -> Operand | float:
        if rng.random() < 0.12:
            return rng.choice((0, 1, -1, 31, 127, 8388608, -(1 << 31), 0.5, -2.0, 1e30))
        return rng.choice(values[-6:] if rng.random() < 0.7 else values)

    names = list(isa.ALU)
    for _ in range(size):
        name = rng.choice(names)
        values.append(e.op(name, *(operand() for _ in range(isa.ALU[name].operands))))
    made = [value for value in values if isinstance(value, Node)]
    for buffer in outputs:
        e.write(rng.choice((*made[-8:], *values[-2:], rng.choice(values))), buffer)
    return e


def results(nodes: Sequence[Node], held: Mapping[int, I32], shape: I32) -> dict[Buffer, I32]:
    """What each output gets, by the operations' declarations. held: by the identity of a leaf."""
    known: dict[int, I32] = {}
    found: dict[Buffer, I32] = {}
    with np.errstate(all="ignore"):
        for node in nodes:
            args = [
                known[id(arg)]
                if isinstance(arg, Node)
                else held[id(arg)]
                if isinstance(arg, Leaf)
                else np.full_like(shape, arg)
                for arg in node.args
            ]
            known[id(node)] = isa.ALU[node.op].compute(*args)
            for buffer in node.outputs:
                assert buffer not in found
                found[buffer] = cut_to(known[id(node)], buffer.width)
    return found


def spread_over(rng: random.Random, bench: Bench, count: int, n: int) -> list[Buffer]:
    return [
        bench.room(
            rng.choice((1, 2, 4, 4)),
            count,
            side=rng.choice((None, 0, 1)),
            outer=rng.random() < 0.5,
        )
        for _ in range(n)
    ]


def demand_legal(nodes: Sequence[Node], chip: Chip, interval: int, alus: int) -> None:
    """Dependencies, histories, and what each cycle of the interval has room for."""
    used = Counter[tuple[object, ...]]()
    limits = {
        "alu": alus,
        "read": 1,
        "write": 1,
        "bank": 1,
        "in": chip.streams,
        "out": chip.streams,
    }
    for node in nodes:
        ready = node.at + isa.latency(chip, isa.KINDS[node.op])
        assert ready <= 0
        used["alu", node.at % interval] += 1
        assert len({arg for arg in node.args if isinstance(arg, int)}) <= 1
        for arg in node.args:
            if isinstance(arg, Node):
                made = arg.at + isa.latency(chip, isa.KINDS[arg.op])
                assert 0 <= node.at - made < chip.history_cycles
            elif isinstance(arg, Leaf):
                assert isinstance(arg.source, Buffer)
                used["in", side_of(arg.source, chip), node.at % interval] += arg.width
                for s, word in zip(arg.source.slices, arg.source.words, strict=True):
                    hops = abs(chip.mem_position(s) - chip.vxm_position)
                    when = (node.at - hops - chip.latency.mem_read) % interval
                    used["read", s, when] += 1
                    used["bank", s, word // chip.words_per_bank, when] += 1
        assert len({buffer.width for buffer in node.outputs}) <= 1
        assert len({side_of(buffer, chip) for buffer in node.outputs}) == len(node.outputs)
        for buffer in node.outputs:
            used["out", side_of(buffer, chip), ready % interval] += buffer.width
            for s, word in zip(buffer.slices, buffer.words, strict=True):
                when = (ready + abs(chip.mem_position(s) - chip.vxm_position)) % interval
                used["write", s, when] += 1
                used["bank", s, word // chip.words_per_bank, when] += 1
    for key, amount in used.items():
        assert amount <= limits.get(str(key[0]), 1), key


@pytest.mark.parametrize("chip", [TINY, SMALL_HISTORY, CHIPS["slow"]], ids=["tiny", "few", "slow"])
@pytest.mark.parametrize("seed", range(3))
def test_arranged_expressions_are_legal_and_mean_the_same(chip: Chip, seed: int) -> None:
    rng = random.Random(f"arrange {seed}")
    numbers = np.random.default_rng(seed)
    refused = 0
    for size in (1, 2, 4, 8, 15, 30, 60, 100):
        count, alus = rng.choice((1, 2, 9)), rng.choice((chip.alus, chip.alus - 3, 2))
        bench = Bench(chip)
        leaves = [Leaf(buffer) for buffer in spread_over(rng, bench, count, rng.randint(1, 6))]
        outputs = spread_over(rng, bench, count, rng.randint(1, 4))
        e = random_expression(rng, leaves, outputs, size)
        before = [(node, list(node.args), list(node.outputs), node.at) for node in e.nodes]
        try:
            nodes, interval = arrange(e, chip, count, alus)
        except CannotWaitError:
            refused += 1
            continue
        after = [(node, list(node.args), list(node.outputs), node.at) for node in e.nodes]
        assert after == before, "the expression is left as it is"
        assert nodes == sorted(nodes, key=lambda node: node.at)
        if count == 1:
            assert interval == 1
        else:
            assert interval * alus >= len(nodes)
        demand_legal(nodes, chip, interval if count > 1 else 1 << 30, alus)
        held = {id(leaf): random_words(numbers, 1, 8) for leaf in leaves}
        shape = np.zeros((1, 8), np.int32)
        wanted, found = results(e.nodes, held, shape), results(nodes, held, shape)
        assert set(found) == set(outputs) == set(wanted)
        for buffer in outputs:
            assert np.array_equal(found[buffer], wanted[buffer])
    assert refused <= (3 if chip is SMALL_HISTORY else 0)


# -- expressions, on the chip


@pytest.mark.parametrize("name", ["tiny", "superlanes 6", "slow", "regions"])
@pytest.mark.parametrize("seed", range(4))
def test_evaluated_expressions(name: str, seed: int) -> None:
    """Several in one section, later ones on what earlier ones wrote."""
    rng, numbers = random.Random(f"evaluate {name} {seed}"), np.random.default_rng(seed)
    count, chip = rng.choice((1, 1, 2, 5, 17)), CHIPS[name]
    bench = Bench(chip)
    values: dict[Buffer, I32] = {}
    for _ in range(rng.randint(1, 4)):
        width = rng.choice((1, 2, 4, 4))
        words = random_words(numbers, count, chip.lanes)
        buffer = bench.hold(words, width, side=rng.choice((None, 0, 1)))
        values[buffer] = cut_to(words, width)
    for _ in range(rng.randint(1, 4)):
        known = list(values)
        leaves = [Leaf(buffer) for buffer in rng.sample(known, rng.randint(1, len(known)))]
        outputs = spread_over(rng, bench, count, rng.randint(1, 3))
        e = random_expression(rng, leaves, outputs, rng.choice((1, 3, 10, 40)))
        held = {id(leaf): values[leaf.source] for leaf in leaves if isinstance(leaf.source, Buffer)}
        found = results(e.nodes, held, next(iter(values.values())))
        written = bench.builder.evaluate(e, count, earliest=rng.choice((0, 0, 50)))
        assert set(written) == set(outputs)
        for old, new in written.items():
            assert new == replace(old, ready=new.ready, period=new.period)
            values.pop(old, None)
            values[new] = found[old]
    for wanted, got in zip(values.values(), bench.run(*values), strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize("count", [1, 2, 6, 7, 40])
def test_sums_in_place(count: int) -> None:
    """A buffer is read and written by one expression, thrice."""
    numbers, bench = np.random.default_rng(count), Bench(TINY)
    wanted, step = (random_words(numbers, count, TINY.lanes) for _ in range(2))
    total = bench.hold(wanted, side=0)
    more = bench.hold(step, side=1)
    for _ in range(3):
        e = Expression()
        value = e.op("xor", e.op("add", e.op("mul", Leaf(total), 3), Leaf(more)), Leaf(total))
        wanted = (wanted * np.int32(3) + step) ^ wanted
        e.write(value, total)
        total = bench.builder.evaluate(e, count)[total]
    assert np.array_equal(bench.run(total)[0], wanted)


def test_an_expression_waits_until_its_inputs_are_there() -> None:
    """A slow writer, then a reader that would be faster."""
    bench, count = Bench(TINY), 30
    rng = np.random.default_rng(0)
    words = random_words(rng, count, TINY.lanes)
    source, middle, end = bench.hold(words), bench.room(4, count), bench.room(4, count)
    e = Expression()
    value: Operand = Leaf(source)
    for _ in range(40):  # on 16 ALUs: an element every third cycle
        value = e.op("add", value, 1)
    e.write(value, middle)
    middle = bench.builder.evaluate(e, count)[middle]
    assert middle.period >= 3
    e = Expression()
    e.write(Leaf(middle), end)
    end = bench.builder.evaluate(e, count)[end]
    assert end.period == 1
    assert end.ready + (count - 1) * end.period > middle.ready + (count - 1) * middle.period
    assert np.array_equal(bench.run(end)[0], words + np.int32(40))


# -- across lanes


@pytest.mark.parametrize(
    ("name", "segments"),
    [("tiny", (16, 32)), ("superlanes 4", (16, 32, 64)), ("superlanes 6", (16, 32, 48, 96))],
)
@pytest.mark.parametrize("op", ["max", "fmax"])
def test_maxima_over_lanes(name: str, segments: tuple[int, ...], op: str) -> None:
    chip, numbers = CHIPS[name], np.random.default_rng(3)
    for segment in segments:
        for count, sides in ((1, (0,)), (4, (1,)), (23, (0, 1))):
            bench = Bench(chip)
            words = random_words(numbers, count, chip.lanes)
            if op == "fmax":  # of zeros the sign is not promised, and a NaN is everywhere
                words[words == -(1 << 31)] = 0
                words[:, : chip.lanes // 2] &= np.int32(0x7F7FFFFF)
            west, east = (bench.hold(words, side=side, outer=True) for side in (0, 1))
            outs = tuple(bench.room(4, count, side=side) for side in sides)
            first = reduce_lanes(bench.builder, west, east, op, segment, count, outs)
            again = tuple(bench.room(4, count, side=side) for side in sides)
            second = reduce_lanes(bench.builder, west, east, op, segment, count, again)
            parts = words.reshape(count, -1, segment)
            if op == "max":
                top = parts.max(axis=2)
            else:
                top = parts.view(np.float32).max(axis=2)
                top = np.where(np.isnan(top), np.float32(np.nan), top).view(np.int32)
            wanted = np.repeat(top, segment, axis=1)
            for found in bench.run(*first, *second):
                assert np.array_equal(found, wanted), (segment, count)


@pytest.mark.parametrize(
    ("name", "segments"),
    [("tiny", (16, 32)), ("superlanes 6", (16, 48, 96)), ("slices 48", (32,)), ("slow", (32,))],
)
@pytest.mark.parametrize("op", ["max", "fmax"])
def test_maxima_of_a_group(name: str, segments: tuple[int, ...], op: str) -> None:
    """Groups of all kinds of sizes; what stands in the lanes of absent vectors disturbs nobody."""
    chip, numbers = CHIPS[name], np.random.default_rng(4)
    for segment in segments:
        for count, n in ((1, 4), (1, 11), (1, 16), (5, 6), (23, 16)):
            bench = Bench(chip)
            values = [random_words(numbers, count, chip.lanes) for _ in range(n)]
            places = bench.memory.scratch_apart(n, count, n % 2)
            for words, place in zip(values, places, strict=True):
                if op == "fmax":
                    words[words == -(1 << 31)] = 0
                    words[:, : chip.lanes // 2] &= np.int32(0x7F7FFFFF)
                bench.hold_at(place, words)
            found = reduce_group(bench.builder, places, op, segment, count)
            for words, got in zip(values, bench.run(*found), strict=True):
                parts = words.reshape(count, -1, segment)
                if op == "max":
                    top = parts.max(axis=2)
                else:
                    top = parts.view(np.float32).max(axis=2)
                    top = np.where(np.isnan(top), np.float32(np.nan), top).view(np.int32)
                assert np.array_equal(got, np.repeat(top, segment, axis=1)), (segment, count, n)


def test_sizes_of_groups() -> None:
    assert group_sizes(36, TINY) == [12, 12, 12]
    assert group_sizes(17, TINY) == [9, 8]
    assert group_sizes(16, TINY) == [16]
    assert group_sizes(3, TINY) == [1, 1, 1], "too few for four quads"
    few_slices = replace(TINY, slices_per_hemisphere=12)
    assert not can_group(few_slices)
    assert group_sizes(16, few_slices) == [1] * 16


# -- products


def plane_weights(words: Mapping[tuple[int, int], I8], tiles: Sequence[Tile], chip: Chip) -> I8:
    """A plane's weights [rows, columns] after the tiles are loaded, from memory's words."""
    plane = np.zeros((chip.lanes, chip.lanes), np.int8)
    for tile in tiles:
        for group, at, count in tile.groups:
            for i in range(count):
                for j, (s, word) in enumerate(zip(tile.slices, tile.words, strict=True)):
                    index = (group + i) * chip.install_streams + j
                    vector = words[s, word + at + i]
                    if tile.row:
                        plane[index] = vector
                    else:
                        plane[:, index] = vector
    return plane


def test_an_install_waits_for_every_part_of_a_tile() -> None:
    """The part that is asked for last may come first, when others keep the other one's slices."""
    chip = load_chip("tsp_v1")
    bench = Bench(chip)
    width = chip.install_streams
    busy, free = (tuple(range(at, at + width)) for at in (0, chip.slices_per_hemisphere - width))
    groups = chip.lanes // width

    def tile(slices: tuple[int, ...], first: int, count: int) -> Tile:
        return Tile(slices, (0,) * width, ((first, 0, count),), True)

    for _ in range(20):
        load(bench.builder, 1, tile(busy, 0, groups))
        bench.builder.planes[1].installed = -1  # nothing but keeps the slices busy
    load(bench.builder, 0, tile(busy, 0, 1))
    load(bench.builder, 0, tile(free, 1, groups - 1))
    install(bench.builder, 0)
    queue = bench.builder.queue("load", 0)
    loads = [i for i in bench.builder.finish().issues if i.queue == queue and i.op == "load"]
    last = {i.args[0]: i.cycle + i.count - 1 for i in loads}
    assert last[0] > last[1], "the first part comes last"
    assert bench.builder.planes[0].installed >= last[0] + chip.latency.mxm_load


@pytest.mark.parametrize("name", ["tiny", "superlanes 4", "superlanes 6", "slices 48"])
def test_tiles_hold_the_weights(name: str) -> None:
    """By rows and by columns, for layouts with empty lanes; columns are stored once."""
    chip, rng = CHIPS[name], np.random.default_rng(7)
    lanes, width = chip.lanes, chip.install_streams
    for turn in range(12):
        memory = Memory(chip, layers=1, scratch_words=16)
        store = WeightStore(memory)
        weight = rng.integers(-128, 128, (2 * lanes, lanes + 16), np.int8)
        inputs = np.full(lanes, -1, np.int32)
        inputs[: lanes - 16 * (turn % 2)] = rng.permutation(lanes + 16)[: lanes - 16 * (turn % 2)]
        outputs = rng.permutation(2 * lanes)[:lanes].astype(np.int32)
        outputs[lanes - width * (turn // 2 % 2) :] = -1
        turned = outputs.reshape(-1, width)[::-1].reshape(-1)
        plane = int(rng.integers(chip.planes))
        made = [(outputs, store.by_rows(0, inputs, outputs, plane, layered=False))]
        made += [
            (layout, store.by_columns(0, 0, inputs, layout, plane, layered=False))
            for layout in (outputs, turned, np.roll(outputs, 1))
        ]
        words: dict[tuple[int, int], I8] = {}
        for fill in store.fills:
            data = fill.build(weight).view(np.int8)
            for k, (s, word) in enumerate(zip(fill.slices, fill.words, strict=True)):
                for i, vector in enumerate(data[k]):
                    assert (s, word + i) not in words
                    words[s, word + i] = vector
        assert len(store.fills) == 3, "the turned groups of columns are not stored again"
        for layout, tiles in made:
            found = plane_weights(words, tiles, chip)
            wanted = weight[np.maximum(layout, 0)][:, np.maximum(inputs, 0)].T.copy()
            wanted[inputs < 0] = 0
            wanted[:, layout < 0] = 0
            assert np.array_equal(found, wanted)
        side = plane // chip.planes_per_hemisphere
        assert store.side_of(0, 0, turned) == side
        assert store.side_of(1, 0, turned) is None
        for s, _ in words:
            assert s // chip.slices_per_hemisphere == side


def test_runs_of_groups() -> None:
    assert ranges([0, 1, 2, 5, 6, 4], [3, 4, 5, 6, 7, 8]) == ((0, 3, 3), (5, 6, 2), (4, 8, 1))
    assert ranges([0, 1, 2], [2, 1, 0]) == ((0, 2, 1), (1, 1, 1), (2, 0, 1))
    assert ranges([], []) == ()


def nibbles(raw: I8, mode: int) -> I8:
    """What the MXM makes of bytes."""
    if mode == isa.Mode.I8:
        return raw
    high = mode in (isa.Mode.U4_HIGH, isa.Mode.S4_HIGH)
    value = raw.view(np.uint8) >> (4 if high else 0) & 15
    minus = 8 if mode in (isa.Mode.S4_LOW, isa.Mode.S4_HIGH) else 0
    return (value.astype(np.int16) - minus).astype(np.int8)


@pytest.mark.parametrize("name", ["tiny", "superlanes 4", "slow"])
@pytest.mark.parametrize("seed", range(3))
def test_products(name: str, seed: int) -> None:
    """Sums over several tiles in each of several planes, some tiles loaded ahead."""
    chip, numbers = CHIPS[name], np.random.default_rng(seed)
    rng = random.Random(f"products {name} {seed}")
    lanes, width, rows = chip.lanes, chip.install_streams, rng.choice((1, 3, 12))
    bench = Bench(chip)
    outs, wanted = [], []
    planes = [rng.randrange(chip.planes) for _ in range(rng.randint(1, 5))]
    for plane in planes:
        side = plane // chip.planes_per_hemisphere
        into = accumulators(bench.builder, plane, rows)
        total = np.zeros((rows, lanes), np.int32)
        for k in range(rng.randint(1, 3)):
            raw = numbers.integers(-128, 128, (lanes, lanes), np.int8)
            mode, row = rng.choice(list(isa.Mode)), rng.random() < 0.5
            weights = nibbles(raw, mode)  # a vector each
            tile = stored(bench, raw, side, row, mode)
            x = numbers.integers(-128, 128, (rows, lanes)).astype(np.int32)
            held = bench.hold(x, 1, side=side, outer=True)
            load(bench.builder, plane, tile)
            install(bench.builder, plane)
            into = act(bench.builder, into, held, rows, add=k > 0)
            matrix = (weights if row else weights.T).astype(np.int32)
            total = total + x @ matrix
        e = Expression()
        outs.append(bench.room(4, rows))
        e.write(Leaf(into), outs[-1])
        outs[-1] = bench.builder.evaluate(e, rows)[outs[-1]]
        wanted.append(total)
        assert lanes % width == 0
    for found, total in zip(bench.run(*outs), wanted, strict=True):
        assert np.array_equal(found, total)


def stored(bench: Bench, vectors: I8, side: int, row: bool, mode: int) -> Tile:
    """A tile of vectors [lanes, lanes], groups in any order."""
    chip, memory = bench.chip, bench.memory
    width = chip.install_streams
    first = side * chip.slices_per_hemisphere
    slices = tuple(range(first, first + width))
    groups = chip.lanes // width
    words = tuple(memory.fixed("weights", s, groups) for s in slices)
    for j, (s, word) in enumerate(zip(slices, words, strict=True)):
        memory.put(s, word, np.ascontiguousarray(vectors[j::width]).view(np.uint8), "weights")
    backwards = tuple((g, g, 1) for g in reversed(range(groups)))
    order = backwards if mode == isa.Mode.I8 else ((0, 0, groups),)
    return Tile(slices, words, order, row, mode=mode)


def test_accumulators_are_taken_when_they_are_free() -> None:
    """More products than accumulators, one after the other: each waits for the one it replaces."""
    chip, numbers = replace(TINY, accumulators=8), np.random.default_rng(1)
    bench = Bench(chip)
    raw = numbers.integers(-128, 128, (chip.lanes, chip.lanes), np.int8)
    load(bench.builder, 1, stored(bench, raw, 0, True, isa.Mode.I8))
    install(bench.builder, 1)
    outs, wanted = [], []
    for rows in (5, 3, 4, 8, 1, 7, 2):
        x = numbers.integers(-128, 128, (rows, chip.lanes)).astype(np.int32)
        into = accumulators(bench.builder, 1, rows)
        into = act(bench.builder, into, bench.hold(x, 1, side=0, outer=True), rows, add=False)
        e, out, leaf = Expression(), bench.room(4, rows), Leaf(into)
        e.write(e.op("add", leaf, leaf), out)
        outs.append(bench.builder.evaluate(e, rows)[out])
        wanted.append(2 * (x @ raw.astype(np.int32)))
    for found, total in zip(bench.run(*outs), wanted, strict=True):
        assert np.array_equal(found, total)


# -- a whole MLP


@pytest.mark.parametrize(
    ("name", "dim", "width", "rows"),
    [
        ("tiny", 48, 80, 1),
        ("tiny", 96, 272, 3),
        ("superlanes 4", 80, 592, 2),
        ("slices 48", 160, 96, 5),
        ("slow", 64, 64, 7),
    ],
)
def test_an_mlp(name: str, dim: int, width: int, rows: int) -> None:
    """Products of all planes, quantization and the Hadamard, by the numerics contract."""
    chip, rng = CHIPS[name], np.random.default_rng(dim)
    both = quantize_weight(rng.standard_normal((2 * width, dim)))
    down = quantize_weight(rng.standard_normal((dim, width)))
    program = build_mlp({"gate_up": both, "down": down}, chip, rows=rows)
    step = Step(program, chip)
    x = rng.standard_normal((rows, dim)).astype(np.float32)
    if rows > 1:
        x[-1] *= np.float32(1e-42)  # too small to divide by
    step.write("x", ports.to_lanes(program.port("x"), x))
    step.run({})
    found = ports.from_lanes(program.port("y"), step.read("y"), np.float32, dim)
    gate, up = np.split(linear(*quantize(x), *both), 2, axis=1)
    wanted = linear(*quantize(hadamard_blocks(swiglu(gate, up))), *down)
    assert np.array_equal(found, wanted)
    assert np.any(wanted)
