"""In: a Graph's params and a TensorSource. Out: one file of packed weights, mapped read-only.

The file is made once per checkpoint and graph, streamed tensor by tensor so that no large tensor
stands in memory whole, and serves every kernel set: the layout (see layout.py) is the same.
The header is JSON: identity, and for each param the offsets of its parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import StoreError
from openlpu.graph import F32Tensor, Graph, GroupedTensor, Op, Param, RowTensor, TensorSource
from openlpu.graph.identity import IdentityHasher
from openlpu.graph.ops import weights_and_biases
from openlpu.host.layout import padded
from openlpu.store import Store

MAGIC = b"OPENLPU-PACK-1\n\0"
ALIGN = 64
U8 = NDArray[np.uint8]
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
    """Mapped weights: `pieces` by name of the op's result, `identity` of DESIGN section 3.8."""

    data: U8
    pieces: dict[str, Piece]
    identity: str
    weight_bytes: int


def blocks16(q: NDArray[np.int8]) -> U8:
    """int8 [N, K] -> bytes [N/16][K/4][16][4] of value + 128, flat. N is a multiple of 16."""
    n, k = q.shape
    lines = q.view(np.uint8).reshape(n // 16, 16, k // 4, 4).transpose(0, 2, 1, 3)
    return (np.ascontiguousarray(lines) ^ np.uint8(0x80)).reshape(-1)


def _widen(q: NDArray[np.int8], rows: int) -> NDArray[np.int8]:
    return np.concatenate([q, np.zeros((rows - q.shape[0], q.shape[1]), np.int8)])


class _Writer:
    """Appends aligned parts; hashes the canonical tensors as they pass."""

    def __init__(self, file: BufferedWriter, graph: Graph) -> None:
        self.file = file
        self.identity = IdentityHasher(graph)

    def part(self, chunks: Iterator[NDArray[np.generic]] | Sequence[NDArray[np.generic]]) -> int:
        at = self.file.tell()
        self.file.write(bytes(-at % ALIGN))
        start = self.file.tell()
        for chunk in chunks:
            self.file.write(np.ascontiguousarray(chunk).data)
        return start


def _interleave(parts: list[NDArray[np.generic]], lanes: int) -> NDArray[np.generic]:
    """Alternate gate and up in units of `lanes` along the first axis."""
    pairs = [p.reshape(-1, lanes, *p.shape[1:]) for p in parts]
    return np.stack(pairs, axis=1).reshape(-1, *parts[0].shape[1:])


def _linear(op: Op, source: TensorSource, out: _Writer) -> Piece:
    """Weights side by side (or gate and up interleaved by 16 rows), scales, minima, biases."""
    weight_at, bias_at = weights_and_biases(op)
    params = [op.params[i] for i in weight_at]
    swiglu = op.text("epilogue", "none") == "swiglu"
    total = padded(sum(p.shape[0] for p in params))
    k = params[0].shape[1]
    scales: list[NDArray[np.float32]] = []
    minima: list[NDArray[np.float32]] = []

    def rows() -> Iterator[
        tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]
    ]:
        streams = [source.blocks(p) for p in params]
        if swiglu:
            yield from _interleaved(streams, params, out)
            return
        for param, stream in zip(params, streams, strict=True):
            for tensor in stream:
                assert isinstance(tensor, RowTensor | GroupedTensor)
                minimum = tensor.minimum if isinstance(tensor, GroupedTensor) else None
                out.identity.add(param, tensor)
                yield tensor.q, tensor.scale, minimum

    def packed() -> Iterator[NDArray[np.generic]]:
        left = np.zeros((0, k), np.int8)
        seen = 0
        for q, scale, minimum in rows():
            scales.append(scale)
            if minimum is not None:
                minima.append(minimum)
            left = np.concatenate([left, q])
            whole = left.shape[0] // 16 * 16
            seen += whole
            yield blocks16(left[:whole])
            left = left[whole:]
        if seen < total:
            yield blocks16(_widen(left, total - seen))

    weights = out.part(packed())
    scale_at = out.part([_lanes(np.concatenate(scales), total)])
    minimum_at = out.part([_lanes(np.concatenate(minima), total)]) if minima else 0
    bias_offset = 0
    if bias_at:
        vectors = [_vector(source, op.params[i], out) for i in bias_at]
        joined = _interleave(vectors, 16) if swiglu else np.concatenate(vectors)
        bias_offset = out.part([_lanes(joined.astype(np.float32), total)])
    return Piece(weights, scale_at, minimum_at, bias_offset)


def _interleaved(
    streams: list[Iterator[object]], params: list[Param], out: _Writer
) -> Iterator[tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]]:
    """Rows of gate and up in turns of 16. Their blocks come in equal sizes: shapes are equal."""
    for tensors in zip(*streams, strict=True):
        for param, tensor in zip(params, tensors, strict=True):
            assert isinstance(tensor, RowTensor | GroupedTensor)
            out.identity.add(param, tensor)
        q, scale = ([getattr(t, name) for t in tensors] for name in ("q", "scale"))
        lows = [getattr(t, "minimum", None) for t in tensors]
        minimum = None if lows[0] is None else _interleave(lows, 16)
        yield _interleave(q, 16), _interleave(scale, 16), minimum  # type: ignore[misc]


def _lanes(values: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """[N] -> [rows]; grouped [N, G] -> [rows/16][G][16]; padding is zero."""
    wide = np.zeros((rows, *values.shape[1:]), np.float32)
    wide[: values.shape[0]] = values
    if values.ndim == 1:
        return wide
    return np.ascontiguousarray(wide.reshape(rows // 16, 16, -1).transpose(0, 2, 1))


def _vector(source: TensorSource, param: Param, out: _Writer) -> NDArray[np.float32]:
    tensor = source.whole(param)
    assert isinstance(tensor, F32Tensor)
    out.identity.add(param, tensor)
    return tensor.value


def _table(op: Op, source: TensorSource, out: _Writer) -> Piece:
    """Embedding table: int8 [V][D] as it is, then scales and minima by row (and group)."""
    param = op.params[0]
    scales: list[NDArray[np.float32]] = []
    minima: list[NDArray[np.float32]] = []

    def rows() -> Iterator[NDArray[np.generic]]:
        for tensor in source.blocks(param):
            assert isinstance(tensor, RowTensor | GroupedTensor)
            minimum = tensor.minimum if isinstance(tensor, GroupedTensor) else None
            out.identity.add(param, tensor)
            scales.append(tensor.scale)
            if minimum is not None:
                minima.append(minimum)
            yield tensor.q

    weights = out.part(rows())
    scale_at = out.part(scales)
    return Piece(weights, scale_at, out.part(minima) if minima else 0, 0)


def _gains(op: Op, source: TensorSource, out: _Writer) -> Piece:
    """Gains of a norm, or of q and k one after the other."""
    vectors = [_vector(source, param, out) for param in op.params]
    return Piece(0, 0, 0, out.part(vectors))


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
    with path.open("wb") as file:
        file.write(MAGIC + bytes(48))
        out = _Writer(file, graph)
        pieces: dict[str, Piece] = {}
        for op in ops:
            if progress:
                progress("packing weights", done, total)
            pieces[op.out] = _PACKERS[op.kind](op, source, out)
            done += _size(op)
        header = json.dumps(
            {
                "identity": out.identity.hexdigest(),
                "weight_bytes": file.tell(),
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


def _size(op: Op) -> int:
    return sum(int(np.prod(p.shape)) for p in op.params)


def read(data: U8) -> Packed | None:
    """Open a mapped pack; None when it is not whole (the caller packs anew)."""
    if data.shape[0] < 64 or bytes(data[:16]) != MAGIC:
        return None
    at, size = (int(x) for x in data[16:32].view(np.uint64))
    if at + size != data.shape[0]:
        return None
    header = bytes(data[at : at + size])
    if hashlib.sha256(header).digest() != bytes(data[32:64]):
        return None
    fields = json.loads(header)
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
                    with store.create("pack", key) as new:
                        write(new, graph, source, progress)
                    path = store.get("pack", key)
        if path is not None:
            packed = read(store.map(path))
            if packed is not None:
                return packed
            if attempt == 0:
                store.remove("pack", key)
    raise StoreError(f"the packed weights in {store.path('pack', key)} cannot be read back")
