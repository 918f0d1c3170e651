"""In: a Program and a Chip. Out: Fast, the same machine as Step, bit for bit, without the waiting.

Nothing waits on this chip, so all that moves between units can be found out before anything runs:
each section becomes, once, a table of events in order, with every operand's place in it. Generated
code walks the tables; cycles and counters of a section are known beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu import jit
from openlpu import program as programs
from openlpu.check import check
from openlpu.chip import Chip
from openlpu.errors import MachineError, RequestError
from openlpu.program import Base, Params, Port, Program, Run
from openlpu.sim import loading, ports
from openlpu.sim.bases import Extremes, Loads, extremes, loads
from openlpu.sim.native import native
from openlpu.sim.records import CHUNK, SUPERLANE, Context, Shape, shape
from openlpu.sim.resolve import Resolver
from openlpu.sim.result import Result
from openlpu.sim.table import Table, assemble

I64 = NDArray[np.int64]
_ALIGNMENT = 64


class _Section:
    """One section, ready to run."""

    def __init__(
        self,
        chip: Chip,
        how: Shape,
        section: programs.Section,
        maps: NDArray[np.int16],
        planned: Extremes,
        constants: dict[int, int],
    ) -> None:
        resolver = Resolver(chip, how, section, maps, constants)
        made = resolver.resolve()
        bases = resolver.bases
        self.name = section.name
        self.registers = bases.registers()
        self.low, self.high = bases.ranges(planned)
        self.table: Table = assemble(chip, how, made, resolver.planes, (self.low, self.high))
        self.first_loaded = len(self.low) - len(self.registers)
        self.counters: Counter[str] = Counter(cycles=section.cycles, hops=made.hops)
        for op, issued in resolver.issued.items():
            self.counters[f"issue.{op}"] = len(issued)
        self.base_values = np.zeros(len(self.low), np.int32)
        self.pointers = np.zeros(1 + self.table.pointers + self.table.vectors, np.int64)
        self.context = np.zeros(Context.SIZE, np.int64)

    def load(self, values: I64) -> None:
        """Fill the registers. Raises MachineError for a value that the section is not made for."""
        first = self.first_loaded
        wrong = (values < self.low[first:]) | (values > self.high[first:])
        if wrong.any():
            i = int(np.argmax(wrong))
            slice_index, reg = self.registers[i]
            raise MachineError(
                f"section {self.name!r}: base register {reg} of slice {slice_index} cannot be "
                f"{values[i]}; the plan loads {self.low[first + i]} to {self.high[first + i]}"
            )
        self.base_values[first:] = values


class Fast:
    """A chip with a program. Memory lives from step to step; each step walks the whole plan."""

    def __init__(self, program: Program, chip: Chip, *, target: jit.Target | None = None) -> None:
        """Raises ProgramError where the program is not legal, ChipError where the chip has a shape
        for which there is no code. target: the kernel set, the best one if None."""
        self.program, self.chip = program, chip
        how = shape(chip)
        check(program, chip)
        self._native = native(how, target or jit.select())
        self._room, self.memory = _with_room(loading.load(program, chip))
        constants: dict[int, int] = {}
        planned = extremes(program)
        # Only what the plan runs has been checked.
        self._sections = {
            index: _Section(
                chip, how, program.sections[index], program.maps, planned[index], constants
            )
            for index in sorted(planned)
        }
        self._link(how, constants)
        self._loads: dict[int, Loads] = {}  # by the identity of a run of the plan

    def _link(self, how: Shape, constants: Mapping[int, int]) -> None:
        """Give the sections the arrays that they work in; all share them."""
        chip, tables = self.chip, [section.table for section in self._sections.values()]
        vectors = max((table.vectors for table in tables), default=0)
        words = max((table.words for table in tables), default=0)
        blocks = max((table.blocks for table in tables), default=1)
        slots = chip.planes * chip.accumulators
        splats = np.repeat(np.array(list(constants), np.int64).astype(np.int32), CHUNK // 4)
        self._arrays: dict[Context, NDArray[Any]] = {
            Context.WORDS: _zeros(words * how.word_bytes),
            Context.CONSTANTS: splats,
            Context.BLOCKS: _zeros(blocks * how.block_bytes),
            Context.ACCUMULATORS: _zeros(slots * how.word_bytes),
            Context.MEMORY: self.memory,
            Context.SHUFFLES: _shuffles(self.program, how),
            Context.PERMUTES: np.ascontiguousarray(self.program.maps),
            Context.WINDOW: _zeros(3 * how.padded),
        }
        self._vectors = _zeros((1 + vectors) * how.padded)  # the first stays zero
        zeros = self._vectors.ctypes.data
        for section in self._sections.values():
            first = 1 + section.table.pointers
            section.pointers[0] = zeros
            made = np.arange(1, 1 + section.table.vectors) * how.padded
            section.pointers[first:] = zeros + made
            for which, array in self._arrays.items():
                section.context[which] = array.ctypes.data
            section.context[Context.POINTERS] = section.pointers.ctypes.data
            section.context[Context.BASES] = section.base_values.ctypes.data
            section.context[Context.TILES] = section.table.tiles.ctypes.data

    # -- the host's side ----------------------------------------------------------------------

    def write(self, port: str, data: NDArray[np.uint8]) -> None:
        """Give an input port its data [rows, vectors, bytes, lanes]. Raises RequestError."""
        ports.write(self.memory, self._port(port, ("in",)), data)

    def read(self, port: str) -> NDArray[np.uint8]:
        """The data of a port [rows, vectors, bytes, lanes]. Raises RequestError."""
        return ports.read(self.memory, self._port(port, ("in", "out")))

    def _port(self, name: str, directions: tuple[str, ...]) -> Port:
        known = [port for port in self.program.ports if port.direction in directions]
        for port in known:
            if port.name == name:
                return port
        names = ", ".join(port.name for port in known)
        raise RequestError(f"no port {name!r} of direction {'/'.join(directions)}; known: {names}")

    # -- a step -------------------------------------------------------------------------------

    def run(self, params: Params) -> Result:
        """One step."""
        programs.check_params(self.program, params)
        times: Counter[int] = Counter()
        for run, around in programs.runs(self.program, params):
            times[run.section] += 1
            self._run(run.section, self._loads_of(run).at(around))
        counters: Counter[str] = Counter(cycles=0, hops=0)
        for index, count in times.items():
            for name, value in self._sections[index].counters.items():
                counters[name] += count * value
        return Result(counters["cycles"], dict(counters))

    def run_section(self, index: int, bases: dict[tuple[int, int], int]) -> None:
        """One section that the plan runs, with base registers (slice, number) loaded with what it
        may load. Raises MachineError."""
        if index not in self._sections:
            raise MachineError(f"the plan never runs section {index}")
        given = [Base(slice_index, reg, value) for (slice_index, reg), value in bases.items()]
        self._run(index, loads(given, self._sections[index].registers).at({}))

    def _loads_of(self, run: Run) -> Loads:
        found = self._loads.get(id(run))
        if found is None:
            found = loads(run.bases, self._sections[run.section].registers)
            self._loads[id(run)] = found
        return found

    def _run(self, index: int, values: I64) -> None:
        section = self._sections[index]
        section.load(values)
        self._native.walk(section.table.code, section.context)


def _zeros(size_bytes: int) -> NDArray[np.uint8]:
    """Aligned to a line of the cache, with a chunk to spare."""
    raw = np.zeros(size_bytes + CHUNK + _ALIGNMENT, np.uint8)
    return raw[-raw.ctypes.data % _ALIGNMENT :]


def _with_room(memory: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Memory, where whole chunks can be read from the start of every word."""
    if memory.shape[2] % CHUNK == 0 and memory.ctypes.data % _ALIGNMENT == 0:
        return memory, memory
    room = _zeros(memory.size)
    inside = room[: memory.size].reshape(memory.shape)
    inside[:] = memory
    return room, inside


def _shuffles(program: Program, how: Shape) -> NDArray[np.uint8]:
    """Tables for lanes inside superlanes: the rotations, then the maps; 128 gives zero."""
    lane = np.arange(how.lanes)
    rotations = (lane + np.arange(SUPERLANE)[:, None]) % SUPERLANE
    maps = program.maps.astype(np.int64)
    tables = np.zeros((SUPERLANE + len(maps), how.padded), np.uint8)
    tables[:SUPERLANE, : how.lanes] = rotations
    tables[SUPERLANE:, : how.lanes] = np.where(maps < 0, 128, maps % SUPERLANE)
    return tables
