"""In: a Program and a Chip. Out: Step, the plain reference simulator: every cycle, in order.

A cycle is read, execute, commit. There is no scheduler and no lookahead here, and nothing of check
or cost: what a Program does on a Chip is what this file and its neighbours say.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray

from openlpu import program as programs
from openlpu.chip import Chip
from openlpu.errors import RequestError
from openlpu.program import Base, Params, Port, Program
from openlpu.sim import loading, ports, units
from openlpu.sim.decode import Instruction, decode_section
from openlpu.sim.machine import Machine
from openlpu.sim.result import Result, Where

Due = list[tuple[Instruction, int]]  # what issues in one cycle: an instruction, which repetition

# A MEM queue issues one of these beside one that reads memory.
_SECOND = ("write", "scatter", "setbase")


class Step:
    """A chip with a program. Memory lives from step to step; each step walks the whole plan."""

    def __init__(self, program: Program, chip: Chip) -> None:
        self.program, self.chip = program, chip
        self.memory = loading.load(program, chip)
        sections = program.sections
        self._due = [self._by_cycle(decode_section(program, chip, section)) for section in sections]
        self._counters: Counter[str] = Counter()

    @staticmethod
    def _by_cycle(instructions: list[Instruction]) -> dict[int, Due]:
        """What issues in each cycle, queue by queue."""
        due: dict[int, Due] = defaultdict(list)
        for instruction in instructions:
            issue = instruction.issue
            for repetition in range(issue.count):
                due[issue.cycle + repetition * issue.period].append((instruction, repetition))
        return due

    # -- the host's side

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

    # -- a step

    def run(self, params: Params) -> Result:
        """One step. Raises MachineError where the program is not legal."""
        programs.check_params(self.program, params)
        self._counters = Counter(cycles=0, hops=0)
        for run, around in programs.runs(self.program, params):
            bases = {}
            for base in run.bases:
                bases[base.slice, base.reg] = self._base(run.section, base, around)
            self.run_section(run.section, bases)
        return Result(self._counters["cycles"], dict(self._counters))

    def _base(self, section: int, base: Base, around: dict[str, int]) -> int:
        value = programs.base_value(base, around)
        if value < -1:
            where = Where(self.program.sections[section].name)
            what = f"base register {base.reg} of slice {base.slice} is loaded with {value}"
            raise where.fault(self.chip, what)
        return value

    def run_section(self, index: int, bases: dict[tuple[int, int], int]) -> None:
        """One section, with base registers (slice, number) loaded. Raises MachineError."""
        section, due = self.program.sections[index], self._due[index]
        machine = Machine(self.chip, self.memory, self.program.maps, section, bases)
        under_way: Counter[int] = Counter()
        for cycle in range(section.cycles):
            machine.arrive()
            now = due.get(cycle, [])
            self._issue(machine, now, under_way)
            for instruction, repetition in now:
                units.execute(machine, instruction, repetition)
                self._counters[f"issue.{instruction.kind.name}"] += 1
            machine.move()
        machine.end()
        self._counters["cycles"] += section.cycles
        self._counters["hops"] += machine.hops

    def _issue(self, machine: Machine, now: Due, under_way: Counter[int]) -> None:
        """Whether the queues can issue all this at once. under_way: repeats, per queue."""
        issued: set[tuple[int, bool]] = set()
        banks: dict[int, int] = {}
        for instruction, repetition in now:
            issue, name = instruction.issue, instruction.kind.name
            if (issue.queue, name in _SECOND) in issued:
                raise machine.fault(instruction, "the queue issues another in this cycle")
            issued.add((issue.queue, name in _SECOND))
            if "word" in instruction.fields:
                bank = instruction.stepped(repetition) // self.chip.words_per_bank
                if banks.get(issue.queue) == bank:
                    raise machine.fault(instruction, "a read and a write meet in a bank")
                banks[issue.queue] = bank
            if issue.count > 1 and repetition == 0:
                under_way[issue.queue] += 1
                if under_way[issue.queue] > self.chip.repeats:
                    raise machine.fault(instruction, f"more than {self.chip.repeats} repeats")
        for instruction, repetition in now:
            if instruction.issue.count > 1 and repetition == instruction.issue.count - 1:
                under_way[instruction.issue.queue] -= 1
