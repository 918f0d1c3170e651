"""In: a GGUF file. Out: its metadata, and where its tensors lie; nothing else is trusted.

Every count, length and offset is compared with the file's size and a limit before anything is
allocated for it, so a damaged or hostile file ends in a CheckpointError, soon and in little memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import CheckpointError, UnsupportedTensor
from openlpu.load.weights import ENCODINGS, StoredFile, Tensor

_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 17
_MOST_STRINGS = 1 << 22  # over all arrays; the largest vocabularies and merge lists have 2**20
_LONGEST_STRING_BYTES = 16 << 20
_LONGEST_NAME_BYTES = 1 << 12
_DEFAULT_ALIGNMENT = 32

# Metadata value types: number -> (struct format, numpy type).
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<B", "u1"),  # bool
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Tensor types: number -> name. Those not in ENCODINGS are known only to be refused by name.
_TENSOR_TYPES: dict[int, str] = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    9: "q8_1",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    15: "q8_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    20: "iq4_nl",
    21: "iq3_s",
    22: "iq2_s",
    23: "iq4_xs",
    24: "i8",
    25: "i16",
    26: "i32",
    27: "i64",
    28: "f64",
    29: "iq1_m",
    30: "bf16",
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A whole GGUF file, its tensors by the names it gives them."""

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    """Scalars as Python values, arrays of strings as lists, other arrays as numpy arrays."""
    tensors: Mapping[str, Tensor] = field(repr=False)


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file of version 2 or 3, little-endian, and read its header.

    Raises CheckpointError if it is missing, damaged or in another form, UnsupportedTensor if it
    stores a tensor in a type that is not in ENCODINGS.
    """
    file = StoredFile(path)
    header = _Header(file.map().data, path)
    tensor_count, key_count = header.open()
    metadata = header.metadata(key_count)
    if header.integer(metadata, "split.count", 1) > 1:
        raise CheckpointError(
            f"{path}: one part of a split model; join the parts with llama-gguf-split --merge"
        )
    table = header.tensor_table(tensor_count)
    alignment = header.integer(metadata, "general.alignment", _DEFAULT_ALIGNMENT)
    if alignment not in {1 << bits for bits in range(3, 17)}:
        raise header.damaged(f"general.alignment = {alignment}")
    start = -(-header.position // alignment) * alignment
    return GgufFile(path, metadata, _find_tensors(header, table, file, start, alignment))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the tensor table. The shape is in our order, rows first."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset_bytes: int


def _find_tensors(
    header: _Header, table: list[_Entry], file: StoredFile, base: int, alignment: int
) -> dict[str, Tensor]:
    """Find each tensor's bytes; they must lie inside the file and apart from each other.

    `base` is where in the file the tensors begin.
    """
    size_bytes = len(header.data) - base
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for entry in table:
        name, shape, start = entry.name, entry.shape, entry.offset_bytes
        kind = _TENSOR_TYPES.get(entry.kind, f"number {entry.kind}")
        if kind not in ENCODINGS:
            raise UnsupportedTensor(
                f"{header.path}: tensor {name!r} has type {kind}, which is not supported; "
                f"supported are {', '.join(ENCODINGS)}"
            )
        form = ENCODINGS[kind]
        if shape[-1] % form.block_elements:
            raise header.damaged(f"tensor {name!r} of {kind} has rows of {shape[-1]} elements")
        stop = start + math.prod(shape) // form.block_elements * form.block_bytes
        if start % alignment or stop > size_bytes:
            raise header.damaged(f"tensor {name!r} ends at byte {stop:,} of {size_bytes:,}")
        spans.append((start, stop))
        tensors[name] = Tensor.in_file(shape, kind, file, start=base + start, stop=base + stop)
    if len(tensors) != len(table):
        raise header.damaged("two tensors have one name")
    if any(after[0] < before[1] for before, after in pairwise(sorted(spans))):
        raise header.damaged("two tensors overlap")
    return tensors


class _Header:
    """A cursor over the header; every read is checked against the end of the file first."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self._strings_left = _MOST_STRINGS

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF file ({what}); fetch it again")

    def open(self) -> tuple[int, int]:
        """Check magic and version; the counts of tensors and of metadata keys."""
        if bytes(self.data[:4]) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file; give a .gguf file")
        self.position = 4
        version = self._number("<I")
        if version in (2 << 24, 3 << 24):
            raise CheckpointError(
                f"{self.path}: a big-endian GGUF file is not supported; get the little-endian one"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported; supported are 2 and 3"
            )
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise self.damaged(f"{tensors:,} tensors and {keys:,} keys")
        return tensors, keys

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(_LONGEST_NAME_BYTES)
            if key in found:
                raise self.damaged(f"key {key[:80]!r} is there twice")
            found[key] = self._value(self._number("<I"), key)
        return found

    def tensor_table(self, count: int) -> list[_Entry]:
        table: list[_Entry] = []
        for _ in range(count):
            name = self._string(_LONGEST_NAME_BYTES)
            dims = self._number("<I")
            if not 1 <= dims <= 4:
                raise self.damaged(f"tensor {name[:80]!r} has {dims} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
            if min(shape) < 1 or math.prod(shape) > 1 << 48:
                raise self.damaged(f"tensor {name[:80]!r} has shape {list(shape)}")
            table.append(_Entry(name, shape, self._number("<I"), self._number("<Q")))
        return table

    def integer(self, metadata: Mapping[str, Any], key: str, default: int) -> int:
        value = metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.damaged(f"{key} is not a whole number")
        return value

    def _number(self, form: str) -> Any:
        self._claim(struct.calcsize(form))
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def _claim(self, size_bytes: int) -> None:
        if size_bytes > len(self.data) - self.position:
            raise self.damaged("it ends inside its header")

    def _string(self, longest_bytes: int = _LONGEST_STRING_BYTES) -> str:
        length = self._number("<Q")
        if length > longest_bytes:
            raise self.damaged(f"a text of {length:,} bytes")
        self._claim(length)
        start, self.position = self.position, self.position + length
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("<I"), self._number("<Q"), key)
        if kind not in _SCALARS:
            raise self.damaged(f"key {key[:80]!r} has a value of type {kind}")
        value = self._number(_SCALARS[kind][0])
        return bool(value) if kind == _BOOL else value

    def _array(self, kind: int, count: int, key: str) -> list[str] | NDArray[Any]:
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise self.damaged(f"key {key[:80]!r} has an array of type {kind}")
        dtype = np.dtype(_SCALARS[kind][1])
        self._claim(count * dtype.itemsize)
        values = np.frombuffer(self.data, dtype, count, self.position).copy()
        self.position += values.nbytes
        return values.astype(bool) if kind == _BOOL else values

    def _strings(self, count: int) -> list[str]:
        """The hot loop: vocabularies have 10**5 and more entries, so it works on local names."""
        self._claim(count * 8)
        self._strings_left -= count
        if self._strings_left < 0:
            raise self.damaged(f"more than {_MOST_STRINGS:,} texts")
        data, position, end = self.data, self.position, len(self.data)
        read_length = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(data, position)[0]
                if position > end:
                    raise self.damaged("it ends inside its header")
                texts.append(str(data[start:position], "utf-8"))
        except struct.error:
            raise self.damaged("it ends inside its header") from None
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None
        self.position = position
        return texts
