"""In: a legal Program and the parameters of a step. Out: its counters, and their energy by class.

Nothing runs. A section always does the same, whatever bases and data it finds, so it is counted
once and multiplied by how often the plan runs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from openlpu import isa
from openlpu import program as programs
from openlpu.asm.binary import text_bytes
from openlpu.check.streams import count_hops, find_flows
from openlpu.check.table import tabulate
from openlpu.chip import Chip, Energy
from openlpu.program import Loop, Params, Program, Run, Section


def count(program: Program, chip: Chip, params: Params) -> dict[str, int]:
    """The counters of a step (see sim.result). Raises RequestError for parameters out of range."""
    programs.check_params(program, params)
    total: Counter[str] = Counter(cycles=0, hops=0)
    for index, times in _section_runs(program.plan, params, {}).items():
        for name, value in count_section(program, chip, program.sections[index]).items():
            total[name] += times * value
    return dict(total)


def count_section(program: Program, chip: Chip, section: Section) -> dict[str, int]:
    """The counters of one run of a section."""
    table = tabulate(program, chip, section)
    counters = {"cycles": section.cycles, "hops": count_hops(find_flows(table))}
    names = list(isa.OPCODES)
    for group in table.groups.values():
        found = np.bincount(group.code, minlength=len(names))
        counters |= {f"issue.{names[code]}": int(found[code]) for code in np.flatnonzero(found)}
    return counters


def _section_runs(
    body: tuple[Run | Loop, ...], params: Params, around: Mapping[str, int]
) -> Counter[int]:
    """How often each section runs."""
    total: Counter[int] = Counter()
    for item in body:
        if isinstance(item, Run):
            total[item.section] += 1
            continue
        times = programs.loop_count(item, params, around)
        if _counts_by(item.body, item.var):
            for i in range(times):
                total += _section_runs(item.body, params, {**around, item.var: i})
        elif times:
            inner = _section_runs(item.body, params, {**around, item.var: 0})
            total += Counter({index: times * each for index, each in inner.items()})
    return total


def _counts_by(body: tuple[Run | Loop, ...], var: str) -> bool:
    """Whether a loop inside takes its count by the variable."""
    loops = [item for item in body if isinstance(item, Loop)]
    return any(loop.by == var or _counts_by(loop.body, var) for loop in loops)


def fetched_bytes(program: Program, chip: Chip, params: Params) -> int:
    """Bytes of instructions of a step: each run of a section fetches its texts."""
    programs.check_params(program, params)
    runs = _section_runs(program.plan, params, {})
    return sum(
        times * sum(text_bytes(program.sections[index], chip).values())
        for index, times in runs.items()
    )


def energy_pj(counters: Mapping[str, int], fetched_bytes: int, chip: Chip) -> dict[str, float]:
    """Picojoules of a step by class, the fields of chip.Energy. No instruction fetches texts, so
    their bytes are charged beside the counters."""
    units = dict.fromkeys(Energy.__dataclass_fields__, 0)
    units["stream_hop_byte"] = counters.get("hops", 0) * chip.lanes
    units["fetch_byte"] = fetched_bytes
    for name, kind in isa.KINDS.items():
        issued = counters.get(f"issue.{name}", 0)
        if issued and kind.energy:
            units[kind.energy] += issued * _units(kind, chip)
    return {name: times * float(getattr(chip.energy_pj, name)) for name, times in units.items()}


def _units(kind: isa.Kind, chip: Chip) -> int:
    """What one issue does, counted in the unit of its class: bytes, multiply-adds or operations.

    Counters do not tell how many streams an SXM instruction moves; it is charged for the most.
    """
    lanes = chip.lanes
    if kind.name in ("act", "install"):
        return lanes * lanes
    if kind.name == "setbase":
        return 2
    if kind.name == "load":
        return lanes * chip.install_streams
    if kind.unit == "sxm" or kind.name == "out":
        return lanes * max(port.width or 4 for port in kind.writes)
    return lanes
