"""In: a Program and its chip. Out: its assembly text, from which `parse` makes the same Program.

    program tiny
    meta {"vocab": 96}
    param context values=2 range=0..7
    map 0..15 -1*16                                     ; a..b counts up, v*n repeats
    table rope float32[64,2] sha256 0c3f...
    segment mem.e3 word=12 words=4 weights hex 00ff...
    used state mem.w0 word=100 words=30
    port in x rows=4
    vector mem.e0,mem.e1 word=4 step=1 features 0..31   ; of each lane: which element of the row
    section layer cycles=1200
    tags "" l0.qkv                                      ; of the issues, by number
    @120 x16/1 mem.e3 read word=12 step=1 base=2 dst=e5 tag=1 ; l0.qkv
    plan
    loop l count=30
      loop c count=context by=l                         ; a parameter's value number l
        run layer mem.e3.r2=10+4*l
      end
    end

Issues stand with their cycle, repetitions (x count / period) and queue; `operands` says what
follows. A `;` begins a comment. Names are words or JSON strings. Contents of memory and tables
stand in the text if they are small, else by their sha256; `parse` is then given them beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from openlpu.asm import binary
from openlpu.asm.header import DEEPEST_PLAN, TYPES, Array
from openlpu.asm.operands import Names
from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.program import Base, Loop, Port, Program, Run, Section

INLINE_BYTES = 256
LONGEST_TEXT = 1 << 28  # characters
BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,199}")
_RUN_LENGTH = 3  # shorter runs of numbers are written out

# -- writing ----------------------------------------------------------------------------------


def contents(program: Program) -> dict[str, NDArray[np.uint8]]:
    """The bytes of every segment and table, by their sha256: what `parse.loads` may need."""
    arrays = [segment.data for segment in program.image] + list(program.tables.values())
    found = [_raw(array) for array in arrays]
    return {hashlib.sha256(raw.data).hexdigest(): raw for raw in found}


def dumps(program: Program, chip: Chip, *, inline_bytes: int = INLINE_BYTES) -> str:
    """The program as text. Contents of at most inline_bytes stand in it. Raises ProgramError if
    the program is for another chip or cannot be written."""
    if program.chip != chip.name:
        raise ProgramError(f"the program is for {program.chip!r}, not for {chip.name!r}")
    return "\n".join(_lines(program, Names(chip), inline_bytes)) + "\n"


def _lines(program: Program, names: Names, inline_bytes: int) -> Iterator[str]:
    yield f"program {name_text(program.chip)}"
    plain = program.meta.isprintable() and program.meta.strip() == program.meta
    as_is = plain and program.meta and not program.meta.startswith('"')
    yield f"meta {program.meta if as_is else json.dumps(program.meta)}"
    for p in program.params:
        yield f"param {name_text(p.name)} values={p.values} range={p.lowest}..{p.highest}"
    _demand_lanes(program.maps, "int16", names, "the maps")
    for row in program.maps.tolist():
        yield f"map {_numbers_text(row)}"
    for name in sorted(program.tables):
        array = program.tables[name]
        if array.dtype.name not in TYPES:
            raise ProgramError(f"table {name!r} of {array.dtype.name} cannot be written")
        shape = ",".join(map(str, array.shape))
        data = _data(array, inline_bytes)
        yield f"table {name_text(name)} {array.dtype.name}[{shape}] {data}"
    for segment in program.image:
        _demand_lanes(segment.data, "uint8", names, "a segment")
        where = f"{names.slice(segment.slice)} word={segment.word} words={len(segment.data)}"
        yield f"segment {where} {name_text(segment.what)} {_data(segment.data, inline_bytes)}"
    for what, part, word, words in program.used:
        yield f"used {name_text(what)} {names.slice(part)} word={word} words={words}"
    for port in program.ports:
        yield from _port_lines(port, names)
    for section in program.sections:
        yield from section_lines(section, names)
    if program.plan:
        yield "plan"
        yield from _plan_lines(program, program.plan, names, DEEPEST_PLAN)


def section_lines(section: Section, names: Names, queue: str = "") -> Iterator[str]:
    """The lines of one section, or of one of its queues."""
    binary.check_form(section)
    yield f"section {name_text(section.name)} cycles={section.cycles}"
    if section.tags != ("",):
        yield "tags" + "".join(f" {name_text(tag)}" for tag in section.tags)
    wanted = names.queue_number(queue) if queue else None
    for issue in section.issues:
        if wanted is not None and issue.queue != wanted:
            continue
        repeats = f" x{issue.count}/{issue.period}" if issue.count > 1 else ""
        line = f"@{issue.cycle}{repeats} {names.queue(issue.queue)} {issue.op}"
        line = f"{line} {names.operands(issue.op, issue.args)}".rstrip()
        tag = f" tag={issue.tag} ; {name_text(section.tags[issue.tag])}" if issue.tag else ""
        yield line + tag


def _port_lines(port: Port, names: Names) -> Iterator[str]:
    _demand_lanes(port.features, "int32", names, f"port {port.name!r}")
    if len(port.vectors) != len(port.features) or port.direction not in ("in", "out"):
        raise ProgramError(f"port {port.name!r} has a wrong direction or number of vectors")
    yield f"port {port.direction} {name_text(port.name)} rows={port.rows}"
    for vector, features in zip(port.vectors, port.features.tolist(), strict=True):
        slices = ",".join(names.slice(part) for part in vector.slices)
        where = f"word={vector.word} step={vector.row_step}"
        yield f"vector {slices} {where} features {_numbers_text(features)}"


def _plan_lines(
    program: Program, body: tuple[Run | Loop, ...], names: Names, depth: int
) -> Iterator[str]:
    indent = "  " * (DEEPEST_PLAN - depth)
    for item in body:
        if isinstance(item, Run):
            if not 0 <= item.section < len(program.sections):
                raise ProgramError(f"the plan runs section {item.section}, which is not there")
            line = f"{indent}run {section_name(program.sections, item.section)}"
            yield line + "".join(f" {_base_text(base, names)}" for base in item.bases)
            continue
        if depth == 0:
            raise ProgramError(f"the plan has loops deeper than {DEEPEST_PLAN}")
        count = item.count if isinstance(item.count, int) else name_text(item.count)
        by = f" by={name_text(item.by)}" if item.by else ""
        yield f"{indent}loop {name_text(item.var)} count={count}{by}"
        yield from _plan_lines(program, item.body, names, depth - 1)
        yield f"{indent}end"


def section_name(sections: tuple[Section, ...], index: int) -> str:
    """A section as the plan's text names it: by its number, if its name is not its own."""
    name = sections[index].name
    alone = sum(section.name == name for section in sections) == 1
    return name_text(name) if alone else str(index)


def _base_text(base: Base, names: Names) -> str:
    text = f"{names.slice(base.slice)}.r{base.reg}={base.value}"
    return text + "".join(f"{stride:+d}*{name_text(var)}" for var, stride in base.strides)


def name_text(name: str) -> str:
    """A name as one word, or as a JSON string."""
    return name if BARE.fullmatch(name) else json.dumps(name)


def _numbers_text(row: list[int]) -> str:
    """Whole numbers; runs that count up or stay the same are shortened."""
    words, at = [], 0
    while at < len(row):
        same = up = at + 1
        while same < len(row) and row[same] == row[at]:
            same += 1
        while up < len(row) and row[up] == row[at] + up - at:
            up += 1
        if same - at >= _RUN_LENGTH:
            words.append(f"{row[at]}*{same - at}")
            at = same
        elif up - at >= _RUN_LENGTH:
            words.append(f"{row[at]}..{row[up - 1]}")
            at = up
        else:
            words.append(str(row[at]))
            at += 1
    return " ".join(words)


def _demand_lanes(array: Array, kind: str, names: Names, what: str) -> None:
    if array.ndim != 2 or array.shape[1] != names.chip.lanes or array.dtype.name != kind:
        shape = f"{array.dtype.name} {list(array.shape)}"
        raise ProgramError(f"{what}: {shape} is not {kind} of {names.chip.lanes} lanes")


def _raw(array: Array) -> NDArray[np.uint8]:
    kind = TYPES.get(array.dtype.name)
    if kind is None:
        raise ProgramError(f"an array of {array.dtype.name} cannot be written")
    return np.ascontiguousarray(array, kind).reshape(-1).view(np.uint8)


def _data(array: Array, inline_bytes: int) -> str:
    raw = _raw(array)
    if raw.size <= inline_bytes:
        return f"hex {raw.tobytes().hex()}".rstrip()
    return f"sha256 {hashlib.sha256(raw.data).hexdigest()}"
