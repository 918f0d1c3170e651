"""In: random requests, placements, widths. Out: nothing meets, overlaps, or is missed."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator

import numpy as np
import pytest
from chip_models import CHIPS, TINY

from openlpu.chip import load_chip
from openlpu.errors import DoesNotFit, RequestError
from openlpu.schedule import layout as layouts
from openlpu.schedule.memory import QUAD, Memory
from openlpu.schedule.table import Flow, InItsOwnWayError, Request, Slot, Table, burst

CHIP_217 = load_chip("lpu_217")


# -- the reservation table


def test_a_burst_is_its_bits() -> None:
    for count in (*range(1, 20), 31, 32, 33, 64, 100, 255):
        for period in (1, 2, 3, 7, 64, 65):
            assert burst(count, period) == sum(1 << i * period for i in range(count))


def cycles_of(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def random_request(rng: random.Random, pools: list[tuple[Hashable, ...]]) -> Request:
    """A few of everything."""
    bits = [burst(rng.choice((1, 1, 2, 5)), rng.choice((1, 2, 3, 9))) for _ in range(3)]
    fixed: list[tuple[Hashable, int, int]] = [
        (("port", rng.randrange(4)), rng.randint(-9, 9), rng.choice(bits))
        for _ in range(rng.randint(0, 3))
    ]
    flows = []
    for _ in range(rng.randint(0, 3)):
        direction, width = rng.randrange(2), rng.choice((1, 2, 4, 16))
        end = rng.randrange(TINY.positions)
        behind = range(end + 1) if direction else range(end, TINY.positions)
        starts = tuple(rng.choice(behind) for _ in range(width))
        flows.append(Flow(direction, starts, end, rng.randint(-9, 20), rng.choice(bits), width))
    slots = []
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(-9, 9)
        slots.append(Slot(rng.choice(pools), at, at + rng.choice((1, 3, 10)), rng.choice(bits)))
    return Request(fixed, flows, slots)


def occupied(request: Request, start: int) -> Iterator[tuple[object, int]]:
    """(what, cycle) of all that a placed request uses, value by value and cycle by cycle."""
    for resource, at, bits in request.fixed:
        yield from ((resource, start + at + i) for i in cycles_of(bits))
    for slot in request.slots:
        yield from ((slot.chosen, start + slot.at + i) for i in cycles_of(slot.bits))
        yield from ((("of", slot.chosen), start + slot.result + i) for i in cycles_of(slot.bits))
    for flow in request.flows:
        for b, begin in enumerate(flow.starts):
            for x in range(min(begin, flow.end), max(begin, flow.end) + 1):
                register = ("stream", flow.direction, flow.stream + b, x)
                when = start + flow.arrives - abs(flow.end - x)
                yield from ((register, when + i) for i in cycles_of(flow.bits))


@pytest.mark.parametrize("seed", range(12))
def test_placed_requests_never_meet(seed: int) -> None:
    """Whatever was placed before, nothing is used twice in a cycle, nothing before cycle 0, and
    streams are as whoever reads them needs them."""
    rng = random.Random(f"table {seed}")
    queues = [("queue", i) for i in range(6)]
    pools: list[tuple[Hashable, ...]] = [tuple(queues[:2]), tuple(queues[2:]), (queues[0],)]
    pools = pools[: rng.randint(1, 2)]
    table, taken, refused = Table(TINY), set[tuple[object, int]](), 0
    for _ in range(120):
        request, earliest = random_request(rng, pools), rng.randint(0, 150)
        try:
            start = table.place(request, earliest)
        except InItsOwnWayError:
            refused += 1
            continue
        assert start >= earliest
        mine = list(occupied(request, start))
        assert len(set(mine)) == len(mine)
        assert taken.isdisjoint(mine)
        assert all(cycle >= 0 for _, cycle in mine)
        taken.update(mine)
        for flow in request.flows:
            assert flow.stream % flow.align == 0
            assert 0 <= flow.stream <= TINY.streams - len(flow.starts)
        assert all(slot.chosen in slot.pool for slot in request.slots)
    assert refused < 60


def test_the_first_start_that_fits_is_taken() -> None:
    """For what leaves no choice: ports, and queues in pools of one."""
    rng = random.Random("first")
    table, taken = Table(TINY), set[tuple[object, int]]()
    for _ in range(150):
        request = random_request(rng, [(("queue", 0),), (("queue", 1),)])
        request.flows.clear()
        earliest = rng.randint(0, 100)
        try:
            start = table.place(request, earliest)
        except InItsOwnWayError:
            continue
        for other in range(earliest, start):
            mine = list(occupied(request, other))
            fits = taken.isdisjoint(mine) and min((c for _, c in mine), default=0) >= 0
            assert not fits, (other, start)
        taken.update(occupied(request, start))


def test_a_request_in_its_own_way_leaves_no_trace() -> None:
    table = Table(TINY)
    twice = Request([(("port", 0), 0, 1), (("port", 1), 2, 1), (("port", 0), 0, 1)], [], [])
    wide = [Flow(0, (5,) * 16, 3, 2, 1, 16) for _ in range(3)]  # 48 of 32 streams
    pair = [Slot((0,), 0, 1, 0b101), Slot((0,), 2, 3, 1)]
    for request in (twice, Request([], wide, []), Request([], [], pair)):
        with pytest.raises(InItsOwnWayError):
            table.place(request, 0)
    assert table.place(Request([(("port", 0), 0, 1)], [Flow(0, (5,), 3, 2, 1, 1)], []), 0) == 0
    assert table.place(Request([], [], [Slot((0,), 0, 1, 1)]), 0) == 0


# -- memory


@pytest.mark.parametrize("name", ["tiny", "slices 48", "regions", "lpu_217"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_in_memory_overlaps(name: str, seed: int) -> None:
    """Lasting words of every kind until nothing fits: each in its region and in one bank."""
    chip = CHIP_217 if name == "lpu_217" else CHIPS[name]
    rng = random.Random(f"memory {name} {seed}")
    layers = rng.choice((1, 3, 7))
    memory = Memory(chip, layers=layers, scratch_words=rng.choice((16, 64)))
    once: list[tuple[str, int, int, int]] = []
    layered: list[tuple[int, int, int]] = []
    full = 0
    while full < 40:
        purpose, s = rng.choice(("state", "context", "weights")), rng.randrange(chip.slices)
        words = rng.choice((1, 2, 30, 200))
        kind = rng.choice(("fixed", "bank", "aligned", "layered"))
        try:
            if kind == "layered":
                layered.append((s, memory.layered("weights", s, words), words))
            elif kind == "aligned":
                slices = range(s // QUAD * QUAD, s // QUAD * QUAD + QUAD)
                word = memory.aligned(purpose, slices, words)
                once += [(purpose, one, word, words) for one in slices]
            else:
                bank = rng.choice([None, *memory._banks(purpose, s)]) if kind == "bank" else None
                word = memory.fixed(purpose, s, words, bank=bank)
                assert bank is None or word // chip.words_per_bank == bank
                once.append((purpose, s, word, words))
        except DoesNotFit as error:
            assert error.demand > error.bound
            assert chip.name in error.resource
            full += 1
    spans = [("state", s, word, words) for what, s, word, words in memory.used]
    assert {what for what, *_ in memory.used} == {"scratch"}
    spans += once
    for s, word, words in layered:
        stride = memory.layer_stride("weights", s, word // chip.words_per_bank)
        spans += [("weights", s, word + layer * stride, words) for layer in range(layers)]
    owned: set[tuple[int, int]] = set()
    for purpose, s, word, words in spans:
        region = chip.region(purpose)
        assert region.first_word <= word
        assert word + words <= region.first_word + region.words
        assert word // chip.words_per_bank == (word + words - 1) // chip.words_per_bank
        mine = {(s, w) for w in range(word, word + words)}
        assert owned.isdisjoint(mine)
        owned |= mine


def test_the_image_is_what_was_put() -> None:
    rng = np.random.default_rng(5)
    memory = Memory(TINY, layers=3, scratch_words=64)
    wanted = np.zeros((TINY.slices, TINY.words, TINY.lanes), np.uint8)
    placed = []
    for _ in range(60):
        s, words = int(rng.integers(TINY.slices)), int(rng.integers(1, 12))
        if rng.random() < 0.5:
            placed.append((s, memory.layered("weights", s, words), words, 3))
        else:
            placed.append((s, memory.fixed("weights", s, words), words, 1))
    for s, word, words, layers in placed:
        for layer in range(layers):
            data = rng.integers(1, 256, (words, TINY.lanes), np.uint8)
            if layers == 1:
                memory.put(s, word, data, "constants")
            else:
                memory.put_layer("weights", layer, s, word, data, "weights")
            stride = memory.layer_stride("weights", s, word // TINY.words_per_bank)
            wanted[s, word + layer * stride : word + layer * stride + words] = data
    found = np.zeros_like(wanted)
    image = memory.image()
    for segment in image:
        found[segment.slice, segment.word : segment.word + len(segment.data)] += segment.data
    assert np.array_equal(found, wanted)
    assert [(one.slice, one.word) for one in image] == sorted((o.slice, o.word) for o in image)
    assert len(image) < sum(layers for *_, layers in placed), "neighbours are not joined"


def test_scratch_lives_as_long_as_a_section() -> None:
    """Buffers do not overlap until all are freed, or until one is given back and nothing else is
    left; they lie in neighbouring slices of the hemisphere asked for, in one bank."""
    for name in ("tiny", "slices 48", "regions"):
        chip, rng = CHIPS[name], random.Random(f"scratch {name}")
        memory = Memory(chip, layers=1, scratch_words=40)
        reserved = {(s, w) for _, s, word, n in memory.used for w in range(word, word + n)}
        for turn in range(4):
            memory.clear_scratch(turn)
            owned: set[tuple[int, int]] = set()
            given_back: dict[tuple[int, int], int] = {}
            reused = refused = 0
            while refused < 30:
                width, count = rng.choice((1, 2, 4)), rng.choice((1, 3, 8))
                side, outer = rng.choice((None, 0, 1)), rng.random() < 0.5
                try:
                    buffer = memory.scratch(width, count, hemisphere=side, outer=outer)
                except DoesNotFit as error:
                    assert error.resource.startswith("scratch")
                    refused += 1
                    continue
                first = buffer.slices[0]
                assert buffer.slices == tuple(range(first, first + width))
                assert first % width == 0
                assert (buffer.width, buffer.count) == (width, count)
                sides = {s // chip.slices_per_hemisphere for s in buffer.slices}
                assert sides == ({side} if side is not None else {min(sides)})
                assert len({word // chip.words_per_bank for word in buffer.words}) == 1
                mine = {
                    (s, word + i)
                    for s, word in zip(buffer.slices, buffer.words, strict=True)
                    for i in range(count)
                }
                assert mine <= reserved
                again = owned & mine
                assert all(given_back.get(place, 1 << 30) <= buffer.ready for place in again)
                assert (buffer.ready > 0) == bool(again)
                reused += bool(again)
                owned |= mine
                for place in mine:
                    given_back.pop(place, None)
                if rng.random() < 0.2:
                    free = rng.randint(1, 99)
                    memory.give_back(buffer, free)
                    given_back |= dict.fromkeys(mine, free)
            assert reused


def test_the_region_of_the_table() -> None:
    memory = Memory(CHIP_217, layers=1, scratch_words=16, table_region="L1")
    assert memory.region("table").name == "L1"
    word = memory.fixed("table", 3, 5)
    region = CHIP_217.region("context")
    assert region.first_word <= word < region.first_word + region.words
    assert Memory(CHIP_217, layers=1, scratch_words=16).region("table").name == "L2"
    with pytest.raises(RequestError, match="lpu_217 has no region 'L9'; it has L0, L1, L2"):
        Memory(CHIP_217, layers=1, scratch_words=16, table_region="L9")


# -- layouts


def each_once(layout: layouts.Layout, width: int) -> None:
    assert layout.dtype == np.int32
    assert sorted(layout[layout >= 0].tolist()) == list(range(width))
    assert (layout[layout < 0] == -1).all()


@pytest.mark.parametrize("name", ["tiny", "superlanes 4", "superlanes 6"])
def test_layouts_have_each_feature_once(name: str) -> None:
    chip = CHIPS[name]
    for width in (*range(1, 40), 64, 96, 100, 257):
        layout = layouts.dense(width, chip)
        each_once(layout, width)
        assert layout.reshape(-1)[:width].tolist() == list(range(width))
        values = np.arange(1000, 1000 + width)
        table = layouts.lane_table(layout, values)
        assert table[layout >= 0].tolist() == values.tolist()
        assert not table[layout < 0].any()
        wider = layouts.shifted(layout, 7)
        assert (wider[layout >= 0] == layout[layout >= 0] + 7).all()
        assert (wider[layout < 0] == -1).all()
    for width in range(16, 16 * 3 * chip.lanes, 16 * 7):
        layout = layouts.hadamard(width, chip)
        each_once(layout, width)
        for first in range(0, len(layout), 16):
            block = layout[first : first + 16]  # a lane holds a block, from top to bottom
            used = block[0] >= 0
            assert ((block >= 0) == used).all()
            assert (block[:, used] - block[:1, used] == np.arange(16)[:, None]).all()
            assert (block[0, used] % 16 == 0).all()


@pytest.mark.parametrize("name", ["tiny", "superlanes 4", "superlanes 6"])
def test_heads_and_their_halves(name: str) -> None:
    chip = CHIPS[name]
    for head_dim in (16, 32):
        for kv_heads in (1, 2, 3, 5, 7):
            keys = layouts.keys(kv_heads, head_dim, chip)
            each_once(keys, kv_heads * head_dim)
            for share in (1, 2, 3):
                queries = layouts.queries(kv_heads * share, kv_heads, head_dim, chip)
                each_once(queries, kv_heads * share * head_dim)
                for row, query in enumerate(queries):
                    key, used = keys[row // share], query >= 0
                    assert (used == (key >= 0)).all()
                    assert (query[used] % head_dim == key[used] % head_dim).all()
                    assert (query[used] // head_dim // share == key[used] // head_dim).all()
                for layout in (keys, queries):
                    other = layouts.other_halves(layout, head_dim)
                    assert np.array_equal(layouts.other_halves(other, head_dim), layout)
                    used = layout >= 0
                    assert (other[~used] == -1).all()
                    assert (other[used] // head_dim == layout[used] // head_dim).all()
                    assert (abs(other - layout)[used] == head_dim // 2).all()


def test_maps_are_kept_once() -> None:
    chip = CHIPS["superlanes 6"]
    maps = layouts.Maps(chip)
    assert maps.table().shape == (0, chip.lanes)
    numbers = [maps.rotation(segment, k) for segment in (32, 96) for k in range(segment // 16)]
    assert numbers == [0, 1, 0, 2, 3, 4, 5, 6]  # turned by nothing: the same table
    table = maps.table()
    assert (np.sort(table, axis=1) == np.arange(chip.lanes)).all()
    assert (table[1] // 32 == np.arange(chip.lanes) // 32).all()
    assert table[2].tolist() == np.roll(np.arange(chip.lanes), -16).tolist()
