"""In: an Issue. Out: Instruction, its fields by name, each in range; or MachineError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from openlpu import isa
from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.program import Issue, Program, Section
from openlpu.sim.result import Where

UNLINKED = ("icu", "c2c")  # units that no queue of a Section drives
TRANSPOSED = 16  # lanes of a superlane and streams that transpose exchanges


@dataclass(frozen=True, slots=True)
class Instruction:
    """A decoded issue: what it does, where, and with which fields."""

    issue: Issue
    kind: isa.Kind
    place: isa.Place
    fields: Mapping[str, int]
    latency: int

    def stepped(self, repetition: int) -> int:
        """The field that moves with each repetition: a word, a slot or a group."""
        name = self.kind.fields[self.kind.stepped].name
        return self.fields[name] + repetition * self.fields["step"]


@dataclass(frozen=True, slots=True)
class Operand:
    """Where an ALU takes operand number `index` from; at is the field of isa.Source."""

    source: isa.Source
    at: int


def decode_section(program: Program, chip: Chip, section: Section) -> list[Instruction]:
    """All issues of a section. Raises MachineError at the first that is none."""
    where = Where(section.name)
    if not 0 <= section.cycles < 1 << 31:
        raise where.fault(chip, f"{section.cycles} cycles are no length")
    order = [(issue.queue, issue.cycle, issue.op, issue.args) for issue in section.issues]
    if order != sorted(order):
        raise where.fault(chip, "issues are not sorted by queue, cycle, op and args")
    return [_Decoder(program, chip, section, issue).instruction() for issue in section.issues]


class _Decoder:
    """Takes one issue apart."""

    def __init__(self, program: Program, chip: Chip, section: Section, issue: Issue) -> None:
        self.program, self.chip, self.section, self.issue = program, chip, section, issue

    def fault(self, what: str) -> MachineError:
        return Where(self.section.name, self.issue.cycle, self.issue).fault(self.chip, what)

    def demand(self, condition: bool, what: str) -> None:
        if not condition:
            raise self.fault(what)

    def instruction(self) -> Instruction:
        chip, issue = self.chip, self.issue
        self.demand(0 <= issue.queue < isa.units(chip).count, "there is no such queue")
        self.demand(issue.op in isa.KINDS, "there is no such instruction")
        kind, place = isa.KINDS[issue.op], isa.place(chip, issue.queue)
        self.demand(kind.unit not in UNLINKED, f"{kind.unit} never stands in a section")
        self.demand(kind.unit == place.unit, f"an instruction of {kind.unit}, not {place.unit}")
        self.demand(len(issue.args) == len(kind.fields), f"{len(kind.fields)} fields make it up")
        fields = {}
        for field, value in zip(kind.fields, issue.args, strict=True):
            low = -(1 << field.bits - 1) if field.signed else 0
            self.demand(low <= value < low + (1 << field.bits), f"{field.name} is out of range")
            fields[field.name] = value
        self.times()
        made = Instruction(issue, kind, place, fields, isa.latency(chip, kind))
        if kind.stepped >= 0:
            self.steps(made)
        for port in (*kind.reads, *kind.writes):
            self.streams(port.field, fields[port.field], port_width(chip, port, fields))
        self.rest(made)
        return made

    def times(self) -> None:
        issue = self.issue
        more, apart = (1 << field.bits for field in isa.KINDS["repeat"].fields)
        self.demand(1 <= issue.count <= more, f"count is {issue.count}")
        self.demand(1 <= issue.period < apart, f"period is {issue.period}")
        self.demand(issue.count > 1 or issue.period == 1, "a period without repetitions")
        inside = issue.cycle >= 0 and issue.last_cycle < self.section.cycles
        self.demand(inside, f"cycles {issue.cycle} to {issue.last_cycle} are not in the section")
        self.demand(0 <= issue.tag < len(self.section.tags), f"there is no tag {issue.tag}")

    def steps(self, made: Instruction) -> None:
        chip = self.chip
        name = made.kind.fields[made.kind.stepped].name
        groups = chip.lanes // chip.install_streams
        limit = {"word": chip.words, "slot": chip.accumulators, "group": groups}[name]
        for repetition in (0, self.issue.count - 1):
            value = made.stepped(repetition)
            self.demand(0 <= value < limit, f"{name} {value} is not below {limit}")

    def streams(self, name: str, first: int, width: int) -> None:
        """A group of streams: aligned, inside one direction."""
        per_direction = self.chip.streams
        self.demand(first < 2 * per_direction, f"{name}: there is no stream {first}")
        self.demand(first % width == 0, f"{name}: stream {first} is not aligned to {width}")
        inside = first % per_direction + width <= per_direction
        self.demand(inside, f"{name}: {width} streams from {first} leave their direction")

    def rest(self, made: Instruction) -> None:
        """What a few instructions ask beyond the ranges of their fields."""
        chip, fields, name = self.chip, made.fields, made.kind.name
        if "base" in fields:
            self.demand(fields["base"] < chip.base_registers, "there is no such base register")
        if "limit" in fields:
            self.demand(fields["limit"] < 1 << 15, "limit is above 32767")
        if name == "setbase":
            self.demand(1 <= fields["reg"] < chip.base_registers, "no such register to set")
            lane = fields["lane"]
            self.demand(lane % 2 == 0 and lane <= chip.lanes - 2, "lane is odd or too high")
        if name == "load":
            self.demand(fields["mode"] < len(isa.Mode), "there is no such mode")
        if name == "transpose":
            fits = chip.superlane_lanes == TRANSPOSED
            self.demand(fits, f"transpose takes superlanes of {TRANSPOSED} lanes")
        if name in ("permute", "distribute"):
            self.demand(fields["map"] < len(self.program.maps), "there is no such map")
            self.lane_map(name, [int(lane) for lane in self.program.maps[fields["map"]]])
        if made.kind.unit == "vxm":
            self.alu(made)

    def lane_map(self, name: str, lanes: list[int]) -> None:
        if name == "permute":
            used = [lane for lane in lanes if lane != -1]
            self.demand(len(set(used)) == len(used), "the map uses a lane twice")
            return
        group = self.chip.superlane_lanes
        fine = all(lane == -1 or lane // group == l // group for l, lane in enumerate(lanes))
        self.demand(fine, "the map leaves a superlane")

    def alu(self, made: Instruction) -> None:
        chip, fields = self.chip, made.fields
        known = all(fields[f"{letter}_from"] < len(isa.Source) for letter in "abc")
        self.demand(known, "an operand comes from nowhere known")
        every = list(operands(fields))
        taken = isa.ALU[made.kind.name].operands
        for number, operand in enumerate(every):
            source, at = operand.source, operand.at
            name = f"operand {'abc'[number]}"
            self.demand((source != isa.Source.NONE) == (number < taken), f"takes {taken} operands")
            if source in isa.SOURCE_WIDTH:
                self.streams(name, at // 2, isa.SOURCE_WIDTH[source])
            elif source == isa.Source.TAP:
                alu, delay = divmod(at, isa.DELAYS)
                self.demand(alu < chip.alus, f"{name}: there is no ALU {alu}")
                self.demand(delay < chip.history_cycles, f"{name}: {delay} cycles are forgotten")
            else:
                self.demand(at == 0, f"{name} has no place, so its field must be 0")
        used = any(operand.source == isa.Source.IMM for operand in every)
        self.demand(used or fields["imm"] == 0, "imm is not used, so it must be 0")
        width = fields["width"]
        self.demand(width in (0, 1, 2, 4), f"width is {width}")
        sides = [(side, fields[side]) for side in ("west", "east") if fields[side]]
        self.demand((width > 0) == bool(sides), "width and the streams of the result disagree")
        for side, number in sides:
            self.streams(side, number - 1, width)
            self.demand(number <= chip.streams, f"{side}: there is no stream {number - 1}")


def port_width(chip: Chip, port: isa.StreamPort, fields: Mapping[str, int]) -> int:
    """How many streams a port of an instruction uses."""
    if port.width == 0:
        return 4 if fields["wide"] else 1
    return chip.install_streams if port.width < 0 else port.width


def operands(fields: Mapping[str, int]) -> Iterator[Operand]:
    """The three operand fields of an ALU instruction."""
    for letter in "abc":
        yield Operand(isa.Source(fields[f"{letter}_from"]), fields[f"{letter}_at"])
