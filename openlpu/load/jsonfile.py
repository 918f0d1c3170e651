"""In: JSON bytes that a stranger wrote. Out: the object in them, bounded in size, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openlpu.errors import CheckpointError

LARGEST_BYTES = 16 << 20
"""No configuration, index or tensor table of a real model comes near this."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{path}: {reason.lower()}; is the model whole?") from None
    return parse_object(data, str(path))


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} if there is no such file."""
    return read_object(path) if path.is_file() else {}


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in JSON text. Raises CheckpointError naming `where`; keys must be unique."""
    if len(data) > LARGEST_BYTES:
        raise CheckpointError(f"{where}: JSON of more than {LARGEST_BYTES:,} bytes; it is damaged")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # bad text, bad UTF-8, repeated keys, depth
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise CheckpointError(f"{where}: not valid JSON ({reason}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds no JSON object; fetch it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may choose differently between two values of one key, so there must be one."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:60]!r} is there twice")
        found[name] = value
    return found
