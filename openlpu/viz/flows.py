"""In: a Section and a Chip. Out: Flows: every value on a stream, from where it is put to its end.

A value keeps its place in the frame that moves with its stream, so a value and whoever takes it are
neighbours once all puts and takes are sorted by (stream, frame, distance along the stream).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.isa import ALU, KINDS, SOURCE_WIDTH, Kind, Source, StreamPort, latency, place
from openlpu.program import Issue, Section
from openlpu.viz.outline import LARGEST_SECTION

I64 = NDArray[np.int64]
_SOURCES = {int(source): width for source, width in SOURCE_WIDTH.items()}
_NONE = int(Source.NONE)


@dataclass(frozen=True, slots=True, eq=False)
class Flows:
    """One entry for each value. issue: index of who put it; cycle: when it stands in its first
    register; along: how many registers lie behind that one, counted in the stream's direction;
    hops: registers it then moves through before it is taken, or vanishes at the chip's end."""

    issue: I64
    stream: I64
    cycle: I64
    along: I64
    hops: I64


def reads_of(chip: Chip, issue: Issue) -> list[tuple[int, int, bool]]:
    """(first stream, how many, taken) of every stream operand."""
    kind = KINDS[issue.op]
    if kind.unit != "vxm":
        return [
            (
                issue.args[kind.index(port.field)],
                _width(chip, kind, issue, port),
                not port.take or bool(issue.args[kind.index(port.take)]),
            )
            for port in kind.reads
        ]
    operands = [(issue.args[i], issue.args[i + 1]) for i in range(0, 6, 2)]
    return [
        (at // 2, _SOURCES[source], bool(at % 2)) for source, at in operands if source in _SOURCES
    ]


def writes_of(chip: Chip, issue: Issue) -> list[tuple[int, int]]:
    """(first stream, how many) of every result that goes onto streams."""
    kind = KINDS[issue.op]
    if kind.unit != "vxm":
        return [
            (issue.args[kind.index(port.field)], _width(chip, kind, issue, port))
            for port in kind.writes
        ]
    width, west, east = issue.args[7:10]
    found = [(west - 1, width)] if west else []
    return [*found, (chip.streams + east - 1, width)] if east else found


def flows(section: Section, chip: Chip) -> Flows:
    """All values of a section. A value that nobody takes runs to the end of the chip."""
    puts: list[tuple[int, int, int, int, int, int]] = []
    takes: list[tuple[int, int, int, int, int, int]] = []
    for index, issue in enumerate(section.issues):
        rest = (issue.count, issue.period, place(chip, issue.queue).position)
        written = writes_of(chip, issue)
        if written:
            ready = issue.cycle + latency(chip, KINDS[issue.op])
            for first, width in written:
                puts += [(index, first + i, ready, *rest) for i in range(width)]
        for first, width, taken in reads_of(chip, issue):
            if taken:
                takes += [(index, first + i, issue.cycle, *rest) for i in range(width)]
    if sum(put[3] for put in puts) + sum(take[3] for take in takes) > LARGEST_SECTION:
        raise ProgramError(f"section {section.name}: too many stream values to show")
    putter, stream, cycle, along = _expand(puts, chip)
    taker, stream_out, cycle_out, along_out = _expand(takes, chip)
    n = len(putter)
    is_take = np.repeat(np.array([0, 1]), [n, len(taker)])
    streams = np.concatenate([stream, stream_out])
    alongs = np.concatenate([along, along_out])
    frames = np.concatenate([cycle, cycle_out]) - alongs
    order = np.lexsort((is_take, alongs, frames, streams))
    here, after = order[:-1], order[1:]
    meets = (
        (streams[here] == streams[after])
        & (frames[here] == frames[after])
        & (is_take[here] == 0)
        & (is_take[after] == 1)
    )
    hops = chip.positions - 1 - along
    hops[here[meets]] = alongs[after[meets]] - alongs[here[meets]]
    return Flows(putter, stream, cycle, along, hops)


def _width(chip: Chip, kind: Kind, issue: Issue, port: StreamPort) -> int:
    if port.width > 0:
        return port.width
    if port.width < 0:
        return chip.install_streams
    return 4 if issue.args[kind.index("wide")] else 1


def _expand(
    bursts: list[tuple[int, int, int, int, int, int]], chip: Chip
) -> tuple[I64, I64, I64, I64]:
    """(issue, stream, cycle, along) of each repetition of each burst."""
    table = np.array(bursts, np.int64).reshape(-1, 6)
    issue, stream, first, count, period, position = table.T
    repeated = np.repeat(np.arange(len(table)), count)
    step = np.arange(len(repeated)) - np.repeat(np.cumsum(count) - count, count)
    east = stream[repeated] >= chip.streams
    where = position[repeated]
    along = np.where(east, where, chip.positions - 1 - where)
    cycle = first[repeated] + step * period[repeated]
    return issue[repeated], stream[repeated], cycle, along


def instruction_text(issue: Issue) -> str:
    """An instruction's fields for a reader: `word=3 step=1 dst=4`; operands of an ALU by name."""
    kind = KINDS[issue.op]
    if kind.unit != "vxm":
        pairs = zip(kind.fields, issue.args, strict=True)
        return " ".join(f"{field.name}={value}" for field, value in pairs)
    words = []
    for name, i in zip("abc", range(0, 6, 2), strict=True):
        source, at = issue.args[i : i + 2]
        if source in _SOURCES:
            taken = " taken" if at % 2 else ""
            words.append(f"{name}=s{at // 2}x{_SOURCES[source]}{taken}")
        elif source == int(Source.TAP):
            words.append(f"{name}=alu{at // 64}@{at % 64}")
        elif source != _NONE:
            words.append(f"{name}=imm")
    imm, width, west, east = issue.args[6:10]
    if any(source == int(Source.IMM) for source in issue.args[0 : 2 * ALU[issue.op].operands : 2]):
        words.append(f"imm={imm}")
    words += [f"west=s{west - 1}x{width}"] if west else []
    words += [f"east=s{east - 1}x{width}"] if east else []
    return " ".join(words)
