"""In: a Program's plan and parameters. Out: its parts in order, loops compressed, with cycles.

Also refuses what no reader here could draw: a Program may come from a stranger's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.isa import KINDS, place, units
from openlpu.program import Loop, Params, Program, Run, Section, check_params, loop_count

# What of one section fits in memory comfortably: expanded issues or stream values, and operations.
LARGEST_SECTION = 20_000_000
MOST_TAGS = 20_000
_MOST_CYCLES = 1 << 30  # the page counts in int32

Body = tuple[Run | Loop, ...]
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A run (section >= 0) or a loop of the plan. times: how often it is entered in a step, and
    cycles what all of these take together; iterations: of a loop, all entries together."""

    section: int
    var: str
    times: int
    iterations: int
    cycles: int
    body: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the step, at its real time. section >= 0: one run, the first at its place in
    the plan; else the iterations first .. last of the loop over var. whole: what happens inside
    follows as spans one deeper; else nothing more is told about it."""

    section: int
    var: str
    first: int
    last: int
    start_cycle: int
    cycles: int
    depth: int
    whole: bool


def prove_drawable(program: Program, chip: Chip, params: Params) -> None:
    """Raise ProgramError, or RequestError for the parameters, unless everything can be shown."""
    check_params(program, params)
    for section in program.sections:
        _prove_section(section, chip)
    _prove_plan(program, program.plan, {})
    memory = [(s.what, s.slice, s.word, len(s.data)) for s in program.image]
    for what, slice_index, word, words in (*memory, *program.used):
        if not (0 <= slice_index < chip.slices and 0 <= word <= word + words <= chip.words):
            raise ProgramError(f"{what}: words {word}.. of slice {slice_index} are not in memory")
    for port in program.ports:
        for vector in port.vectors:
            ends = (vector.word, vector.word + (port.rows - 1) * vector.row_step)
            inside = all(0 <= s < chip.slices for s in vector.slices)
            if port.rows < 0 or not inside or not all(0 <= end < chip.words for end in ends):
                raise ProgramError(f"port {port.name}: a vector is not in memory")


def outline(program: Program, params: Params) -> tuple[Part, ...]:
    """The plan as a tree, each position once."""
    times: dict[Path, int] = {}
    iterations: dict[Path, int] = {}

    def count(body: Body, above: Path, around: dict[str, int], weight: int) -> None:
        for position, item in enumerate(body):
            path = (*above, position)
            times[path] = times.get(path, 0) + weight
            if isinstance(item, Run):
                continue
            n = loop_count(item, params, around)
            iterations[path] = iterations.get(path, 0) + weight * n
            if counts_by(item.body, item.var):
                for i in range(n):
                    count(item.body, path, {**around, item.var: i}, weight)
            elif n:
                count(item.body, path, {**around, item.var: 0}, weight * n)

    def tell(body: Body, above: Path) -> tuple[Part, ...]:
        parts = []
        for position, item in enumerate(body):
            path = (*above, position)
            n = times.get(path, 0)
            if isinstance(item, Run):
                cycles = n * program.sections[item.section].cycles
                parts.append(Part(item.section, "", n, 0, cycles))
                continue
            inner = tell(item.body, path)
            total = sum(part.cycles for part in inner)
            parts.append(Part(-1, item.var, n, iterations.get(path, 0), total, inner))
        return tuple(parts)

    count(program.plan, (), {}, 1)
    return tell(program.plan, ())


def run_counts(program: Program, params: Params) -> list[int]:
    """How often each section runs in a step."""
    counts = [0] * len(program.sections)

    def add(parts: tuple[Part, ...]) -> None:
        for part in parts:
            if part.section >= 0:
                counts[part.section] += part.times
            add(part.body)

    add(outline(program, params))
    return counts


def spans(program: Program, params: Params) -> list[Span]:
    """The step as it passes, of each loop one iteration whole and the others as one span.

    The whole one is the first that enters the most places of the plan, because a loop inside may
    have nothing to do in some iterations."""
    found: list[Span] = []

    def visit(body: Body, around: dict[str, int], start: int, depth: int) -> int:
        for item in body:
            if isinstance(item, Run):
                cycles = program.sections[item.section].cycles
                found.append(Span(item.section, "", 0, 0, start, cycles, depth, True))
                start += cycles
                continue
            n = loop_count(item, params, around)
            # One iteration is as good as another unless a loop inside counts by this one.
            distinct = n if counts_by(item.body, item.var) else min(n, 1)
            lengths, places = [], []
            for i in range(distinct):
                cycles, entered = _measure(program, params, item.body, {**around, item.var: i})
                lengths.append(cycles)
                places.append(entered)
            if not n:
                continue
            whole = places.index(max(places))
            before, total = sum(lengths[:whole]), sum(lengths) if distinct == n else n * lengths[0]
            after = total - before - lengths[whole]
            if whole:
                found.append(Span(-1, item.var, 0, whole - 1, start, before, depth, False))
            start += before
            found.append(Span(-1, item.var, whole, whole, start, lengths[whole], depth, True))
            start = visit(item.body, {**around, item.var: whole}, start, depth + 1)
            if whole < n - 1:
                found.append(Span(-1, item.var, whole + 1, n - 1, start, after, depth, False))
            start += after
        return start

    visit(program.plan, {}, 0, 0)
    return found


def _measure(
    program: Program, params: Params, body: Body, around: dict[str, int]
) -> tuple[int, int]:
    """Cycles of a body, and how many places of it are entered."""
    cycles = places = 0
    for item in body:
        if isinstance(item, Run):
            cycles, places = cycles + program.sections[item.section].cycles, places + 1
            continue
        n = loop_count(item, params, around)
        vary = counts_by(item.body, item.var)
        inner = [
            _measure(program, params, item.body, {**around, item.var: i})
            for i in range(n if vary else min(n, 1))
        ]
        cycles += sum(c for c, _ in inner) if vary else n * sum(c for c, _ in inner)
        places += max((p for _, p in inner), default=0)
    return cycles, places


def counts_by(body: Body, var: str) -> bool:
    """Whether a loop inside counts by the variable."""
    loops = [item for item in body if isinstance(item, Loop)]
    return any(loop.by == var or counts_by(loop.body, var) for loop in loops)


def _prove_section(section: Section, chip: Chip) -> None:
    queues, expanded = units(chip).count, 0
    if section.cycles > _MOST_CYCLES or len(section.tags) > MOST_TAGS:
        raise ProgramError(
            f"section {section.name}: {section.cycles:,} cycles and {len(section.tags):,} "
            f"operations; {_MOST_CYCLES:,} and {MOST_TAGS:,} can be shown"
        )
    unit_of = [place(chip, queue).unit for queue in range(queues)]
    for issue in section.issues:
        where = f"section {section.name}: {issue.op} at cycle {issue.cycle} of queue {issue.queue}"
        kind = KINDS.get(issue.op)
        if kind is None or len(issue.args) != len(kind.fields):
            raise ProgramError(f"{where} is no instruction")
        if not 0 <= issue.queue < queues:
            raise ProgramError(f"{where}: the chip has {queues} queues")
        if unit_of[issue.queue] != kind.unit:
            raise ProgramError(f"{where}: that unit does not know it")
        if not 0 <= issue.tag < len(section.tags):
            raise ProgramError(f"{where}: its tag {issue.tag} has no name")
        if issue.count < 1 or issue.period < 1 or issue.cycle < 0:
            raise ProgramError(f"{where}: a count, period or cycle is out of range")
        if issue.last_cycle >= section.cycles:
            raise ProgramError(f"{where} ends after the section's {section.cycles} cycles")
        expanded += issue.count
    if expanded > LARGEST_SECTION:
        raise ProgramError(f"section {section.name}: {expanded:,} issues are too many to show")


def _prove_plan(program: Program, body: Body, around: Mapping[str, int]) -> None:
    """around: the loop variables there, and the highest count of each."""
    params = {param.name: param for param in program.params}
    for item in body:
        if isinstance(item, Run):
            if not 0 <= item.section < len(program.sections):
                raise ProgramError(f"the plan runs section {item.section}, which is not there")
            continue
        where = f"the plan's loop over {item.var}"
        if isinstance(item.count, str):
            param = params.get(item.count)
            if param is None:
                raise ProgramError(f"{where} counts to {item.count}, which is no parameter")
            if item.by and around.get(item.by, param.values + 1) > param.values:
                raise ProgramError(f"{where} takes a value of {item.count} that is not there")
            highest, lowest = param.highest, param.lowest
        else:
            highest = lowest = item.count
        if lowest < 0 or item.var in around:
            raise ProgramError(f"{where} has no sound count or variable")
        _prove_plan(program, item.body, {**around, item.var: highest})
