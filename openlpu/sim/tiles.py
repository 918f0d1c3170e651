"""In: what the planes of a section load, install and multiply. Out: tiles, and acts that name them.

An installed tile is a list of where its bytes are. It is kept by columns when every byte was loaded
last by columns, by blocks of rows when by rows; where the two are mixed, blocks are put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.sim.events import I64, Issued
from openlpu.sim.records import Code
from openlpu.sim.values import AFTER, LAST, OPERANDS, WORK, Made


@dataclass(frozen=True, slots=True)
class _Loads:
    """What one plane loads, by cycle: groups of columns (vectors) or rows (a block)."""

    cycle: I64
    group: I64
    by_row: I64
    vectors: I64  # [n, install streams], of loads by columns
    block: I64  # of loads by rows

    def latest(self, by_row: int, groups: int, before: I64) -> I64:
        """Of each install and group: its last load of this kind before, -1 for none."""
        found = np.full((len(before), groups), -1, np.int64)
        for group in range(groups):
            these = np.flatnonzero((self.group == group) & (self.by_row == by_row))
            at = np.searchsorted(self.cycle[these], before, "left") - 1
            if len(these):
                found[:, group] = np.where(at >= 0, these[np.maximum(at, 0)], -1)
        return found


class Planes:
    """Collects what the units of all planes issue; `finish` emits their acts."""

    def __init__(self, chip: Chip, made: Made) -> None:
        self.chip, self.made = chip, made
        self.groups = chip.lanes // chip.install_streams
        self.columns: list[I64] = []  # tiles [lanes]: byte vectors
        self.rows: list[I64] = []  # tiles [groups]: blocks
        self._loads: tuple[I64, _Loads] | None = None  # plane of each, and the loads
        self._installs: tuple[I64, I64] | None = None  # plane and cycle
        self._acts: tuple[Issued, I64] | None = None

    def load(self, e: Issued, vectors: I64) -> None:
        """vectors [n, install streams]: what each load reads."""
        mode, by_row = e.arg("mode"), e.arg("row")
        nibbles = (by_row == 0) & (mode != 0)
        if nibbles.any():
            vectors = vectors.copy()
            source, width = vectors[nibbles].ravel(), vectors.shape[1]
            target = self.made.new_bytes(len(source))
            cycle, how = np.repeat(e.cycle[nibbles], width), np.repeat(mode[nibbles], width)
            self.made.emit(Code.NIBBLE, OPERANDS, cycle, target, source, how)
            vectors[nibbles] = target.reshape(-1, width)
        block = np.zeros(len(e), np.int64)
        rows = by_row != 0
        block[rows] = self.made.new_blocks(int(rows.sum()))
        self.made.emit(Code.ROWS, WORK, e.cycle[rows], block[rows], mode[rows], vectors[rows])
        order = np.argsort(e.cycle, kind="stable")
        columns = (e.cycle, e.arg("group"), by_row, vectors, block)
        self._loads = (e.index[order], _Loads(*(column[order] for column in columns)))

    def install(self, e: Issued) -> None:
        order = np.argsort(e.cycle, kind="stable")
        self._installs = (e.index[order], e.cycle[order])

    def act(self, e: Issued, activations: I64) -> None:
        self._acts = (e, activations)

    def finish(self) -> None:
        """Emit the acts of all planes, each with its tile."""
        if self._acts is None:
            return
        for plane in np.unique(self._acts[0].index):
            self._finish(int(plane))

    def _finish(self, plane: int) -> None:
        assert self._acts is not None
        e, activations = self._acts
        mine = e.index == plane
        cycle = e.cycle[mine]
        installs = np.zeros(0, np.int64)
        if self._installs is not None:
            installs = self._installs[1][self._installs[0] == plane]
        seen = installs + self.chip.latency.mxm_install
        tile = np.searchsorted(seen, cycle, "right") - 1
        if self._loads is None or (tile < 0).any():
            raise MachineError(f"cycle {cycle.min()}: nothing is installed in plane {plane}")
        used, tile = np.unique(tile, return_inverse=True)
        by_column, numbers = self._tiles(plane, installs[used])
        slot = plane * self.chip.accumulators + e.arg("slot")[mine]
        for code, these in (
            (Code.ACT_COLUMNS, by_column[tile]),
            (Code.ACT_ROWS, ~by_column[tile]),
        ):
            fields = (numbers[tile], activations[mine], slot, e.arg("add")[mine])
            self.made.emit(code, WORK, cycle[these], *(column[these] for column in fields))

    def _tiles(self, plane: int, installs: I64) -> tuple[NDArray[np.bool_], I64]:
        """Of each install: whether its tile is kept by columns, and the tile's number."""
        assert self._loads is not None
        mine = self._loads[0] == plane
        every = self._loads[1]
        loads = _Loads(
            every.cycle[mine],
            every.group[mine],
            every.by_row[mine],
            every.vectors[mine],
            every.block[mine],
        )
        column = loads.latest(0, self.groups, installs)
        row = loads.latest(1, self.groups, installs)
        last_column, last_row = column.max(axis=1), row.max(axis=1)
        by_column = (last_row < 0) | (column > last_row[:, None]).all(axis=1)
        pure_rows = (last_column < 0) | (row > last_column[:, None]).all(axis=1)
        numbers = np.zeros(len(installs), np.int64)
        for i, install in enumerate(installs):
            if by_column[i]:
                numbers[i] = len(self.columns)
                vectors = np.where(column[i, :, None] >= 0, loads.vectors[column[i]], 0)
                self.columns.append(vectors.ravel())
                continue
            blocks = np.where(row[i] >= 0, loads.block[row[i]], 0)
            if not pure_rows[i]:
                blocks = self._mixed(int(install), column[i], row[i], loads, blocks)
            numbers[i] = len(self.rows)
            self.rows.append(blocks)
        return by_column, numbers

    def _mixed(self, install: int, column: I64, row: I64, loads: _Loads, old: I64) -> I64:
        """Copies of the blocks, and the columns that were loaded later stamped into them."""
        blocks = self.made.new_blocks(self.groups)
        self.made.emit(Code.CLONE, AFTER, np.full(self.groups, install), blocks, old)
        below, right = np.nonzero(column[None, :] > row[:, None])
        streams = self.chip.install_streams
        fields = (blocks[below], below * streams, right * streams, loads.vectors[column[right]])
        self.made.emit(Code.STAMP, LAST, np.full(len(below), install), *fields)
        return blocks
