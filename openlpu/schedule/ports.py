"""In: what the host gives and takes each step. Out: its places in memory, and their description.

A port's rows are the rows of a step, or those of every layer one after the other. What the host
writes into each is said by the port's name; `openlpu.sim.drive` fills them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from openlpu.chip import Chip
from openlpu.program import Port, Vector
from openlpu.schedule.layout import Layout
from openlpu.schedule.memory import Buffer, Memory

WORD, HALF, BYTE = 4, 2, 1
LAYER_ROWS_BASE = 6
_LONG = 64  # words of a narrow buffer that are worth the search for what wider ones cannot use


@dataclass
class Ports:
    """Lasting buffers of a program, and those among them that the host reaches."""

    memory: Memory
    rows: int
    layers: int
    windows: bool
    units: int = 1  # tiles of a group of chunks
    turn: int = 0

    def __post_init__(self) -> None:
        self._ports: dict[str, tuple[list[Buffer], Layout, str]] = {}

    @property
    def chip(self) -> Chip:
        return self.memory.chip

    def static(self, width: int, count: int, side: int | None) -> Buffer:
        """A buffer that lives through all sections: `count` words in neighbouring slices."""
        side = self._side(side)
        if width < WORD and count >= _LONG:
            first = self.memory.most_uneven("state", side, width)
        else:
            first = self.memory.emptiest("state", side, 1)[0]
            rooms = [self.memory.room("state", first + b) for b in range(WORD)]
            if width < WORD:
                first += max(range(0, WORD, width), key=lambda b: (min(rooms[b : b + width]), -b))
        slices = tuple(range(first, first + width))
        words = (self.memory.aligned("state", slices, count),) * width
        for s, word in zip(slices, words, strict=True):
            self.memory.used.append(("state", s, word, count))
        return Buffer(slices, words, count)

    def of_layer(self, width: int, count: int, side: int | None) -> Buffer:
        """The same, but it lives only from the first section of a layer to its last."""
        return self.memory.kept_scratch(width, count, self._side(side))

    def _side(self, side: int | None) -> int:
        """That side, or west and east by turns."""
        if side is None:
            self.turn += 1
            side = self.turn % 2
        return side

    def _port(
        self,
        name: str,
        layout: Layout,
        width: int,
        count: int,
        direction: str,
        side: int | None = None,
    ) -> list[Buffer]:
        if name not in self._ports:
            buffers = [self.static(width, count, side) for _ in range(len(layout))]
            self._ports[name] = (buffers, layout, direction)
        return self._ports[name][0]

    def _every_lane(self, vectors: int = 1) -> Layout:
        return np.zeros((vectors, self.chip.lanes), np.int32)

    def _each_lane(self, vectors: int = 1) -> Layout:
        return np.arange(vectors * self.chip.lanes, dtype=np.int32).reshape(vectors, -1)

    def position(self) -> Buffer:
        """The absolute position of each row, in every lane: int32."""
        return self._port("position", self._every_lane(), WORD, self.rows, "in")[0]

    def first_visible(self) -> Buffer | None:
        """The first position a row sees, per layer, in every lane; None without windows."""
        if not self.windows:
            return None
        rows = self.rows * self.layers
        return self._port("first_visible", self._every_lane(), WORD, rows, "in")[0]

    def rope(self, row: Layout, dim: int) -> tuple[Buffer, Buffer]:
        """Cosines and signed sines for the lanes of a vector of heads: float32."""
        inside = np.where(row >= 0, row % dim, -1).astype(np.int32)[None]
        key = f"{dim}.{abs(_hash_of(inside)):x}"
        found = [
            self._port(f"{part}.{key}", inside, WORD, self.rows, "in")[0] for part in ("cos", "sin")
        ]
        return found[0], found[1]

    def entries(self) -> tuple[list[int], list[int]]:
        """Which int16 of the port of addresses is the first of each unit's keys, and which that of
        its scales: first all keys, a unit's in one vector, then all scales."""
        width, per_vector = self.chip.install_streams, self.chip.lanes // 2
        per = per_vector // width
        keys = [u // per * per_vector + u % per * width for u in range(self.units)]
        return keys, [keys[-1] + width + u for u in range(self.units)]

    def key_address(self, unit: int) -> tuple[Buffer, int]:
        """int16 offsets (-1: not here) for the slices of a unit's tiles; (vector, first lane)."""
        return self._address(self.entries()[0][unit])

    def scale_address(self, unit: int) -> tuple[Buffer, int]:
        """The int16 offset of a unit's scales; (vector, lane)."""
        return self._address(self.entries()[1][unit])

    def _address(self, entry: int) -> tuple[Buffer, int]:
        per_vector = self.chip.lanes // 2
        vectors = self.entries()[1][-1] // per_vector + 1
        rows = self.rows * self.layers
        buffers = self._port("append.address", self._each_lane(vectors), BYTE, rows, "in")
        vector, at = divmod(entry, per_vector)
        return replace(buffers[vector], base=LAYER_ROWS_BASE), 2 * at

    def lane_map(self, side: int) -> Buffer:
        """int16: 0 in the lane of the row's position, -1 elsewhere; a copy in each hemisphere."""
        name = f"lane.{'we'[side]}"
        return self._port(name, self._each_lane(), HALF, self.rows, "in", side)[0]

    def embedding(self, vectors: int) -> tuple[list[Buffer], Buffer]:
        """int16 offsets of a token's row in each slice of the table, as bytes; and a byte mask of
        the lane that holds its scale."""
        address = self._port("embed.address", self._each_lane(vectors), BYTE, self.rows, "in")
        lane = self._port("embed.lane", self._each_lane(), BYTE, self.rows, "in")[0]
        return address, lane

    def row(self, name: str, layout: Layout, direction: str) -> list[Buffer]:
        """A float32 value of each row."""
        return self._port(name, layout, WORD, self.rows, direction)

    def logits(self, layout: Layout) -> list[Buffer]:
        """float32 results, in the scratch of the last section: nothing is written after it."""
        if "logits" not in self._ports:
            buffers = [self.memory.scratch_evenly(WORD, self.rows) for _ in range(len(layout))]
            self._ports["logits"] = (buffers, layout, "out")
        return self._ports["logits"][0]

    def described(self) -> tuple[Port, ...]:
        """The ports as data."""
        found = []
        for name, (buffers, layout, direction) in sorted(self._ports.items()):
            vectors = tuple(Vector(b.slices, b.words[0], 1) for b in buffers)
            found.append(Port(name, direction, buffers[0].count, vectors, layout))
        return tuple(found)


def _hash_of(table: Layout) -> int:
    """The same number for equal tables, on every machine."""
    return int.from_bytes(hashlib.sha256(table.tobytes()).digest()[:6], "little")
