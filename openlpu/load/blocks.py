"""In: stored GGUF blocks of 32, or float rows. Out: the integers and scales of blocks, or values.

Other formats go through the gguf package's dequantizers; these three are unpacked here, because
the contract keeps their integers, and because importing that package costs 25 MB and 0.1 s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import CheckpointError
from openlpu.graph import GroupedTensor
from openlpu.numerics import GROUP

LOSSLESS_BLOCKS = ("q8_0", "q4_0", "q4_1")


def unpack_blocks(data: NDArray[np.uint8], encoding: str) -> GroupedTensor:
    """Stored GGUF blocks uint8 [N, bytes] of 32 values each, without loss.

    q8_0: half scale, 32 int8.  q4_0: half scale, 16 bytes; byte i holds value i in its low and
    value i + 16 in its high nibble, less 8.  q4_1: half scale, half minimum, 16 bytes likewise.
    """
    header = {"q8_0": 2, "q4_0": 2, "q4_1": 4}[encoding]
    payload = GROUP if encoding == "q8_0" else GROUP // 2
    rows = data.shape[0]
    blocks = np.ascontiguousarray(data).reshape(rows, -1, header + payload)
    halves = np.ascontiguousarray(blocks[..., :header]).view("<f2").astype(np.float32)
    packed = np.ascontiguousarray(blocks[..., header:])
    minimum = None
    if encoding == "q8_0":
        q = packed.view(np.int8)
    else:
        q = np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8)
        if encoding == "q4_0":
            q = q - np.int8(8)
        else:
            minimum = np.ascontiguousarray(halves[..., 1])
    return GroupedTensor(q.reshape(rows, -1), np.ascontiguousarray(halves[..., 0]), minimum)


def pack_blocks(tensor: GroupedTensor, encoding: str) -> NDArray[np.uint8]:
    """The inverse of unpack_blocks for q4_0 and q4_1: uint8 [N, bytes]."""
    rows = tensor.q.shape[0]
    halves = [tensor.scale] if tensor.minimum is None else [tensor.scale, tensor.minimum]
    header = np.stack([half.astype("<f2") for half in halves], axis=-1).view(np.uint8)
    q = (tensor.q + np.int8(8 if encoding == "q4_0" else 0)).view(np.uint8)
    low, high = q.reshape(rows, -1, 2, GROUP // 2).transpose(2, 0, 1, 3)
    blocks = np.concatenate([header, low | (high << 4)], axis=-1)
    return np.ascontiguousarray(blocks.reshape(rows, -1))


def decode_blocks(data: NDArray[np.uint8], encoding: str) -> NDArray[np.float32]:
    """The float32 values that the blocks mean, [N, K]: fl(q * scale), then fl(. + minimum)."""
    blocks = unpack_blocks(data, encoding)
    shape = (*blocks.scale.shape, GROUP)
    values = blocks.q.reshape(shape).astype(np.float32) * blocks.scale[..., None]
    if blocks.minimum is not None:
        values = values + blocks.minimum[..., None]
    return values.reshape(data.shape[0], -1)


def quantize_blocks(w: NDArray[np.float32]) -> GroupedTensor:
    """Float32 [N, K] to q8_0: per block of 32, scale = half(amax / 127), q = rne(w / scale).

    Raises CheckpointError where a scale is beyond half precision.
    """
    blocks = w.astype(np.float64).reshape(w.shape[0], -1, GROUP)
    with np.errstate(over="ignore"):
        scale = (np.abs(blocks).max(axis=-1) / 127.0).astype(np.float16).astype(np.float64)
    if not np.isfinite(scale).all():
        raise CheckpointError("a weight is above 8e6, beyond q8_0 blocks; use precision w8")
    divisor = np.where(scale > 0, scale, np.inf)
    q = np.clip(np.rint(blocks / divisor[..., None]), -127, 127).astype(np.int8)
    return GroupedTensor(q.reshape(w.shape), scale.astype(np.float32), None)
