"""In: a model's attention and a Chip. Out: how its chunks are cut into tiles, and where they lie.

The chunks of a sequence are cut into tiles of as many positions as the chip has lanes. A group of
chunks, one tile a plane where that is possible, is one run of a section; a step runs it as often as
the longest context needs. Tile u of a group lies in plane u mod P.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openlpu.chip import EAST, WEST, Chip
from openlpu.errors import UnsupportedModel
from openlpu.graph import Op
from openlpu.schedule.constants import BYTE, WORD
from openlpu.schedule.memory import QUAD, Buffer, Memory
from openlpu.schedule.ports import Ports

KEY_BASE, SCALE_BASE, PLACE_BASE, ROW_BASE, FIRST_BASE = 2, 3, 4, 5, 6
SET_BASE = 7  # loaded from a stream
SHORT_KEY_BASE = 12  # KEY_BASE of tiles that hold fewer positions than lanes
NEVER = 1 << 30  # a position that no row sees
_MOST_ROWS_AT_ONCE = 8
MINUS_INF = -(1 << 23)  # 0xff800000


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a model's attention lies on the chip."""

    heads: int
    kv_heads: int
    head_dim: int
    chunk: int
    lanes: int
    planes: int
    context: int
    sequences: int
    rows: int  # of one sequence in a step
    install_streams: int

    @property
    def share(self) -> int:
        return self.heads // self.kv_heads

    @property
    def heads_per_vector(self) -> int:
        return min(self.kv_heads, self.lanes // self.head_dim)

    @property
    def vectors(self) -> int:
        return -(-self.kv_heads // self.heads_per_vector)

    @property
    def tiles_per_chunk(self) -> int:
        return -(-self.chunk // self.lanes)

    @property
    def chunks_per_group(self) -> int:
        return max(1, min(self.planes // self.tiles_per_chunk, -(-self.context // self.chunk)))

    @property
    def units(self) -> int:
        """Tiles of a group."""
        return self.chunks_per_group * self.tiles_per_chunk

    @property
    def groups(self) -> int:
        """Runs that the whole context needs."""
        return -(-self.context // (self.chunk * self.chunks_per_group))

    @property
    def full_words(self) -> int:
        """Words of a slice that a tile takes."""
        return self.lanes // self.install_streams

    def tile_words(self, unit: int) -> int:
        """The same of a unit's tile of keys or values: full ones, and, where a tile holds
        fewer positions than lanes, as many as the largest of these needs."""
        full = self.full_words
        found = [-(-self._positions(u) // self.install_streams) for u in range(self.units)]
        short = [words for words in found if words < full]
        return full if found[unit] == full else max(1, *short)

    def key_base(self, unit: int) -> int:
        """The base register of a unit's keys and values."""
        return KEY_BASE if self.tile_words(unit) == self.full_words else SHORT_KEY_BASE

    def _positions(self, unit: int) -> int:
        """Positions of a sequence that a unit holds in the group where it holds most."""
        chunk, tile = divmod(unit, self.tiles_per_chunk)
        inside = min(self.lanes, self.chunk - tile * self.lanes)
        if self.groups > 1:
            return inside
        return max(0, min(inside, self.context - chunk * self.chunk - tile * self.lanes))

    def heads_of(self, vector: int) -> int:
        """Key heads in a key vector."""
        return min(self.heads_per_vector, self.kv_heads - vector * self.heads_per_vector)


def rows_at_once(rows: int) -> int:
    """How many of a sequence's rows attend together: all blocks are as large, and more rows would
    save little time and take much scratch."""
    return max(n for n in range(1, _MOST_ROWS_AT_ONCE + 1) if rows % n == 0)


def geometry(op: Op, chip: Chip, *, context: int, sequences: int, rows: int) -> Geometry:
    """Raises UnsupportedModel for heads wider than a vector."""
    dim = op.integer("head_dim")
    if dim > chip.lanes:
        raise UnsupportedModel(
            f"a head of {dim} is wider than the {chip.lanes} lanes of {chip.name}"
        )
    return Geometry(
        op.integer("heads"),
        op.integer("kv_heads"),
        dim,
        op.integer("chunk"),
        chip.lanes,
        chip.planes,
        context,
        sequences,
        rows // sequences,
        chip.install_streams,
    )


@dataclass(frozen=True, slots=True)
class Cache:
    """Where keys, values and their scales lie. Keys: (vector, unit) -> tile slices and words of
    layer 0, sequence 0, group 0. Scales: (vector, head, unit)."""

    slices: dict[int, tuple[int, ...]]  # unit -> the slices of its tiles
    keys: dict[tuple[int, int], tuple[int, ...]]
    values: dict[tuple[int, int], tuple[int, ...]]
    scale_slices: dict[int, tuple[int, ...]]
    key_scales: dict[tuple[int, int, int], tuple[int, ...]]
    value_scales: dict[tuple[int, int, int], tuple[int, ...]]
    places: dict[int, Buffer]  # unit -> the positions in its lanes, a word for each group


@dataclass(frozen=True, slots=True)
class State:
    """What lives between the sections of a layer. queries, scales: per (vector, head, share);
    top, sums, out: per (vector, share)."""

    queries: dict[tuple[int, int, int], tuple[Buffer, Buffer]]
    scales: dict[tuple[int, int, int], Buffer]
    top: dict[tuple[int, int], Buffer]
    sums: dict[tuple[int, int], Buffer]
    out: dict[tuple[int, int], Buffer]


def place_cache(g: Geometry, memory: Memory, side_of_plane: int) -> Cache:
    """Reserve the context's memory; the positions of lanes are constants."""
    chip = memory.chip
    width = chip.install_streams
    tiles = memory.layers * g.sequences * g.groups
    cache = Cache({}, {}, {}, {}, {}, {}, {})
    for u in range(g.units):
        side = int(u % g.planes >= side_of_plane)
        quads = memory.emptiest("context", side, width // QUAD, loads=True, plane=u % g.planes)
        slices = tuple(q + b for q in quads for b in range(QUAD))
        cache.slices[u] = slices
        words = tiles * g.tile_words(u)
        for v in range(g.vectors):
            for kept in (cache.keys, cache.values):
                kept[v, u] = tuple(_reserve(memory, s, words) for s in slices)
        # What is read while the tiles are loaded lies elsewhere.
        quad = memory.emptiest("context", side, 1, avoid=slices)[0]
        cache.scale_slices[u] = tuple(range(quad, quad + QUAD))
        for v in range(g.vectors):
            for h in range(g.heads_of(v)):
                for kept_scales in (cache.key_scales, cache.value_scales):
                    kept_scales[v, h, u] = tuple(
                        _reserve(memory, s, tiles) for s in cache.scale_slices[u]
                    )
        cache.places[u] = _places(g, memory, u, side, (*slices, *cache.scale_slices[u]))
    return cache


def _reserve(memory: Memory, s: int, words: int) -> int:
    """Words of a slice for keys, values or scales."""
    word = memory.fixed("context", s, words)
    memory.used.append(("context", s, word, words))
    return word


def _places(g: Geometry, memory: Memory, u: int, side: int, avoid: tuple[int, ...]) -> Buffer:
    chunk, tile = divmod(u, g.tiles_per_chunk)
    inside = tile * g.lanes + np.arange(g.lanes)
    table = np.empty((g.groups, g.lanes), "<i4")
    for group in range(g.groups):
        start = (group * g.chunks_per_group + chunk) * g.chunk
        table[group] = np.where(inside < g.chunk, start + inside, NEVER)
    quad = memory.emptiest("weights", side, 1, avoid=avoid)[0]
    slices = tuple(range(quad, quad + WORD))
    words = tuple(memory.fixed("weights", s, g.groups) for s in slices)
    planes = table.view(np.uint8).reshape(g.groups, g.lanes, 4)
    for b, (s, word) in enumerate(zip(slices, words, strict=True)):
        memory.put(s, word, np.ascontiguousarray(planes[:, :, b]), "constants")
    return Buffer(slices, words, 1, 0, PLACE_BASE)


def place_state(g: Geometry, ports: Ports, count: int) -> State:
    """Reserve what lives between the sections of a layer, `count` rows each."""
    state = State({}, {}, {}, {}, {})
    for v in range(g.vectors):
        for j in range(g.share):
            for h in range(g.heads_of(v)):
                west, east = (ports.of_layer(BYTE, count, side) for side in (WEST, EAST))
                state.queries[v, h, j] = (west, east)
                state.scales[v, h, j] = ports.of_layer(WORD, count, None)
            for kept in (state.top, state.sums, state.out):
                kept[v, j] = ports.of_layer(WORD, count, None)
    return state
