"""In: lane tables that the SXM needs. Out: their numbers, each table kept once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip


class Maps:
    """The lane tables of a Program."""

    def __init__(self, chip: Chip) -> None:
        self._chip = chip
        self._tables: list[NDArray[np.int16]] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, table: NDArray[np.int16]) -> int:
        """The number of a table [lanes]."""
        key = table.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self._tables)
            self._tables.append(table)
        return self._numbers[key]

    def rotation(self, segment: int, superlanes: int) -> int:
        """Each segment of lanes turned by whole superlanes; lanes beyond the last are kept."""
        lanes = np.arange(self._chip.lanes)
        start = lanes - lanes % segment
        turned = start + (lanes - start + superlanes * self._chip.superlane_lanes) % segment
        inside = start + segment <= self._chip.lanes
        return self.number(np.where(inside, turned, lanes).astype(np.int16))

    def table(self) -> NDArray[np.int16]:
        """All tables [maps, lanes]."""
        if not self._tables:
            return np.zeros((0, self._chip.lanes), np.int16)
        return np.stack(self._tables)
