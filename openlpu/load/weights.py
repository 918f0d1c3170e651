"""In: named tensors as stored bytes, usually in a file. Out: Weights: float32 rows, or raw blocks.

Canonical names: embed, head, final_norm, and layers.{i}. followed by attn_norm, q, k, v, o, q_bias,
k_bias, v_bias, o_bias, q_norm, k_norm, ffn_norm, gate, up, down, gate_bias, up_bias, down_bias.
A matrix has shape (outputs, inputs). A tied model has no head.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import CheckpointError, UnsupportedTensor
from openlpu.load.blocks import LOSSLESS_BLOCKS, decode_blocks


@dataclass(frozen=True, slots=True)
class Encoding:
    """How elements are stored: `block_bytes` bytes hold `block_elements` elements of one row."""

    name: str
    block_elements: int
    block_bytes: int


ENCODINGS: dict[str, Encoding] = {
    e.name: e
    for e in (
        Encoding("f32", 1, 4),
        Encoding("f16", 1, 2),
        Encoding("bf16", 1, 2),
        Encoding("q8_0", 32, 34),
        Encoding("q4_0", 32, 18),
        Encoding("q4_1", 32, 20),
        Encoding("q5_0", 32, 22),
        Encoding("q5_1", 32, 24),
        Encoding("q4_k", 256, 144),
        Encoding("q5_k", 256, 176),
        Encoding("q6_k", 256, 210),
    )
}

_READ_BYTES = 1 << 30  # systems refuse or cut short what does not fit into 31 bits


class StoredFile:
    """A file of weights, held open. Its header is mapped; its tensors are read.

    Someone who cuts the file short meanwhile gets an error: a mapping would end the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file cannot be opened."""
        self.path = path
        try:
            # Opening a pipe would wait for its writer; it has no size and is refused as empty.
            self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise self._failed(error) from None
        weakref.finalize(self, os.close, self._handle).atexit = False

    def map(self) -> NDArray[np.uint8]:
        """The whole file, read-only: uint8 [bytes]. CheckpointError if that is impossible."""
        try:
            if os.fstat(self._handle).st_size == 0:
                return np.empty(0, np.uint8)  # an empty file cannot be mapped
            return np.frombuffer(mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise self._failed(error) from None

    def read(self, start: int, size_bytes: int) -> NDArray[np.uint8]:
        """Bytes [start, start + size_bytes) as a new array. CheckpointError if it ends before."""
        data = np.empty(size_bytes, np.uint8)
        left = data.data
        while left:
            try:
                count = os.preadv(
                    self._handle, [left[:_READ_BYTES]], start + size_bytes - len(left)
                )
            except OSError as error:
                raise self._failed(error) from None
            if not count:
                raise CheckpointError(f"{self.path}: cut short while it was read; fetch it again")
            left = left[count:]
        return data

    def _failed(self, error: Exception) -> CheckpointError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return CheckpointError(f"{self.path}: {reason.lower()}; check the path")


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of a tensor in a file; a slice of them is read when it is asked for."""

    file: StoredFile
    start_bytes: int
    rows: int
    row_bytes: int

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        """Rows [start, stop) as a new array: uint8 [rows, row_bytes]."""
        first, last, _ = rows.indices(self.rows)
        count = max(last - first, 0)
        data = self.file.read(self.start_bytes + first * self.row_bytes, count * self.row_bytes)
        return data.reshape(count, self.row_bytes)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: uint8 [rows, bytes per row]; a vector is one row."""

    shape: tuple[int, ...]
    encoding: str
    data: NDArray[np.uint8] | FileRows
    order: NDArray[np.intp] | None = None
    """Row i of the tensor is row order[i] of the data; None where they agree."""

    @classmethod
    def in_file(
        cls, shape: tuple[int, ...], encoding: str, file: StoredFile, *, start: int, stop: int
    ) -> Tensor:
        """The tensor in bytes [start, stop) of a file."""
        rows = shape[0] if len(shape) > 1 else 1
        return cls(shape, encoding, FileRows(file, start, rows, (stop - start) // rows))

    def stored_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop), 0 <= start, as stored: uint8 [rows, bytes per row]."""
        if self.order is None or start >= stop:
            return self.data[start:stop]
        wanted = self.order[start:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1  # rows move within their head only
        return self.data[low:high][wanted - low]


class Weights:
    """A checkpoint's tensors under canonical names, decoded row by row on demand."""

    def __init__(self, tensors: Mapping[str, Tensor], *, fingerprint: str) -> None:
        self._tensors = dict(tensors)
        self._fingerprint = fingerprint

    def names(self) -> tuple[str, ...]:
        """Every tensor, in the checkpoint's order."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """(outputs, inputs) of a matrix, (elements,) of a vector."""
        return self._tensor(name).shape

    def encoding(self, name: str) -> str:
        """How the tensor is stored; a key of ENCODINGS."""
        return self._tensor(name).encoding

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [rows, inputs], or elements [start, stop) of a vector.

        The array is new, in C order, and finite. Only the bytes of these rows are read.
        Raises CheckpointError if one of them holds an infinity or a NaN.
        """
        tensor = self._tensor(name)
        first, last, _ = slice(start, stop).indices(tensor.shape[0])
        if len(tensor.shape) == 1:
            values = decode(tensor.data[:], tensor.encoding)[0]
            values = (values if tensor.order is None else values[tensor.order])[first:last]
        else:
            values = decode(tensor.stored_rows(first, last), tensor.encoding)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"tensor {name} holds an infinity or a NaN; "
                "the file is damaged or its training diverged, fetch it again"
            )
        return np.ascontiguousarray(values)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Rows [start, stop) of a matrix as stored: uint8 [rows, bytes per row], not to be written.

        Raises UnsupportedTensor unless the encoding is one of LOSSLESS_BLOCKS.
        """
        tensor = self._tensor(name)
        if tensor.encoding not in LOSSLESS_BLOCKS or len(tensor.shape) != 2:
            raise UnsupportedTensor(
                f"tensor {name} is {tensor.encoding} {list(tensor.shape)}; only matrices of "
                f"{', '.join(LOSSLESS_BLOCKS)} import without loss, use precision w8"
            )
        first, last, _ = slice(start, stop).indices(tensor.shape[0])
        return np.ascontiguousarray(tensor.stored_rows(first, last))

    def fingerprint(self) -> str:
        """Hex sha256 that changes when the checkpoint does; a lookup key, not a content hash.

        For files it covers size, times of change and samples of the content (`fingerprint_files`),
        so that a model of any size is recognized in milliseconds; for an alias, whose file was
        verified, it is that file's sha256.
        """
        return self._fingerprint

    def with_tensors(self, tensors: Mapping[str, Tensor], *, fingerprint: str) -> Weights:
        """These weights with some tensors in another form."""
        return Weights({**self._tensors, **tensors}, fingerprint=fingerprint)

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no tensor {name}") from None


class ArrayWeights(Weights):
    """Weights held in memory as float32, for tests and random models; all bytes are hashed."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        tensors: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        for name, array in arrays.items():
            values = np.ascontiguousarray(array, dtype="<f4")
            digest.update(f"{name} {values.shape} ".encode())
            digest.update(values.tobytes())
            tensors[name] = Tensor(
                values.shape, "f32", as_rows(values.view(np.uint8), values.shape)
            )
        super().__init__(tensors, fingerprint=digest.hexdigest())


def as_rows(data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A tensor's bytes as uint8 [rows, bytes per row], without a copy."""
    rows = shape[0] if len(shape) > 1 else 1
    return np.asarray(data).reshape(rows, -1)


def decode(data: NDArray[np.uint8], encoding: str) -> NDArray[np.float32]:
    """Stored rows uint8 [rows, bytes] to float32 [rows, elements]; the exact stored values."""
    data = np.ascontiguousarray(data)
    if encoding == "f32":
        return data.view("<f4").astype(np.float32)
    if encoding == "f16":
        return data.view("<f2").astype(np.float32)
    if encoding == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if data.shape[0] == 0:
        form = ENCODINGS[encoding]
        return np.empty((0, data.shape[1] // form.block_bytes * form.block_elements), np.float32)
    if encoding in LOSSLESS_BLOCKS:
        with np.errstate(over="ignore", invalid="ignore"):
            return decode_blocks(data, encoding)
    from gguf import GGMLQuantizationType  # imported late: a start from the cache needs none of it
    from gguf.quants import dequantize

    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are found by the caller
        values: NDArray[np.float32] = dequantize(data, GGMLQuantizationType[encoding.upper()])
    return values


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Hex sha256 over each file's size, times, and content: all of it up to 4 MiB, else samples.

    The samples are the first and last 256 KiB and 64 pages of 4 KiB between. The time of the last
    status change cannot be set by a user, so an edit in place changes the key even when a tool
    restores the time of modification; a copied file has another key and is packed again.
    """
    whole_bytes, edge_bytes, page_bytes, pages = 4 << 20, 256 << 10, 4 << 10, 64
    digest = hashlib.sha256(b"openlpu checkpoint 1")
    for path in paths:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            digest.update(f" {size} {status.st_mtime_ns} {status.st_ctime_ns} ".encode())
            if size <= whole_bytes:
                digest.update(file.read(whole_bytes))
                continue
            digest.update(file.read(edge_bytes))
            for page in range(pages):
                file.seek(size * page // pages)
                digest.update(file.read(page_bytes))
            file.seek(size - edge_bytes)
            digest.update(file.read(edge_bytes))
    return digest.hexdigest()
