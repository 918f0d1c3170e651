"""In: a Section and a Chip. Out: Issued, every instruction it issues, repetitions counted out.

Plus Wires, which finds the value that each read of a stream meets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openlpu import isa
from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.program import Issue, Section

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Issued:
    """What a section issues of one op, in no order: cycle, unit index and position [n], args
    [n, fields], the stepped field moved."""

    op: str
    cycle: I64
    index: I64
    position: I64
    args: I64

    def arg(self, name: str) -> I64:
        """One field of all."""
        return self.args[:, isa.KINDS[self.op].index(name)]

    def __len__(self) -> int:
        return len(self.cycle)


def expand(section: Section, chip: Chip) -> dict[str, Issued]:
    """All that a legal section issues, by op."""
    places = [isa.place(chip, queue) for queue in range(isa.units(chip).count)]
    index = np.array([place.index for place in places], np.int64)
    position = np.array([place.position for place in places], np.int64)
    by_op: dict[str, list[Issue]] = {}
    for issue in section.issues:
        by_op.setdefault(issue.op, []).append(issue)
    found = {}
    for op, issues in by_op.items():
        head = np.array([(i.cycle, i.queue, i.count, i.period) for i in issues], np.int64)
        args = np.array([i.args for i in issues], np.int64).reshape(len(issues), -1)
        which, repetition = counted_out(head[:, 2])
        args, queue = args[which], head[which, 1]
        kind = isa.KINDS[op]
        if kind.stepped >= 0:
            args[:, kind.stepped] += repetition * args[:, kind.index("step")]
        cycle = head[which, 0] + repetition * head[which, 3]
        found[op] = Issued(op, cycle, index[queue], position[queue], args)
    return found


def counted_out(counts: I64) -> tuple[I64, I64]:
    """For counts [3, 2]: which [0, 0, 0, 1, 1] and number within [0, 1, 2, 0, 1]."""
    which = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - first[which]


@dataclass(slots=True)
class Wires:
    """The stream registers of a section: what is put on them, what is read from them.

    Along a stream a value keeps its diagonal: cycle minus position eastwards, plus westwards.
    """

    chip: Chip
    puts: list[tuple[I64, I64, I64, I64]] = field(default_factory=list)
    gets: list[tuple[I64, I64, I64, I64]] = field(default_factory=list)
    hops: int = 0
    _values: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    def put(self, stream: I64, position: I64, cycle: I64, value: I64) -> None:
        """Values onto streams; arrays of one length."""
        self.puts.append((stream, position, cycle, value))

    def get(self, stream: I64, position: I64, cycle: I64, take: I64) -> slice:
        """Reads of streams. What `found` is to be asked for after `resolve`."""
        first = sum(len(get[0]) for get in self.gets)
        self.gets.append((stream, position, cycle, take))
        return slice(first, first + len(stream))

    def resolve(self) -> None:
        """Join reads and puts, and count the hops. Raises MachineError for a read of nothing."""
        stream, position, cycle, value = _joined(self.puts)
        read_stream, read_position, read_cycle, take = _joined(self.gets)
        if not len(stream):
            stream, position, cycle, value = (np.full(1, -1, np.int64) for _ in range(4))
        ways, way = np.unique(self._way(stream, position, cycle), return_inverse=True)
        read_way = self._way(read_stream, read_position, read_cycle)
        at_way = np.searchsorted(ways, read_way)
        span = int(max(cycle.max(), read_cycle.max(initial=0))) + 2
        keys = way * span + cycle
        order = np.argsort(keys)
        # The last put on the way until then; it has not been taken since, or check refuses.
        at = np.searchsorted(keys[order], at_way * span + read_cycle, "right") - 1
        source = order[at]
        missing = (at < 0) | (self._way(stream, position, cycle)[source] != read_way)
        if missing.any():
            i = int(np.argmax(missing))
            raise MachineError(
                f"cycle {read_cycle[i]}: stream {read_stream[i]} is empty at {read_position[i]}"
            )
        self._values = value[source]
        # A value moves until it is taken, or over the edge of the chip.
        last = self.chip.positions - 1
        end = np.where(stream < 0, 0, np.where(self._east(stream), last - position, position))
        taken = take != 0
        put = source[taken]
        np.minimum.at(end, put, read_cycle[taken] - cycle[put])
        self.hops = int(end.sum())

    def found(self, which: slice) -> I64:
        """The values that these reads meet."""
        return self._values[which]

    def _east(self, stream: I64) -> NDArray[np.bool_]:
        return stream >= self.chip.streams

    def _way(self, stream: I64, position: I64, cycle: I64) -> I64:
        """A number for each stream and diagonal."""
        east = cycle - position + self.chip.positions
        diagonal: I64 = np.where(self._east(stream), east, cycle + position)
        return (stream << 40) + diagonal


def _joined(parts: list[tuple[I64, I64, I64, I64]]) -> tuple[I64, I64, I64, I64]:
    if not parts:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, nothing, nothing
    a, b, c, d = (np.concatenate(column) for column in zip(*parts, strict=True))
    return a, b, c, d
