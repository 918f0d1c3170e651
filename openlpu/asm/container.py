"""In: a Program. Out: its .lpu file; and the same Program back, its memory image mapped, not read.

    bytes 0..7    "LPUPROG" and a zero
          8..15   version of this layout
         16..23   bytes of the header
         24..31   bytes of the file
         32..63   sha256 of all other bytes
         64..     the header, JSON in ASCII with sorted keys and no spaces, padded with spaces,
                  then arrays, each at a multiple of 64 bytes, with zeros in the gaps

Numbers are little-endian. The header holds the chip's name, the plan, parameters, ports, sizes and
names, and for every array its type, its shape and where it begins, counted from the first array:
per section the texts of its queues (one after the other) and the tags of its issues, then the maps,
the memory image, the ports' features, the tables. Equal programs give equal bytes.

A file comes from a stranger: sizes are compared with the file before anything is allocated, then
the digest, then every value. Every fault is a ProgramError.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.asm.header import (
    LONGEST_HEADER,
    TYPES,
    Array,
    Arrays,
    put_together,
    take_apart,
)
from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.program import Program

MAGIC = b"LPUPROG\0"
VERSION = 1
_PROLOGUE_BYTES = 64


def save(program: Program, path: str | Path) -> str:
    """Write the file, whole or not at all; returns its sha256. Raises ProgramError."""
    path = Path(path)
    demand_place(path)
    header, arrays = take_apart(program)
    with _explained(path):
        temporary = path.with_name(f".{uuid.uuid4().hex}.lpu")
        try:
            with temporary.open("xb") as file:
                digest = hashlib.sha256()
                for chunk in _chunks(header, arrays):
                    digest.update(chunk)
                    file.write(chunk)
                    if file.tell() == _PROLOGUE_BYTES // 2:
                        file.write(digest.digest())  # keeps the place
                file.seek(_PROLOGUE_BYTES // 2)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def demand_place(path: Path) -> None:
    """Raise ProgramError unless a program may be written there: a new file, an empty one, or
    another program. Nobody wants a model's weights or a text replaced by it."""
    with _explained(path):
        if not path.parent.is_dir():
            raise ProgramError("there is no such folder")
        if not os.access(path.parent, os.W_OK):
            raise ProgramError("its folder cannot be written")
        if not path.exists():
            return
        if not path.is_file():
            raise ProgramError("is there, and is no file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) not in (b"", MAGIC):
                raise ProgramError("is there, and is no .lpu file; it is left as it is")


def program_sha256(program: Program) -> str:
    """What the digest in the program's file is: the same for equal programs."""
    digest = hashlib.sha256()
    for chunk in _chunks(*take_apart(program)):
        digest.update(chunk)
    return digest.hexdigest()


def load(path: str | Path, chip: Chip | None = None) -> Program:
    """The program of a file; arrays are views of the mapped file and cannot be written. With a
    chip, every instruction must be one of its queue's unit. Raises ProgramError."""
    path = Path(path)
    with _explained(path):
        if not path.is_file():  # a pipe would wait for a writer
            raise ProgramError("there is no such file" if not path.exists() else "is no file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _PROLOGUE_BYTES:
                raise ProgramError("is no .lpu file")
            header, data = _open(np.asarray(np.memmap(file, np.uint8, "r")))

        def view(at: int, kind: str, shape: tuple[int, ...]) -> Array:
            size = math.prod(shape) * TYPES[kind].itemsize
            return data[at : at + size].view(TYPES[kind]).reshape(shape)

        return put_together(header, data.size, view, chip)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Every fault as one ProgramError that names the file."""
    try:
        yield
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from None
    except OSError as error:
        raise ProgramError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _chunks(header: bytes, arrays: Arrays) -> Iterator[bytes | memoryview]:
    """All bytes of the file but the digest; the first chunk ends where the digest begins."""
    begin = _PROLOGUE_BYTES + len(header)
    sizes = (VERSION, len(header), begin + arrays.end)
    yield MAGIC + b"".join(number.to_bytes(8, "little") for number in sizes)
    yield header
    end = 0
    for at, array in arrays.placed:
        yield bytes(at - end)
        yield array.reshape(-1).view(np.uint8).data
        end = at + array.nbytes


def _open(raw: NDArray[np.uint8]) -> tuple[Any, NDArray[np.uint8]]:
    """The header and the bytes of the arrays of a file whose digest is right."""
    if raw[:8].tobytes() != MAGIC:
        raise ProgramError("is no .lpu file")
    version, header_bytes, file_bytes = raw[8:32].view("<u8").tolist()
    if version != VERSION:
        raise ProgramError(f"has version {version}; version {VERSION} can be read")
    if file_bytes != raw.size:
        raise ProgramError(
            f"has {raw.size:,} bytes, but {file_bytes:,} were written; it is damaged"
        )
    if header_bytes > min(LONGEST_HEADER + _PROLOGUE_BYTES, raw.size - _PROLOGUE_BYTES):
        raise ProgramError(f"cannot have a header of {header_bytes:,} bytes")
    digest = hashlib.sha256(raw[:32].data)
    digest.update(raw[_PROLOGUE_BYTES:].data)
    if digest.digest() != raw[32:64].tobytes():
        raise ProgramError("is damaged: its sha256 is not the one in it")
    begin = _PROLOGUE_BYTES + header_bytes
    if begin % _PROLOGUE_BYTES:
        raise ProgramError("its header is not padded")
    try:
        header = json.loads(raw[_PROLOGUE_BYTES:begin].tobytes().decode("ascii"))
    except (ValueError, RecursionError):
        raise ProgramError("its header is no JSON") from None
    return header, raw[begin:]
