"""In: a Section and a Chip. Out: Made: what happens in the section, as events and values.

Every operand is joined with the event that makes it, here and once, so that nothing is left of
streams, histories and buffers when the section runs: each value is made once and named by number.
Only memory, accumulators and the bases that a run loads are state. The section must be legal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu import isa
from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.program import Section
from openlpu.sim.bases import Bases
from openlpu.sim.events import I64, Issued, Wires, counted_out, expand
from openlpu.sim.records import ALU_CODES, SUPERLANE, Code, Shape
from openlpu.sim.tiles import Planes
from openlpu.sim.values import FIRST, OPERANDS, READS, WORK, Made


class Resolver:
    """Takes a section apart. A method for each unit: it puts and reads what it does on the streams,
    waits until all reads are joined, and then emits its events."""

    def __init__(
        self,
        chip: Chip,
        shape: Shape,
        section: Section,
        maps: NDArray[np.int16],
        constants: dict[int, int],
    ) -> None:
        """maps: the program's. constants: value -> number; it grows, for all sections."""
        self.chip, self.shape, self.constants = chip, shape, constants
        # Of each map, whether every superlane comes from neighbouring lanes, or from none.
        superlanes = maps.astype(np.int64).reshape(len(maps), chip.superlanes, SUPERLANE)
        first = superlanes[:, :, :1]
        inside = np.where(first < 0, 0, np.arange(SUPERLANE))
        self.whole = (superlanes == first + inside).all(axis=(1, 2))
        self.issued = expand(section, chip)
        self.bases = Bases(chip, self.issued)
        self.wires = Wires(chip)
        self.made = Made()
        self.planes = Planes(chip, self.made)

    def resolve(self) -> Made:
        waiting = [unit for op, issued in self.issued.items() for unit in self._unit(op, issued)]
        waiting.append(self._vxm())
        for unit in waiting:
            next(unit, None)
        self.wires.resolve()
        for unit in waiting:
            next(unit, None)
        self.planes.finish()
        self.made.hops = self.wires.hops
        return self.made

    def _unit(self, op: str, issued: Issued) -> Iterator[Iterator[None]]:
        if op in isa.ALU:
            return
        name = "sxm" if op in ("shift", "permute", "distribute", "rotate") else op
        if op == "install":
            self.planes.install(issued)
        else:
            yield getattr(self, f"_{name}")(issued)

    # -- streams ------------------------------------------------------------------------------

    def _read_streams(self, e: Issued, first: I64, width: int, take: I64 | int) -> Reads:
        stream = (first[:, None] + np.arange(width)).ravel()
        position, cycle = np.repeat(e.position, width), np.repeat(e.cycle, width)
        taken = np.repeat(np.broadcast_to(np.asarray(take, np.int64), len(first)), width)
        return Reads(self.wires, self.wires.get(stream, position, cycle, taken), width)

    def _put(self, e: Issued, first: I64, values: I64) -> None:
        """Values [n] or [n, width] onto neighbouring streams, a latency after the issue."""
        values = values.reshape(len(first), -1)
        width = values.shape[1]
        stream = (first[:, None] + np.arange(width)).ravel()
        ready = e.cycle + isa.latency(self.chip, isa.KINDS[e.op])
        self.wires.put(
            stream, np.repeat(e.position, width), np.repeat(ready, width), values.ravel()
        )

    # -- MEM ----------------------------------------------------------------------------------

    def _read(self, e: Issued) -> Iterator[None]:
        values = self.made.new_bytes(len(e))
        self._put(e, e.arg("dst"), values)
        yield
        row, base = self.bases.of(e)
        self.made.emit(Code.READ, READS, e.cycle, values, row, base)

    def _write(self, e: Issued) -> Iterator[None]:
        source = self._read_streams(e, e.arg("src"), 1, e.arg("take"))
        yield
        row, base = self.bases.of(e)
        seen = e.cycle + self.chip.latency.mem_write
        self.made.emit(Code.WRITE, FIRST, seen, source.found(), row, base)

    def _gather(self, e: Issued) -> Iterator[None]:
        values = self.made.new_bytes(len(e))
        self._put(e, e.arg("dst"), values)
        lanes = self._read_streams(e, e.arg("map"), 2, e.arg("take"))
        yield
        row, base = self.bases.of(e)
        limit = e.arg("limit")
        self.made.emit(Code.GATHER, READS, e.cycle, values, lanes.found(), row, base, limit)

    def _scatter(self, e: Issued) -> Iterator[None]:
        source = self._read_streams(e, e.arg("src"), 1, e.arg("take"))
        lanes = self._read_streams(e, e.arg("map"), 2, e.arg("take"))
        yield
        row, base = self.bases.of(e)
        seen = e.cycle + self.chip.latency.mem_write
        fields = (source.found(), lanes.found(), row, base, e.arg("limit"))
        self.made.emit(Code.SCATTER, FIRST, seen, *fields)

    def _setbase(self, e: Issued) -> Iterator[None]:
        source = self._read_streams(e, e.arg("src"), 1, e.arg("take"))
        yield
        fields = (self.bases.set_slots, source.found(), e.arg("lane"), e.arg("limit"))
        self.made.emit(Code.SETBASE, WORK, e.cycle, *fields)

    # -- MXM ----------------------------------------------------------------------------------

    def _load(self, e: Issued) -> Iterator[None]:
        sources = self._read_streams(e, e.arg("src"), self.shape.loads, 1)
        yield
        self.planes.load(e, sources.found())

    def _act(self, e: Issued) -> Iterator[None]:
        source = self._read_streams(e, e.arg("src"), 1, e.arg("take"))
        yield
        self.planes.act(e, source.found()[:, 0])

    def _out(self, e: Issued) -> Iterator[None]:
        words, first = self.made.new_words(e.cycle, split=True)
        self._put(e, e.arg("dst"), first[:, None] + np.arange(4))
        yield
        accumulator = e.index * self.chip.accumulators + e.arg("slot")
        self.made.emit(Code.OUT, WORK, e.cycle, words, accumulator)

    # -- SXM ----------------------------------------------------------------------------------

    def _sxm(self, e: Issued) -> Iterator[None]:
        """Each of the streams of a wide one is an event of its own."""
        which, number = counted_out(np.where(e.arg("wide") != 0, 4, 1))
        e = Issued(e.op, e.cycle[which], e.index[which], e.position[which], e.args[which])
        source = self._read_streams(e, e.arg("src") + number, 1, e.arg("take"))
        values = self.made.new_bytes(len(e))
        self._put(e, e.arg("dst") + number, values)
        yield
        if e.op == "shift":
            how = np.clip(e.arg("amount"), -self.shape.lanes, self.shape.lanes)
            self.made.emit(Code.SHIFT, WORK, e.cycle, values, source.found(), how)
        elif e.op == "permute":
            how = e.arg("map")
            for code, these in ((Code.MOVE, self.whole[how]), (Code.PERMUTE, ~self.whole[how])):
                fields = (values[these], source.found()[these], how[these])
                self.made.emit(code, WORK, e.cycle[these], *fields)
        else:
            turned = e.op == "rotate"
            how = e.arg("amount") % SUPERLANE if turned else SUPERLANE + e.arg("map")
            self.made.emit(Code.SHUFFLE, WORK, e.cycle, values, source.found(), how)

    def _transpose(self, e: Issued) -> Iterator[None]:
        sources = self._read_streams(e, e.arg("src"), SUPERLANE, 1)
        values = self.made.new_bytes(SUPERLANE * len(e)).reshape(-1, SUPERLANE)
        self._put(e, e.arg("dst"), values)
        yield
        self.made.emit(Code.TRANSPOSE, WORK, e.cycle, values, sources.found())

    # -- VXM ----------------------------------------------------------------------------------

    def _vxm(self) -> Iterator[None]:
        """All operations together: an ALU's result may be another's operand, by its history."""
        parts = [e for op, e in self.issued.items() if op in isa.ALU]
        if not parts:
            return
        columns = zip(*((e.cycle, e.index, e.position, e.args) for e in parts), strict=True)
        e = Issued("mov", *(np.concatenate(column) for column in columns))
        code = np.concatenate([np.full(len(p), ALU_CODES[p.op]) for p in parts])
        latency = [isa.latency(self.chip, isa.KINDS[p.op]) for p in parts]
        ready = e.cycle + np.repeat(latency, [len(p) for p in parts])
        words, first = self.made.new_words(e.cycle, split=True)
        self._results(e, ready, first)
        wanted = [w for letter in "abc" for w in self._operands(e, letter)]
        yield
        operands = np.full((len(e), 3), -1, np.int64)
        for number, letter in enumerate("abc"):
            source = e.arg(f"{letter}_from")
            tap, constant = source == isa.Source.TAP, source == isa.Source.IMM
            operands[tap, number] = self._taps(e, letter, tap, ready, words)
            operands[constant, number] = self._constants(e.arg("imm")[constant])
        self._unpack(e, wanted, operands)
        for number in np.unique(code):
            these = code == number
            fields = (words[these], operands[these])
            self.made.emit(int(number), WORK, e.cycle[these], *fields)

    def _results(self, e: Issued, ready: I64, first: I64) -> None:
        for side, origin in (("west", 0), ("east", self.chip.streams)):
            for byte in range(4):
                on = (e.arg(side) > 0) & (e.arg("width") > byte)
                stream = origin + e.arg(side)[on] - 1 + byte
                self.wires.put(stream, e.position[on], ready[on], first[on] + byte)

    def _operands(self, e: Issued, letter: str) -> Iterator[Operands]:
        source, at = e.arg(f"{letter}_from"), e.arg(f"{letter}_at")
        for kind, width in isa.SOURCE_WIDTH.items():
            which = np.flatnonzero(source == kind)
            part = Issued(e.op, e.cycle[which], e.index[which], e.position[which], e.args[which])
            reads = self._read_streams(part, at[which] // 2, width, at[which] % 2)
            yield Operands("abc".index(letter), which, reads)

    def _taps(self, e: Issued, letter: str, tap: NDArray[np.bool_], ready: I64, words: I64) -> I64:
        """The words that these operands name by ALU and age."""
        alu, delay = np.divmod(e.arg(f"{letter}_at")[tap], isa.DELAYS)
        span = int(ready.max()) + 1
        order = np.argsort(e.index * span + ready)
        keys = (e.index * span + ready)[order]
        when = e.cycle[tap] - delay
        at = np.searchsorted(keys, alu * span + when)
        missing = (when < 0) | (at >= len(keys))
        at = np.where(missing, 0, at)
        missing |= keys[at] != alu * span + when
        if missing.any():
            i = int(np.argmax(missing))
            raise MachineError(f"cycle {e.cycle[tap][i]}: alu{alu[i]} has no result {delay[i]} old")
        found: I64 = words[order[at]]
        return found

    def _constants(self, values: I64) -> I64:
        """Constants are numbered -1, -2, ... in the order of their appearance."""
        distinct, inverse = np.unique(values, return_inverse=True)
        numbers = [
            -1 - self.constants.setdefault(int(value), len(self.constants)) for value in distinct
        ]
        return np.array(numbers, np.int64)[inverse]

    def _unpack(self, e: Issued, wanted: list[Operands], operands: I64) -> None:
        """Words of streams: once for all operands that read the same values. The four bytes of a
        word that was made as one are that word."""
        owner = np.full(self.made.bytes_made, -1, np.int64)
        first = np.concatenate(self.made.word_bytes)
        owner[first[first > 0]] = np.flatnonzero(first > 0)
        for width, code in ((1, Code.UNPACK1), (2, Code.UNPACK2), (4, Code.UNPACK4)):
            reads = [want for want in wanted if want.reads.width == width]
            vectors = np.concatenate([want.reads.found() for want in reads])
            which = np.concatenate([want.which for want in reads])
            number = np.concatenate([np.full(len(want.which), want.number) for want in reads])
            whole = np.zeros(len(vectors), np.bool_)
            if width == 4:
                whole = owner[vectors[:, 0]] >= 0
                whole &= (vectors == vectors[:, :1] + np.arange(4)).all(axis=1)
                operands[which[whole], number[whole]] = owner[vectors[whole, 0]]
            rest = ~whole
            if not rest.any():
                continue
            distinct, inverse = np.unique(vectors[rest], axis=0, return_inverse=True)
            inverse = inverse.reshape(-1)
            cycle = np.full(len(distinct), np.iinfo(np.int64).max)
            np.minimum.at(cycle, inverse, e.cycle[which[rest]])
            words, _ = self.made.new_words(cycle, split=False)
            self.made.emit(code, OPERANDS, cycle, words, distinct)
            operands[which[rest], number[rest]] = words[inverse]


@dataclass(frozen=True, slots=True)
class Reads:
    """Reads of `width` neighbouring streams each."""

    wires: Wires
    which: slice
    width: int

    def found(self) -> I64:
        """The values [n, width], once the wires are resolved."""
        return self.wires.found(self.which).reshape(-1, self.width)


@dataclass(frozen=True, slots=True)
class Operands:
    """Operand `number` of the operations `which`, from streams."""

    number: int
    which: I64
    reads: Reads
