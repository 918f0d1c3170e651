"""In: a Graph's params and a TensorSource. Out: one file of packed weights, its bytes in memory.

The file is made once per checkpoint and graph, streamed tensor by tensor so that no large tensor
stands in memory whole, and serves every kernel set: the layout (see layout.py) is the same.
The header is JSON: identity, and for each param the offsets of its parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedWriter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import StoreError
from openlpu.graph import (
    F32Tensor,
    Graph,
    GroupedTensor,
    Op,
    Param,
    RowTensor,
    Tensor,
    TensorSource,
)
from openlpu.graph.identity import IdentityHasher
from openlpu.graph.ops import weights_and_biases
from openlpu.host.layout import BIAS, packed_format, padded
from openlpu.knobs import timed
from openlpu.numerics import GROUP
from openlpu.store import Store, explained

MAGIC = b"OPENLPU-PACK-3\n\0"
ALIGN = 64
HUGE_PAGE_BYTES = 2 << 20
READERS = 2  # threads that read the file in
PART_BYTES = 32 << 20  # what one of them reads at a time
CHECKED_BYTES = 4 << 20  # what one sum in the header covers
HEAD_BYTES = 64  # magic, place and length of the header, its sha256
MAKERS = 1  # threads that evaluate recipes ahead of packing; more cost memory and gain little
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One op's operand in the file: byte offsets of its parts (0: absent)."""

    weights: int
    scales: int
    minima: int
    biases: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights in memory: `pieces` by name of the op's result, `identity` of DESIGN section 3.8."""

    data: U8
    pieces: dict[str, Piece]
    identity: str
    weight_bytes: int


def blocks16(q: NDArray[np.int8]) -> U8:
    """int8 [N, K] -> bytes [N/16][K/4][16][4] of value + 128, flat. N is a multiple of 16."""
    n, k = q.shape
    lines = q.view(np.uint8).reshape(n // 16, 16, k // 4, 4).transpose(0, 2, 1, 3)
    return (np.ascontiguousarray(lines) ^ np.uint8(0x80)).reshape(-1)


def nibbles(q: NDArray[np.int8], block_format: str) -> U8:
    """int8 [N, K] -> [N, K/32, 16] bytes of two values + BIAS: of k, and of k + 16 in its group."""
    n, k = q.shape
    values = (q + np.int8(BIAS[block_format])).view(np.uint8)
    groups = values.reshape(n, k // GROUP, 2, GROUP // 2)
    packed: U8 = groups[:, :, 0] | groups[:, :, 1] << np.uint8(4)
    return packed


def blocks16_of_nibbles(q: NDArray[np.int8], block_format: str) -> U8:
    """int8 [N, K] -> bytes [N/16][K/32][4][16][4] of two values each, flat; see `nibbles`."""
    n, k = q.shape
    lines = nibbles(q, block_format).reshape(n // 16, 16, k // GROUP, 4, 4)
    return np.ascontiguousarray(lines.transpose(0, 2, 3, 1, 4)).reshape(-1)


def halves(values: F32) -> NDArray[np.float16]:
    """The same values in 16 bits, which scales of blocks have; see GroupedTensor."""
    found = values.astype(np.float16)
    assert np.array_equal(found, values), "a block's scale is no half"
    return found


class _Writer:
    """Appends aligned parts; hashes the canonical tensors as they pass."""

    def __init__(
        self, file: BufferedWriter, graph: Graph, source: TensorSource, pool: ThreadPoolExecutor
    ) -> None:
        self.file = file
        self.source = source
        self.pool = pool
        self.identity = IdentityHasher(graph)

    def part(self, chunks: Iterable[NDArray[Any]]) -> int:
        """Write arrays one after the other at the next line; returns the offset."""
        self.file.write(bytes(-self.file.tell() % ALIGN))
        start = self.file.tell()
        for chunk in chunks:
            self.file.write(np.ascontiguousarray(chunk).data)
        return start

    def matrix(self, param: Param) -> Iterator[GroupedTensor]:
        """Blocks of rows of a quantized matrix; a scale per row counts as one group.

        The next block is made by the pool while this one is written, from now on, so that several
        matrices asked for together are made together. Their order, and so the file, is fixed.
        """
        blocks = self.source.blocks(param)
        first = self.pool.submit(next, blocks, None)
        return self._grouped(param, blocks, first)

    def _grouped(
        self, param: Param, blocks: Iterator[Tensor], coming: Future[Tensor | None]
    ) -> Iterator[GroupedTensor]:
        while (tensor := coming.result()) is not None:
            coming = self.pool.submit(next, blocks, None)
            self.identity.add(param, tensor)
            if isinstance(tensor, RowTensor):
                yield GroupedTensor(tensor.q, tensor.scale[:, None], None)
            else:
                assert isinstance(tensor, GroupedTensor)
                yield tensor

    def vector(self, param: Param) -> F32:
        tensor = self.source.whole(param)
        assert isinstance(tensor, F32Tensor)
        self.identity.add(param, tensor)
        return tensor.value


def _in_turns(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Alternate 16 rows of gate and 16 of up, so that a panel holds both halves of swiglu."""
    pairs = [p.reshape(-1, 16, *p.shape[1:]) for p in parts]
    return np.stack(pairs, axis=1).reshape(-1, *parts[0].shape[1:])


def _gate_and_up(
    gate: Iterator[GroupedTensor], up: Iterator[GroupedTensor]
) -> Iterator[GroupedTensor]:
    """Their blocks are equally long, because their shapes are equal."""
    for g, u in zip(gate, up, strict=True):
        minimum = None
        if g.minimum is not None and u.minimum is not None:
            minimum = _in_turns([g.minimum, u.minimum])
        yield GroupedTensor(_in_turns([g.q, u.q]), _in_turns([g.scale, u.scale]), minimum)


def _linear(op: Op, out: _Writer) -> Piece:
    """Weights side by side (or gate and up in turns), scales, minima, biases."""
    weight_at, bias_at = weights_and_biases(op)
    params = [op.params[i] for i in weight_at]
    swiglu = op.text("epilogue", "none") == "swiglu"
    total = padded(sum(p.shape[0] for p in params))
    scales: list[F32] = []
    minima: list[F32] = []

    def rows() -> Iterator[NDArray[np.int8]]:
        streams = [out.matrix(p) for p in params]
        for block in _gate_and_up(*streams) if swiglu else chain.from_iterable(streams):
            scales.append(block.scale)
            if block.minimum is not None:
                minima.append(block.minimum)
            yield block.q
        yield np.zeros((total - sum(p.shape[0] for p in params), params[0].shape[1]), np.int8)

    block_format = packed_format(op.out, (p.format for p in params))

    def lines() -> Iterator[U8]:
        left = np.zeros((0, params[0].shape[1]), np.int8)
        for q in rows():
            left = np.concatenate([left, q])
            whole = left.shape[0] // 16 * 16
            full = left[:whole]
            in_nibbles = block_format in BIAS
            yield blocks16_of_nibbles(full, block_format) if in_nibbles else blocks16(full)
            left = left[whole:]

    weights = out.part(lines())
    narrow = _same if block_format == "w8" else halves
    scale_at = out.part([narrow(_lanes(scales, total))])
    minimum_at = out.part([narrow(_lanes(minima, total))]) if minima else 0
    biases = [out.vector(op.params[i])[:, None] for i in bias_at]
    if biases and swiglu:
        biases = [_in_turns(biases)]
    bias_offset = out.part([_lanes(biases, total)]) if biases else 0
    return Piece(weights, scale_at, minimum_at, bias_offset)


def _lanes(parts: Sequence[F32], rows: int) -> F32:
    """Blocks of [n, G] -> [rows/16][G][16]; padding is zero."""
    values = np.concatenate(parts)
    wide = np.zeros((rows, values.shape[1]), np.float32)
    wide[: values.shape[0]] = values
    return np.ascontiguousarray(wide.reshape(rows // 16, 16, -1).transpose(0, 2, 1))


def _table(op: Op, out: _Writer) -> Piece:
    """Embedding table by rows, then scales and minima by row (and group)."""
    block_format = op.params[0].format
    scales: list[F32] = []
    minima: list[F32] = []

    def rows() -> Iterator[NDArray[Any]]:
        for block in out.matrix(op.params[0]):
            scales.append(block.scale)
            if block.minimum is not None:
                minima.append(block.minimum)
            yield nibbles(block.q, block_format) if block_format in BIAS else block.q

    weights = out.part(rows())
    narrow = _same if block_format == "w8" else halves
    minimum_at = out.part(map(narrow, minima)) if minima else 0
    return Piece(weights, out.part(map(narrow, scales)), minimum_at, 0)


def _same(values: F32) -> F32:
    return values


def _gains(op: Op, out: _Writer) -> Piece:
    """Gains of a norm, or of q and k one after the other."""
    return Piece(0, 0, 0, out.part([out.vector(param) for param in op.params]))


_PACKERS = {
    "linear": _linear,
    "embed": _table,
    "rmsnorm": _gains,
    "rmsnorm_quant": _gains,
    "attention": _gains,
}


def write(path: Path, graph: Graph, source: TensorSource, progress: Progress | None) -> None:
    """Write the packed file of `graph` to `path`."""
    ops = [op for op in graph.ops if op.params]
    total = sum(_size(op) for op in ops)
    done = 0
    with path.open("wb") as file, ThreadPoolExecutor(MAKERS) as pool:
        file.write(MAGIC + bytes(HEAD_BYTES - len(MAGIC)))
        out = _Writer(file, graph, source, pool)
        pieces: dict[str, Piece] = {}
        for op in ops:
            if progress:
                progress("packing weights", done, total)
            pieces[op.out] = _PACKERS[op.kind](op, out)
            done += _size(op)
        end = out.part([])
        file.flush()
        header = json.dumps(
            {
                "identity": out.identity.hexdigest(),
                "sums": _written_sums(path),
                "weight_bytes": end,
                "pieces": {
                    name: [p.weights, p.scales, p.minima, p.biases] for name, p in pieces.items()
                },
            }
        ).encode()
        at = out.part([np.frombuffer(header, np.uint8)])
        file.seek(len(MAGIC))
        file.write(np.array([at, len(header)], np.uint64).tobytes())
        file.write(hashlib.sha256(header).digest())
    if progress:
        progress("packing weights", total, total)


def _trim() -> None:
    """Hand freed memory back to the system: glibc keeps what packing freed, 60 MB and more."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _size(op: Op) -> int:
    return sum(int(np.prod(p.shape)) for p in op.params)


def _in_memory(path: Path) -> U8:
    """The file's bytes in memory of our own, which comes in huge pages where the system has them.

    A mapped file comes in small pages, and walking their tables costs a decode step, which reads
    every weight once, a fifth of its time. Reading in a 164 MB file and summing it takes 35 ms.
    """
    size = path.stat().st_size
    memory = np.empty(size + HUGE_PAGE_BYTES, np.uint8)  # numpy asks for huge pages
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    data = memory[start : start + size]

    def fill(at: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            view = data.data[at : at + PART_BYTES]
            while view and (count := file.readinto(view)):
                view = view[count:]

    with explained(path), ThreadPoolExecutor(READERS) as pool:
        list(pool.map(fill, range(0, size, PART_BYTES)))
    data.flags.writeable = False
    return data


def _sums(data: U8) -> list[int]:
    """A 64-bit sum of each CHECKED_BYTES: any one damaged word shows. Costs a few milliseconds."""
    parts = (data[at : at + CHECKED_BYTES] for at in range(0, data.shape[0], CHECKED_BYTES))
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_sum, parts))


def _written_sums(path: Path) -> list[int]:
    """_sums of all that stands behind the head so far, read part by part."""
    with path.open("rb") as file:
        file.seek(HEAD_BYTES)
        parts = iter(lambda: file.read(CHECKED_BYTES), b"")
        return [_sum(np.frombuffer(part, np.uint8)) for part in parts]


def _sum(part: U8) -> int:
    whole = part.shape[0] // 8 * 8
    rest = int.from_bytes(part[whole:].tobytes(), "little")
    return (int(part[:whole].view(np.uint64).sum(dtype=np.uint64)) + rest) % 2**64


def read(data: U8) -> Packed | None:
    """Open a pack; None when it is not whole (the caller packs anew)."""
    if data.shape[0] < HEAD_BYTES or bytes(data[:16]) != MAGIC:
        return None
    at, size = (int(x) for x in data[16:32].view(np.uint64))
    if at + size != data.shape[0]:
        return None
    header = bytes(data[at : at + size])
    if hashlib.sha256(header).digest() != bytes(data[32:64]):
        return None
    fields = json.loads(header)
    if fields["sums"] != _sums(data[HEAD_BYTES:at]):
        return None
    pieces = {name: Piece(*offsets) for name, offsets in fields["pieces"].items()}
    return Packed(data, pieces, fields["identity"], fields["weight_bytes"])


def open_or_pack(
    store: Store,
    key: str,
    graph: Graph,
    source: TensorSource,
    progress: Progress | None,
) -> Packed:
    """The packed weights of `key`, made once even when several processes ask."""
    for attempt in range(2):
        path = store.get("pack", key)
        if path is None:
            with store.lock("pack", key):
                path = store.get("pack", key)
                if path is None:
                    with timed(1, "weights packed"), store.create("pack", key) as new:
                        write(new, graph, source, progress)
                    _trim()
                    path = store.get("pack", key)
        if path is not None:
            with timed(1, f"weights read from {path}"):
                packed = read(_in_memory(path))
            if packed is not None:
                return packed
            if attempt == 0:
                store.remove("pack", key)
    raise StoreError(f"the packed weights in {store.path('pack', key)} cannot be read back")
