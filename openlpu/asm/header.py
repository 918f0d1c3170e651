"""In: a Program. Out: the header and the arrays of its file; and the Program of such a pair.

The header is JSON. Whatever stands in it is compared with what may stand there: a header comes from
a stranger. `container` puts both into a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.asm import binary
from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.program import Base, Loop, Param, Port, Program, Run, Section, Segment, Vector

LONGEST_HEADER = 16 << 20
DEEPEST_PLAN = 16  # loops inside each other
MOST = (1 << 31) - 1  # of any number in a header
TYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}

_ALIGNMENT_BYTES = 64
_KEYS = "chip isa sections plan params maps image ports used meta tables"

Array = NDArray[np.generic]
View = Callable[[int, str, tuple[int, ...]], Array]


def aligned(at: int) -> int:
    """The next place where an array may begin."""
    return -(-at // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def possible(shape: Sequence[int]) -> bool:
    """Whether an array may have this shape: without its zeros it must be one that numpy counts."""
    return len(shape) <= 8 and min(shape, default=0) >= 0 and math.prod(filter(None, shape)) < MOST


# -- writing ----------------------------------------------------------------------------------


class Arrays:
    """Arrays in the order of the file."""

    def __init__(self) -> None:
        self.placed: list[tuple[int, Array]] = []
        self.end = 0

    def add(self, array: Array, what: str, dims: int | None = None) -> dict[str, Any]:
        """Place an array; returns what the header says of it."""
        kind = array.dtype.name
        if kind not in TYPES or dims not in (None, array.ndim):
            raise ProgramError(f"{what}: an array of {kind} {list(array.shape)} cannot be written")
        array = np.ascontiguousarray(array, TYPES[kind]).reshape(array.shape)
        at = aligned(self.end)
        self.placed.append((at, array))
        self.end = at + array.nbytes
        return {"at": at, "type": kind, "shape": list(array.shape)}


def take_apart(program: Program) -> tuple[bytes, Arrays]:
    """The header and the arrays. The header is read back: what is written can be loaded."""
    arrays = Arrays()
    header = {
        "chip": program.chip,
        "isa": binary.FINGERPRINT,
        "sections": [_section(section, arrays) for section in program.sections],
        "plan": [_item(item, DEEPEST_PLAN) for item in program.plan],
        "params": [[p.name, p.values, p.lowest, p.highest] for p in program.params],
        "maps": arrays.add(program.maps, "the maps", 2),
        "image": [
            {
                "slice": segment.slice,
                "word": segment.word,
                "what": segment.what,
                "data": arrays.add(segment.data, "a segment", 2),
            }
            for segment in program.image
        ],
        "ports": [_port(port, arrays) for port in program.ports],
        "used": [list(entry) for entry in program.used],
        "meta": program.meta,
        "tables": {
            name: arrays.add(program.tables[name], f"table {name!r}")
            for name in sorted(program.tables)
        },
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), default=_number).encode()
    if len(text) > LONGEST_HEADER:
        raise ProgramError(f"the header has {len(text):,} bytes, more than {LONGEST_HEADER:,}")
    placed = dict(arrays.placed)  # of arrays at one place all but the last are empty
    again = put_together(
        json.loads(text),
        arrays.end,
        lambda at, kind, shape: placed[at] if math.prod(shape) else np.empty(shape, TYPES[kind]),
        None,
    )
    if again.sections != program.sections or again.plan != program.plan:
        raise ProgramError("the program holds values that a file cannot give back as they are")
    return text + b" " * (aligned(len(text)) - len(text)), arrays


def _number(value: Any) -> int:
    if isinstance(value, np.integer):
        return int(value)
    raise ProgramError(f"{value!r} cannot be written into a program's file")


def _section(section: Section, arrays: Arrays) -> dict[str, Any]:
    texts = binary.encode(section)
    return {
        "name": section.name,
        "cycles": section.cycles,
        "tags": list(section.tags),
        "queues": [[queue, len(text)] for queue, text in texts.items()],
        "text": arrays.add(np.frombuffer(b"".join(texts.values()), np.uint8), section.name),
        "issue_tags": arrays.add(
            np.array([issue.tag for issue in section.issues], _tag_type(len(section.tags))),
            section.name,
        ),
    }


def _tag_type(tags: int) -> str:
    return "uint8" if tags <= 1 << 8 else "uint16" if tags <= 1 << 16 else "uint32"


def _item(item: Run | Loop, depth: int) -> dict[str, Any]:
    if isinstance(item, Run):
        bases = [[b.slice, b.reg, b.value, [list(s) for s in b.strides]] for b in item.bases]
        return {"section": item.section, "bases": bases}
    if depth == 0:
        raise ProgramError(f"the plan has loops deeper than {DEEPEST_PLAN}")
    body = [_item(inner, depth - 1) for inner in item.body]
    return {"var": item.var, "count": item.count, "by": item.by, "body": body}


def _port(port: Port, arrays: Arrays) -> dict[str, Any]:
    return {
        "name": port.name,
        "direction": port.direction,
        "rows": port.rows,
        "vectors": [[list(v.slices), v.word, v.row_step] for v in port.vectors],
        "features": arrays.add(port.features, f"port {port.name!r}", 2),
    }


# -- reading ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """Takes a header's values, in the order in which they were written."""

    data_bytes: int
    view: View
    chip: Chip | None
    end: int = 0
    issues: int = 0

    def array(
        self, entry: Any, what: str, kinds: tuple[str, ...], dims: int | None = None
    ) -> Array:
        """An array that lies where the one before ends."""
        record = _record(entry, what, "at type shape")
        kind, at = record["type"], _whole(record["at"], what, 0, self.data_bytes)
        shape = tuple(_whole(size, what, 0) for size in _list(record["shape"], what))
        if kind not in kinds or not possible(shape) or dims not in (None, len(shape)):
            raise ProgramError(f"{what}: an array of {kind!r} with {len(shape)} axes is wrong here")
        end = at + math.prod(shape) * TYPES[kind].itemsize
        if at != aligned(self.end) or end > self.data_bytes:
            raise ProgramError(f"{what}: bytes {at:,} to {end:,} are not its place")
        self.end = end
        return self.view(at, kind, shape)

    def section(self, entry: Any) -> Section:
        record = _record(entry, "a section", "name cycles tags queues text issue_tags")
        name = _text(record["name"], "a section's name")
        cycles = _whole(record["cycles"], f"section {name!r}: cycles", 0, binary.MOST_CYCLES)
        tags = tuple(_text(tag, "a tag") for tag in _list(record["tags"], "tags"))
        what = f"the text of section {name!r}"
        text = self.array(record["text"], what, ("uint8",), 1).tobytes()
        issue_tags = self.array(record["issue_tags"], what, (_tag_type(len(tags)),), 1)
        self.issues += issue_tags.size
        if self.issues > binary.MOST_ISSUES:
            raise ProgramError(f"the program has more than {binary.MOST_ISSUES:,} issues")
        texts: dict[int, bytes] = {}
        at = last = 0
        for queue, size in (_list(pair, what, 2) for pair in _list(record["queues"], what)):
            if _whole(queue, what, last) in texts:
                raise ProgramError(f"{what}: queue {queue} stands twice")
            last = queue
            texts[queue] = text[at : at + _whole(size, what, 1, len(text))]
            at += size
        if at != len(text):
            raise ProgramError(f"{what} has {len(text):,} bytes, its queues {at:,}")
        return binary.decode(texts, name, cycles, tags, issue_tags.tolist(), self.chip)

    def segment(self, entry: Any) -> Segment:
        record = _record(entry, "a segment", "slice word what data")
        where = [_whole(record[key], f"a segment's {key}", 0) for key in ("slice", "word")]
        data: Any = self.array(record["data"], "a segment", ("uint8",), 2)
        return Segment(where[0], where[1], data, _text(record["what"], "a segment"))

    def port(self, entry: Any) -> Port:
        record = _record(entry, "a port", "name direction rows vectors features")
        name = _text(record["name"], "a port's name")
        what = f"port {name!r}"
        if record["direction"] not in ("in", "out"):
            raise ProgramError(f"{what} is neither in nor out")
        vectors = []
        for slices, word, step in (_list(v, what, 3) for v in _list(record["vectors"], what)):
            numbers = tuple(_whole(number, what, 0) for number in _list(slices, what))
            vectors.append(Vector(numbers, _whole(word, what, 0), _whole(step, what)))
        features: Any = self.array(record["features"], what, ("int32",), 2)
        rows = _whole(record["rows"], what, 0)
        return Port(name, record["direction"], rows, tuple(vectors), features)


def put_together(header: Any, data_bytes: int, view: View, chip: Chip | None) -> Program:
    """The program of a header; view gives the array at a place, of a type and shape that were
    compared with data_bytes before. Raises ProgramError."""
    record = _record(header, "the header", _KEYS)
    if record["isa"] != binary.FINGERPRINT:
        raise ProgramError("was written for another instruction set; compile it again")
    reader = _Reader(data_bytes, view, chip)
    sections = tuple(reader.section(entry) for entry in _list(record["sections"], "sections"))
    maps: Any = reader.array(record["maps"], "the maps", ("int16",), 2)
    image = tuple(reader.segment(entry) for entry in _list(record["image"], "the image"))
    ports = tuple(reader.port(entry) for entry in _list(record["ports"], "the ports"))
    tables = record["tables"]
    if not isinstance(tables, dict):
        raise ProgramError("tables is no record")
    found = {
        name: reader.array(tables[name], f"table {name!r}", tuple(TYPES)) for name in sorted(tables)
    }
    if reader.end != data_bytes:
        raise ProgramError(f"its arrays end at byte {reader.end:,} of {data_bytes:,}")
    return Program(
        _text(record["chip"], "the chip"),
        sections,
        _body(record["plan"], len(sections), DEEPEST_PLAN),
        tuple(_param(entry) for entry in _list(record["params"], "params")),
        maps,
        image,
        ports,
        tuple(_used(entry) for entry in _list(record["used"], "used")),
        _text(record["meta"], "meta", LONGEST_HEADER),
        found,
    )


def _body(entries: Any, sections: int, depth: int) -> tuple[Run | Loop, ...]:
    found: list[Run | Loop] = []
    for entry in _list(entries, "the plan"):
        if isinstance(entry, dict) and "section" in entry:
            record = _record(entry, "a run", "section bases")
            section = _whole(record["section"], "a run's section", 0, sections - 1)
            found.append(Run(section, tuple(_base(b) for b in _list(record["bases"], "bases"))))
            continue
        record = _record(entry, "a loop", "var count by body")
        if depth == 0:
            raise ProgramError(f"the plan has loops deeper than {DEEPEST_PLAN}")
        count = record["count"]
        count = count if isinstance(count, str) else _whole(count, "a loop's count", 0)
        body = _body(record["body"], sections, depth - 1)
        found.append(Loop(_text(record["var"], "a loop"), count, body, _text(record["by"], "by")))
    return tuple(found)


def _base(entry: Any) -> Base:
    part, reg, value, strides = _list(entry, "a base", 4)
    pairs = (_list(pair, "a base's stride", 2) for pair in _list(strides, "a base"))
    return Base(
        _whole(part, "a base's slice", 0),
        _whole(reg, "a base's register", 0),
        _whole(value, "a base's value"),
        tuple((_text(var, "a stride"), _whole(stride, "a stride")) for var, stride in pairs),
    )


def _param(entry: Any) -> Param:
    name, *numbers = _list(entry, "a parameter", 4)
    values, low, high = (_whole(number, f"parameter {name!r}") for number in numbers)
    return Param(_text(name, "a parameter"), _whole(values, "values", 1), low, high)


def _used(entry: Any) -> tuple[str, int, int, int]:
    what, part, word, words = _list(entry, "a used range", 4)
    numbers = [_whole(number, "a used range", 0) for number in (part, word, words)]
    return _text(what, "a used range"), numbers[0], numbers[1], numbers[2]


def _whole(value: Any, what: str, low: int = -MOST, high: int = MOST) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProgramError(f"{what} is {str(value)[:40]!r}, not a whole number {low} to {high}")
    return value


def _text(value: Any, what: str, longest: int = 1 << 16) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise ProgramError(f"{what} is no text of at most {longest:,} characters")
    return value


def _list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ProgramError(f"{what} is no list" + (f" of {length}" if length else ""))
    return value


def _record(value: Any, what: str, keys: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys.split()):
        raise ProgramError(f"{what} is no record of {keys}")
    return value
