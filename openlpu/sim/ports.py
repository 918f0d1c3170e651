"""In: a Port and a chip's memory. Out: the port's vectors, and rows of numbers laid into lanes.

A port's data are bytes [rows, vectors, bytes, lanes]: byte b of the word in lane l of vector v of
row r. An element of a row may stand in several lanes; where it does, all get it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray

from openlpu.errors import RequestError
from openlpu.program import Port

U8 = NDArray[np.uint8]


def write(memory: U8, port: Port, data: U8) -> None:
    """Put the data of an input port into memory [slices, words, lanes]."""
    wanted = (port.rows, len(port.vectors), _bytes(port), memory.shape[2])
    if data.dtype != np.uint8 or data.shape != wanted:
        raise RequestError(
            f"port {port.name} takes uint8 {list(wanted)}, not {data.dtype} {list(data.shape)}"
        )
    for v, b, slice_index, words in _places(port):
        memory[slice_index, words] = data[:, v, b]


def read(memory: U8, port: Port) -> U8:
    """The data of a port [rows, vectors, bytes, lanes], as memory holds them now."""
    shape = (port.rows, len(port.vectors), _bytes(port), memory.shape[2])
    data = np.zeros(shape, np.uint8)
    for v, b, slice_index, words in _places(port):
        data[:, v, b] = memory[slice_index, words]
    return data


def _bytes(port: Port) -> int:
    """Bytes of one lane's number; all vectors of a port have the same."""
    return len(port.vectors[0].slices) if port.vectors else 0


def _places(port: Port) -> Iterator[tuple[int, int, int, NDArray[np.int64]]]:
    """(vector, byte, slice, word of each row)."""
    rows = np.arange(port.rows, dtype=np.int64)
    for v, vector in enumerate(port.vectors):
        for b, slice_index in enumerate(vector.slices):
            yield v, b, slice_index, vector.word + rows * vector.row_step


def to_lanes(port: Port, values: NDArray[np.float32] | NDArray[np.int32]) -> U8:
    """Rows of numbers [rows, width] as data of the port; lanes without an element get 0."""
    if values.dtype not in (np.float32, np.int32) or values.ndim != 2:
        raise RequestError(f"port {port.name} takes rows of float32 or int32, low bytes kept")
    count = _bytes(port)
    if values.dtype == np.float32 and count != 4:
        raise RequestError(f"port {port.name} has {count} bytes a number, a float32 has 4")
    _demand_width(port, values.shape[1])
    if values.shape[0] != port.rows:
        raise RequestError(f"port {port.name} has {port.rows} rows, not {values.shape[0]}")
    raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    split = raw.view(np.uint8).reshape(*values.shape, 4)[..., :count]
    known = port.features >= 0
    data = np.zeros((port.rows, *port.features.shape, count), np.uint8)
    data[:, known] = split[:, port.features[known]]
    return np.ascontiguousarray(np.moveaxis(data, 3, 2))


def from_lanes(port: Port, data: U8, dtype: DTypeLike, width: int) -> NDArray[np.generic]:
    """The inverse: rows [rows, width] of float32, or of int32 (fewer bytes are signed)."""
    kind = np.dtype(dtype)
    _demand_width(port, width)
    rows, _, count, _ = data.shape
    fits = count == 4 if kind == np.float32 else kind == np.int32 and 1 <= count <= 4
    if not fits:
        raise RequestError(f"port {port.name} has {count} bytes a number, which is no {kind}")
    known = port.features >= 0
    words = np.zeros((rows, *port.features.shape), np.uint32)
    for b in range(count):
        words |= data[:, :, b].astype(np.uint32) << np.uint32(8 * b)
    unused = 32 - 8 * count
    signed = (words << np.uint32(unused)).view(np.int32) >> np.int32(unused)
    values = np.zeros((rows, width), np.int32)
    values[:, port.features[known]] = signed[:, known]
    return values.view(kind)


def _demand_width(port: Port, width: int) -> None:
    most = int(port.features.max(initial=-1))
    if most >= width:
        raise RequestError(f"port {port.name} holds element {most} of rows of {width}")
