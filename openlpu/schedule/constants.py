"""In: values that are the same for all rows. Out: their places in memory, each kept once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openlpu.schedule import layout as layouts
from openlpu.schedule.layout import Layout
from openlpu.schedule.memory import Buffer, Memory
from openlpu.schedule.section import LAYER_BASE
from openlpu.schedule.weights import Fill, WeightStore

WORD, BYTE = 4, 1


class Constants:
    """Words and bytes that are the same for all rows, each kept once."""

    def __init__(self, memory: Memory, store: WeightStore) -> None:
        self.memory = memory
        self._store = store
        self._known: dict[tuple[object, ...], Buffer] = {}
        self._turn = 0

    def lanes(self, values: NDArray[np.int32], width: int = WORD) -> Buffer:
        """The low `width` bytes of int32 [lanes]."""
        key = (values.tobytes(), width)
        if key not in self._known:
            planes = np.ascontiguousarray(values.astype("<i4")).view(np.uint8).reshape(-1, 4)
            buffer = self._place(width, 1, layered=False)
            for b, (s, word) in enumerate(zip(buffer.slices, buffer.words, strict=True)):
                self.memory.put(s, word, np.ascontiguousarray(planes[None, :, b]), "constants")
            self._known[key] = buffer
        return self._known[key]

    def of_op(self, place: int, name: str, layout: Layout, *, layered: bool) -> Buffer:
        """float32 `name` of an op's tensors in the lanes of a layout [lanes], else 0."""
        where = (place, name, layout.tobytes(), layered)
        if where not in self._known:
            buffer = self._place(WORD, 1, layered=layered)

            def build(tensors: object) -> NDArray[np.uint8]:
                assert isinstance(tensors, dict)
                table = layouts.lane_table(layout, tensors[name].astype("<f4"))
                planes = np.ascontiguousarray(table).view(np.uint8).reshape(-1, 4)
                return np.ascontiguousarray(planes.T[:, None, :])

            self._store.fills.append(Fill(place, buffer.slices, buffer.words, build, "constants"))
            self._known[where] = buffer
        return self._known[where]

    def _place(self, width: int, words: int, *, layered: bool) -> Buffer:
        self._turn += 1
        side = self._turn % 2
        if width == WORD:
            quad = self.memory.quad_for_constants("weights", side, words, layered=layered)
        else:
            quad = self.memory.emptiest("weights", side, 1)[0]
        first = quad + (self._turn // 2 % (4 // width)) * width if width < 4 else quad
        slices = tuple(range(first, first + width))
        take = self.memory.layered if layered else self.memory.fixed
        at = tuple(take("weights", s, words) for s in slices)
        return Buffer(slices, at, words, 0, LAYER_BASE if layered else 0)
