"""In: nothing. Out: Program, what a chip runs: cycles and instructions per queue, memory, I/O.

A Program is built of sections. A Section is straight-line: issues with fixed cycles, and a length.
The plan says which sections run, one after the other, how often, and with which bases in the MEM
queues; its loop counts are numbers or issue parameters, so the cycles of a step are known before it
starts:

    cycles = sum over the runs of the plan of their section's length

which is affine in each parameter. Between sections nothing but MEM survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import RequestError


@dataclass(frozen=True, slots=True)
class Issue:
    """An instruction of `queue` (isa.units) at `cycle` of its section, and count - 1 repetitions,
    period cycles apart. args: the fields of isa.KINDS[op], in order. tag: index in Section.tags."""

    cycle: int
    queue: int
    op: str
    args: tuple[int, ...]
    count: int = 1
    period: int = 1
    tag: int = 0

    @property
    def last_cycle(self) -> int:
        return self.cycle + (self.count - 1) * self.period


@dataclass(frozen=True, slots=True)
class Section:
    """Issues sorted by (queue, cycle, op, args). tags: names of the operations they belong to."""

    name: str
    cycles: int
    issues: tuple[Issue, ...]
    tags: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True)
class Base:
    """Base register `reg` of a slice when a run begins: value + sum of stride * loop variable."""

    slice: int
    reg: int
    value: int
    strides: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a section."""

    section: int
    bases: tuple[Base, ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """body, `count` times, with the variable `var` at 0, 1, ... count is a number or the name of an
    issue parameter; a parameter with several values is indexed by the variable `by`."""

    var: str
    count: int | str
    body: tuple[Run | Loop, ...]
    by: str = ""


@dataclass(frozen=True, slots=True)
class Param:
    """An issue parameter: how many values it has, and the range of each, both ends included."""

    name: str
    values: int
    lowest: int
    highest: int


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Memory contents before the first step: data uint8 [n, lanes] at words word.. of a slice.

    what: weights, constants, table, ... for the memory map."""

    slice: int
    word: int
    data: NDArray[np.uint8]
    what: str


@dataclass(frozen=True, slots=True)
class Vector:
    """Where one vector of a port lies: byte b of row r in slice slices[b], word + r * row_step."""

    slices: tuple[int, ...]
    word: int
    row_step: int


@dataclass(frozen=True, slots=True, eq=False)
class Port:
    """What the host writes before a step ("in") or reads after it ("out").

    features int32 [vectors, lanes]: which element of the row stands in a lane, -1 none."""

    name: str
    direction: str
    rows: int
    vectors: tuple[Vector, ...]
    features: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """All that a chip needs. meta: JSON text for whoever drives it (vocabulary, rows, pages...).

    maps int16 [maps, lanes]: lane tables of permute and distribute. used: (what, slice, word,
    words) of memory that has no contents yet: context, state, text."""

    chip: str
    sections: tuple[Section, ...]
    plan: tuple[Run | Loop, ...]
    params: tuple[Param, ...]
    maps: NDArray[np.int16]
    image: tuple[Segment, ...]
    ports: tuple[Port, ...]
    used: tuple[tuple[str, int, int, int], ...] = ()
    meta: str = "{}"
    tables: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def port(self, name: str) -> Port:
        return next(port for port in self.ports if port.name == name)


Params = Mapping[str, tuple[int, ...]]


def check_params(program: Program, params: Params) -> None:
    """Raise RequestError unless `params` gives each parameter its values, each in range."""
    if set(params) != {param.name for param in program.params}:
        raise RequestError(f"the program takes the parameters {[p.name for p in program.params]}")
    for param in program.params:
        values = params[param.name]
        if len(values) != param.values:
            raise RequestError(f"parameter {param.name} takes {param.values} values")
        for value in values:
            if not param.lowest <= value <= param.highest:
                raise RequestError(
                    f"parameter {param.name} is {value}, not {param.lowest} to {param.highest}"
                )


def runs(program: Program, params: Params) -> Iterator[tuple[Run, dict[str, int]]]:
    """Every run of a step in order, with the loop variables around it."""
    yield from _runs(program.plan, params, {})


def _runs(
    body: tuple[Run | Loop, ...], params: Params, around: dict[str, int]
) -> Iterator[tuple[Run, dict[str, int]]]:
    for item in body:
        if isinstance(item, Run):
            yield item, around
            continue
        for i in range(loop_count(item, params, around)):
            yield from _runs(item.body, params, {**around, item.var: i})


def loop_count(loop: Loop, params: Params, around: Mapping[str, int]) -> int:
    """How often a loop runs."""
    if isinstance(loop.count, int):
        return loop.count
    return params[loop.count][around[loop.by] if loop.by else 0]


def base_value(base: Base, around: Mapping[str, int]) -> int:
    return base.value + sum(stride * around[var] for var, stride in base.strides)


def cycles(program: Program, params: Params) -> int:
    """The cycles of a step: what the compiler predicts, and every simulator must find."""

    def of(body: tuple[Run | Loop, ...], around: dict[str, int]) -> int:
        total = 0
        for item in body:
            if isinstance(item, Run):
                total += program.sections[item.section].cycles
                continue
            count = loop_count(item, params, around)
            if _depends(item.body, item.var):
                total += sum(of(item.body, {**around, item.var: i}) for i in range(count))
            elif count:
                total += count * of(item.body, {**around, item.var: 0})
        return total

    check_params(program, params)
    return of(program.plan, {})


def _depends(body: tuple[Run | Loop, ...], var: str) -> bool:
    """Whether a loop inside counts by the variable."""
    loops = [item for item in body if isinstance(item, Loop)]
    return any(loop.by == var or _depends(loop.body, var) for loop in loops)
