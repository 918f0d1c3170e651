"""In: a Table. Out: nothing; ProgramError if an instruction's fields say what no unit can do."""

from __future__ import annotations

import numpy as np

from openlpu import isa
from openlpu.check.table import I64, Bools, Group, Table

_SUPERLANE = 16  # lanes of the superlanes that transpose exchanges with 16 streams
_WIDTHS = (0, 1, 2, 4)


def demand_fields(table: Table) -> None:
    """Raise at the first instruction that stands in a wrong queue or has a field out of range."""
    for group in table.groups.values():
        _units(table, group)
        _steps(table, group)
        kind = group.kind
        for port in (*kind.reads, *kind.writes):
            first = group.issue_field(port.field)
            width = port_width(table, group, port)
            table.refuse_issue(group, _astray(table, first, width), f"{port.field}: {_ASTRAY}")
        _limits(table, group)
    for group in table.of("permute", "distribute"):
        _maps(table, group)
    for group in table.of("vxm"):
        _alus(table, group)


def port_width(table: Table, group: Group, port: isa.StreamPort) -> I64:
    """How many streams each issue uses at a port."""
    if port.width == 0:
        return np.where(group.issue_field("wide") != 0, 4, 1)
    width = table.chip.install_streams if port.width < 0 else port.width
    return np.full(len(group.issue_row), width, np.int64)


_ASTRAY = "no aligned group of streams in one direction"


def _astray(table: Table, first: I64, width: I64 | int) -> Bools:
    """Where a group of streams is not aligned, or not inside one direction."""
    streams = table.chip.streams
    beyond = first + width > 2 * streams
    bad: Bools = (first < 0) | beyond | (first % width != 0) | (first % streams + width > streams)
    return bad


def _units(table: Table, group: Group) -> None:
    """Each instruction stands in a queue of its unit."""
    first = isa.units(table.chip)
    ends = np.array([first.load, first.vxm, first.sxm])
    kinds = np.searchsorted(ends, group.issue_queue, side="right")
    part = np.where(kinds == 1, (group.issue_queue - first.load) % 3, 0)
    unit = group.kind.unit
    wanted = {"mem": (0, 0), "load": (1, 0), "act": (1, 1), "out": (1, 2)}
    wanted |= {"vxm": (2, 0), "sxm": (3, 0)}
    bad = (kinds != wanted[unit][0]) | (part != wanted[unit][1])
    table.refuse_issue(group, bad, f"the queue does not drive {unit}")


def _steps(table: Table, group: Group) -> None:
    if group.kind.stepped < 0:
        return
    chip = table.chip
    name = group.kind.fields[group.kind.stepped].name
    groups = chip.lanes // chip.install_streams
    limit = {"word": chip.words, "slot": chip.accumulators, "group": groups}[name]
    bad = (group.stepped < 0) | (group.stepped >= limit)
    table.refuse(bad, group.row, group.time, f"{name} leaves 0 .. {limit - 1}")


def _limits(table: Table, group: Group) -> None:
    """Registers, lanes, modes: what has fewer values than its bits."""
    chip, kind = table.chip, group.kind
    limits = {"base": chip.base_registers - 1, "reg": chip.base_registers - 1}
    limits |= {"limit": (1 << 15) - 1, "lane": chip.lanes - 2, "mode": len(isa.Mode) - 1}
    for name, highest in limits.items():
        if any(field.name == name for field in kind.fields):
            bad = group.issue_field(name) > highest
            table.refuse_issue(group, bad, f"{name} is above {highest}")
    if kind.name == "setbase":
        table.refuse_issue(group, group.issue_field("reg") == 0, "base register 0 is always 0")
        table.refuse_issue(group, group.issue_field("lane") % 2 != 0, "lane is odd")
    if kind.name == "transpose" and chip.superlane_lanes != _SUPERLANE:
        every = np.ones(len(group.issue_row), np.bool_)
        table.refuse_issue(group, every, f"it takes superlanes of {_SUPERLANE} lanes")


def _maps(table: Table, group: Group) -> None:
    maps, number = table.program.maps, group.issue_field("map")
    table.refuse_issue(group, number >= len(maps), "there is no such map")
    used = maps[number]
    if group.kind.name == "permute":
        order = np.sort(used, axis=1)
        twice = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
        table.refuse_issue(group, twice.any(axis=1), "its map uses a lane twice")
        return
    lanes = table.chip.superlane_lanes
    own = np.arange(table.chip.lanes) // lanes
    leaves = (used >= 0) & (used // lanes != own)
    table.refuse_issue(group, leaves.any(axis=1), "its map leaves a superlane")


def _alus(table: Table, group: Group) -> None:
    chip = table.chip
    counts = np.zeros(len(isa.OPCODES), np.int64)
    for op in isa.ALU.values():
        counts[isa.OPCODES[op.name]] = op.operands
    immediate = np.zeros(len(group.issue_row), np.bool_)
    for number, letter in enumerate("abc"):
        source, at = group.issue_field(f"{letter}_from"), group.issue_field(f"{letter}_at")
        wanted = number < counts[group.issue_code]
        table.refuse_issue(group, source >= len(isa.Source), f"operand {letter}: no such source")
        bad = (source != isa.Source.NONE) != wanted
        table.refuse_issue(group, bad, "it has too few or too many operands")
        immediate |= source == isa.Source.IMM
        unused = np.isin(source, (isa.Source.NONE, isa.Source.IMM)) & (at != 0)
        table.refuse_issue(group, unused, f"{letter}_at is not used, so it must be 0")
        for kind, width in isa.SOURCE_WIDTH.items():
            bad = (source == kind) & _astray(table, at // 2, width)
            table.refuse_issue(group, bad, f"operand {letter}: {_ASTRAY}")
        alu, delay = np.divmod(at, isa.DELAYS)
        bad = (source == isa.Source.TAP) & ((alu >= chip.alus) | (delay >= chip.history_cycles))
        table.refuse_issue(group, bad, f"operand {letter}: no such ALU, or no such delay")
    bad = ~immediate & (group.issue_field("imm") != 0)
    table.refuse_issue(group, bad, "imm is not used, so it must be 0")
    _results(table, group)


def _results(table: Table, group: Group) -> None:
    width = group.issue_field("width")
    table.refuse_issue(group, ~np.isin(width, _WIDTHS), "width is none of 0, 1, 2, 4")
    sent = np.zeros(len(width), np.bool_)
    for side in ("west", "east"):
        number = group.issue_field(side)
        sent |= number > 0
        beyond = number - 1 + width > table.chip.streams
        unaligned = (number - 1) % np.maximum(width, 1) != 0
        table.refuse_issue(group, (number > 0) & (beyond | unaligned), f"{side}: {_ASTRAY}")
    table.refuse_issue(group, sent != (width > 0), "width and the result's streams disagree")
