"""In: the width of a row and who reads it. Out: which feature stands in which lane of which vector.

A layout is int32 [vectors, lanes] of feature numbers, -1 for an empty lane. Weights are stored to
fit: a product can come out in any layout, so nothing is ever shuffled between operations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.numerics import SUPERLANE

Layout = NDArray[np.int32]


def dense(width: int, chip: Chip) -> Layout:
    """Features in order, vector after vector."""
    vectors = -(-width // chip.lanes)
    flat = np.full(vectors * chip.lanes, -1, np.int32)
    flat[:width] = np.arange(width)
    return flat.reshape(vectors, chip.lanes)


def hadamard(width: int, chip: Chip) -> Layout:
    """The 16 features of a Hadamard block in one lane of 16 vectors: vector 16 * j + i holds
    feature i of blocks j * lanes ..."""
    blocks = width // SUPERLANE
    across = -(-blocks // chip.lanes)
    found = np.full((across * SUPERLANE, chip.lanes), -1, np.int32)
    for block in range(blocks):
        j, lane = divmod(block, chip.lanes)
        for i in range(SUPERLANE):
            found[j * SUPERLANE + i, lane] = block * SUPERLANE + i
    return found


def heads_per_vector(kv_heads: int, head_dim: int, chip: Chip) -> int:
    return min(kv_heads, chip.lanes // head_dim)


def keys(kv_heads: int, head_dim: int, chip: Chip) -> Layout:
    """Key or value heads side by side, as many whole heads a vector as fit."""
    per = heads_per_vector(kv_heads, head_dim, chip)
    vectors = -(-kv_heads // per)
    found = np.full((vectors, chip.lanes), -1, np.int32)
    for head in range(kv_heads):
        g, h = divmod(head, per)
        found[g, h * head_dim : (h + 1) * head_dim] = np.arange(head_dim) + head * head_dim
    return found


def queries(heads: int, kv_heads: int, head_dim: int, chip: Chip) -> Layout:
    """Vector g * share + j: the j-th query head of each key head of key vector g, in its lanes."""
    share = heads // kv_heads
    of_keys = keys(kv_heads, head_dim, chip)
    found = np.full((len(of_keys) * share, chip.lanes), -1, np.int32)
    for g, row in enumerate(of_keys):
        used = row >= 0
        head, inside = row[used] // head_dim, row[used] % head_dim
        for j in range(share):
            found[g * share + j, used] = (head * share + j) * head_dim + inside
    return found


def other_halves(layout: Layout, head_dim: int) -> Layout:
    """Each feature's partner in rope: the same place in the other half of its head."""
    inside = layout % head_dim
    partner = layout - inside + (inside + head_dim // 2) % head_dim
    return np.where(layout >= 0, partner, -1).astype(np.int32)


def shifted(layout: Layout, start: int) -> Layout:
    """The layout of the columns start .. of a wider value."""
    return np.where(layout >= 0, layout + start, -1).astype(np.int32)


def lane_table(layout: Layout, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """values [features] as [vectors, lanes], 0 in empty lanes."""
    table: NDArray[np.generic] = values[np.maximum(layout, 0)]
    table[layout < 0] = 0
    return table


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

    def spread(self, lane: int) -> int:
        """One lane of each superlane in all of its lanes."""
        lanes = np.arange(self._chip.lanes)
        return self.number((lanes - lanes % self._chip.superlane_lanes + lane).astype(np.int16))

    def table(self) -> NDArray[np.int16]:
        """All tables [maps, lanes]."""
        if not self._tables:
            return np.zeros((0, self._chip.lanes), np.int16)
        return np.stack(self._tables)
