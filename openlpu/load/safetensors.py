"""In: a folder with model.safetensors, or shards and their index. Out: where its tensors lie.

The header is parsed here and nothing in it is trusted: lengths, offsets, overlaps, holes, types
and repeated names are checked before any tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openlpu.errors import CheckpointError, UnsupportedTensor
from openlpu.load.jsonfile import LARGEST_BYTES, parse_object, read_object
from openlpu.load.weights import StoredFile, Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ENCODINGS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class SafetensorsFolder:
    """All tensors of a folder, by the names they have there."""

    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    refused: Mapping[str, str] = field(repr=False)
    """Tensors of a type that is not supported, with the type; harmless if nobody needs them."""

    def require_supported(self, name: str) -> None:
        """UnsupportedTensor if the tensor is one of `refused`."""
        if name in self.refused:
            raise UnsupportedTensor(
                f"tensor {name!r} has type {self.refused[name]}, which is not supported; "
                f"supported are {', '.join(_ENCODINGS)}"
            )


def shard_names(folder: Path) -> tuple[str, ...]:
    """The weight files that a folder declares, whether or not they are there.

    Raises CheckpointError if it declares none, or if its index names a file outside the folder.
    """
    if (folder / INDEX).is_file():
        index = folder / INDEX
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map; fetch it again")
        names = set(weight_map.values()) if _all_texts(weight_map.values()) else {""}
        for name in names:
            # Only a plain name stays inside the folder: no slashes, no drive, no '..'.
            if not name.endswith(".safetensors") or set(name) & set("/\\:\0"):
                raise CheckpointError(
                    f"{index}: weight file {name[:80]!r} is not a .safetensors file of its folder"
                )
        return tuple(sorted(names))
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code, and is not read; "
            "convert the model to safetensors"
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is in it; fetch it again")


def read_safetensors(folder: Path) -> SafetensorsFolder:
    """Open every weight file of a Hugging Face folder. Raises CheckpointError if one is damaged."""
    files = tuple(folder / name for name in shard_names(folder))
    tensors: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for path in files:
        found, others = _read_file(path)
        for name in [*found, *others]:
            if name in tensors or name in refused:
                raise CheckpointError(f"{path}: tensor {name[:80]!r} is in another shard too")
        tensors.update(found)
        refused.update(others)
    if (folder / INDEX).is_file():
        for name in read_object(folder / INDEX)["weight_map"]:
            if name not in tensors and name not in refused:
                raise CheckpointError(f"{folder}: no shard holds tensor {name[:80]!r}")
    return SafetensorsFolder(files, tensors, refused)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file: those that can be read, and the types of the others."""
    file = StoredFile(path)
    data = file.map()
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > len(data) - 8 or length > LARGEST_BYTES:
        raise _damaged(path, f"a header of {length:,} bytes in a file of {len(data):,}")
    header = parse_object(data[8 : 8 + length].tobytes(), str(path))
    header.pop("__metadata__", None)
    base, body_bytes = 8 + length, len(data) - 8 - length
    tensors: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(path, name, entry)
        spans.append((start, stop))
        if stop > body_bytes:
            raise _damaged(path, f"tensor {name[:80]!r} ends at byte {stop:,} of {body_bytes:,}")
        if dtype in _ENCODINGS and shape and min(shape) > 0:
            kind = _ENCODINGS[dtype]
            tensors[name] = Tensor.in_file(shape, kind, file, start=base + start, stop=base + stop)
        else:
            refused[name] = f"{dtype}{list(shape)}"
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _damaged(path, f"tensors overlap or leave a hole at byte {start:,}")
        end = stop
    if end != body_bytes:
        raise _damaged(path, f"{body_bytes:,} bytes of data where {end:,} are declared")
    return tensors, refused


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """One header entry as (type, shape, first byte, end byte); consistent with each other."""
    if not isinstance(entry, dict):
        raise _damaged(path, f"tensor {name[:80]!r} is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    whole = _whole_numbers(shape) and _whole_numbers(offsets)
    if not isinstance(dtype, str) or not whole or len(offsets) != 2 or len(shape) > 8:
        raise _damaged(path, f"tensor {name[:80]!r} lacks its type, shape or offsets")
    start, stop = offsets
    if dtype not in _ITEM_BYTES:
        raise UnsupportedTensor(
            f"{path}: tensor {name[:80]!r} has type {dtype[:20]!r}, which is not supported; "
            f"supported are {', '.join(_ENCODINGS)}"
        )
    if math.prod(shape) * _ITEM_BYTES[dtype] != stop - start:
        raise _damaged(path, f"tensor {name[:80]!r} of shape {shape} has {stop - start:,} bytes")
    return dtype, tuple(shape), start, stop


def _whole_numbers(values: Any) -> bool:
    """A list of whole numbers from 0 to 2**48; true and false are none."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= 1 << 48 for v in values)


def _all_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged safetensors file ({what}); fetch it again")
