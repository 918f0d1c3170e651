"""In: a seed. Out: a random legal Program for a chip like `tiny`, and the same Program damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from random_sections import BOTH, LOADED, MARGIN, SectionBuilder, issue, section, variation

from openlpu import isa
from openlpu.chip import Chip
from openlpu.program import (
    Base,
    Issue,
    Loop,
    Param,
    Params,
    Port,
    Program,
    Run,
    Section,
    Segment,
    Vector,
)

__all__ = ["damaged", "issue", "params", "random_program", "section"]

_MAPS = 8  # even ones are permutations, odd ones stay in superlanes


def random_program(seed: int) -> tuple[Program, Chip]:
    """A program, nearly always legal, and its chip."""
    rng = random.Random(seed)
    chip = variation(rng)
    builders = [SectionBuilder(rng, chip, _MAPS) for _ in range(rng.randint(1, 2))]
    sections = tuple(builder.build(f"s{i}") for i, builder in enumerate(builders))
    names = (
        Param("n", 1, rng.randint(0, 1), rng.randint(1, 3)),
        Param("m", 2, 0, rng.randint(1, 2)),
    )
    program = Program(
        chip.name,
        sections,
        _plan(rng, builders, names),
        names,
        _maps(rng, chip),
        _image(rng, chip),
        _ports(rng, chip),
        (("state", 3, 100, 50),),
    )
    return program, chip


def params(rng: random.Random, program: Program, highest: bool) -> Params:
    """Values for every parameter, the highest or any."""
    return {
        param.name: tuple(
            param.highest if highest else rng.randint(param.lowest, param.highest)
            for _ in range(param.values)
        )
        for param in program.params
    }


def _plan(
    rng: random.Random, builders: list[SectionBuilder], names: tuple[Param, ...]
) -> tuple[Run | Loop, ...]:
    """Every section at least once; loops by numbers, by parameters, one inside another."""
    one, two = names
    plan: list[Run | Loop] = []
    for number, builder in enumerate(builders):
        form = rng.choice(("run", "number", "parameter", "nested"))
        around: dict[str, int] = {}
        if form != "run":
            around["i"] = {"number": 2, "parameter": one.highest, "nested": 2}[form]
        if form == "nested":
            around["j"] = two.highest
        item: Run | Loop = Run(number, _bases(rng, builder, around))
        if form == "nested":
            item = Loop("j", "m", (item,), "i")
        if form != "run":
            item = Loop("i", "n" if form == "parameter" else 2, (item,))
        plan.append(item)
    return tuple(plan)


def _bases(rng: random.Random, builder: SectionBuilder, most: dict[str, int]) -> tuple[Base, ...]:
    """The bases that a section was built for; each reaches its highest at some turn."""
    found = []
    for (place, reg), highest in sorted(builder.highest.items()):
        if reg not in LOADED + BOTH:
            continue
        value, lowest, strides = highest, highest, []
        for var, count in most.items():
            stride = rng.choice((0, 0, 1, 2, -1, -2))
            reach = stride * (count - 1)
            if stride and lowest - abs(reach) >= -1:
                strides.append((var, stride))
                lowest -= abs(reach)
                value -= max(reach, 0)
        found.append(Base(place, reg, value, tuple(strides)))
    return tuple(found)


def _maps(rng: random.Random, chip: Chip) -> np.ndarray:
    rows = []
    for number in range(_MAPS):
        if number % 2:
            group = chip.superlane_lanes
            row = [l // group * group + rng.randrange(group) for l in range(chip.lanes)]
        else:
            row = rng.sample(range(chip.lanes), chip.lanes)
        for lane in rng.sample(range(chip.lanes), rng.choice((0, 0, 1, 5))):
            row[lane] = -1
        rows.append(row)
    return np.array(rows, np.int16)


def _image(rng: random.Random, chip: Chip) -> tuple[Segment, ...]:
    """Both ends of each bank of each slice."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    middle, end = chip.words_per_bank, chip.words
    found = []
    for place in range(chip.slices):
        for word, count in (
            (0, MARGIN + 10),
            (middle - MARGIN, 2 * MARGIN + 10),
            (end - MARGIN, MARGIN),
        ):
            data = noise.integers(0, 256, (count, chip.lanes), np.uint8)
            if rng.random() < 0.5:  # small numbers, so that bases and maps are often in range
                data[:, 1::2] = noise.integers(0, 2, data[:, 1::2].shape) * 255
                data[:, ::2] &= 31
            found.append(Segment(place, word, data, "weights"))
    return tuple(found)


def _ports(rng: random.Random, chip: Chip) -> tuple[Port, ...]:
    features = np.arange(chip.lanes, dtype=np.int32)[None]
    inward = Vector(tuple(rng.sample(range(chip.slices), 4)), 5, 3)
    outward = Vector(tuple(rng.sample(range(chip.slices), 4)), chip.words - 1, -1)
    return (
        Port("x", "in", 3, (inward,), features),
        Port("y", "out", 2, (outward,), features),
    )


# -- damage


def damaged(seed: int, program: Program, chip: Chip) -> tuple[Program, str]:
    """The program with one fault, or one harmless change; and what was changed."""
    rng = random.Random(seed)
    kinds = [*_KINDS] * 6 + [*_RARE]
    while True:
        kind = rng.choice(kinds)
        if kind in _RARE:
            changed = _RARE[kind](rng, program, chip)
        else:
            number = rng.randrange(len(program.sections))
            before = program.sections[number]
            if not before.issues:
                continue
            after = _KINDS[kind](rng, before, chip)
            if after == before:
                continue
            sections = [*program.sections]
            sections[number] = after
            changed = replace(program, sections=tuple(sections))
        return changed, kind


def _change(old: Section, index: int, *new: Issue) -> Section:
    """The section with an issue replaced by others."""
    return section(old.name, old.cycles, (*old.issues[:index], *new, *old.issues[index + 1 :]))


def _pick(rng: random.Random, old: Section) -> tuple[int, Issue]:
    index = rng.randrange(len(old.issues))
    return index, old.issues[index]


_HARMLESS = ("imm", "amount", "mode", "row", "group", "lane", "map", "limit", "word", "slot", "reg")


def _field(rng: random.Random, old: Section, chip: Chip, names: tuple[str, ...] = ()) -> Section:
    index, one = _pick(rng, old)
    fields = isa.KINDS[one.op].fields
    known = [i for i, entry in enumerate(fields) if not names or entry.name in names]
    if not known:
        return old
    at = rng.choice(known)
    args = [*one.args]
    low = -(1 << fields[at].bits - 1) if fields[at].signed else 0
    high = low + (1 << fields[at].bits) - 1
    args[at] = rng.choice(
        (
            args[at] + rng.choice((-1, 1)),
            args[at] + rng.choice((-1, 1)),
            args[at] ^ 1,
            rng.randint(max(low, -3), min(high, 9)),
            rng.randint(low, high),
            rng.choice((low, high, high + 1, low - 1)),
        )
    )
    return _change(old, index, replace(one, args=tuple(args)))


def _harmless_field(rng: random.Random, old: Section, chip: Chip) -> Section:
    return _field(rng, old, chip, _HARMLESS)


def _cycle(rng: random.Random, old: Section, chip: Chip) -> Section:
    index, one = _pick(rng, old)
    return _change(old, index, replace(one, cycle=one.cycle + rng.choice((-3, -1, 1, 2))))


def _count(rng: random.Random, old: Section, chip: Chip) -> Section:
    index, one = _pick(rng, old)
    if rng.random() < 0.5:
        repeated = [i for i, each in enumerate(old.issues) if each.count > 1]
        if repeated:
            index = rng.choice(repeated)
            one = old.issues[index]
    change = rng.choice(({"count": one.count + 1}, {"count": one.count - 1}, {"period": 2}))
    return _change(old, index, replace(one, **change))


def _drop(rng: random.Random, old: Section, chip: Chip) -> Section:
    return _change(old, _pick(rng, old)[0])


def _double(rng: random.Random, old: Section, chip: Chip) -> Section:
    index, one = _pick(rng, old)
    other = replace(one, cycle=max(0, one.cycle + rng.randint(-9, 9)))
    return _change(old, index, one, other)


def _move(rng: random.Random, old: Section, chip: Chip) -> Section:
    """To another queue of the unit, or any."""
    index, one = _pick(rng, old)
    first = isa.units(chip)
    unit = isa.KINDS[one.op].unit
    if rng.random() < 0.1:
        queue = rng.randrange(-1, first.count + 1)
    elif unit == "mem":
        queue = one.queue ^ 1
    elif unit == "vxm":
        queue = first.vxm + rng.randrange(chip.alus)
    elif unit == "sxm":
        queue = first.sxm + rng.randrange(2 * chip.sxm_queues)
    else:
        queue = one.queue + rng.choice((-3, 3, 1))
    return _change(old, index, replace(one, queue=queue))


def _early(rng: random.Random, old: Section, chip: Chip) -> Section:
    """What waits for a unit comes a cycle sooner or later, or asks another slot."""
    waiting = [i for i, one in enumerate(old.issues) if one.op in ("install", "act", "out")]
    if not waiting:
        return old
    index = rng.choice(waiting)
    one = old.issues[index]
    if one.op != "install" and rng.random() < 0.3:
        return _change(old, index, replace(one, args=(one.args[0] + 1, *one.args[1:])))
    return _change(old, index, replace(one, cycle=one.cycle + rng.choice((-1, -1, 1))))


def _twin(rng: random.Random, old: Section, chip: Chip) -> Section:
    """A second result of an ALU, near another or at the same time."""
    found = [one for one in old.issues if one.op in isa.ALU]
    if not found:
        return old
    one, op = rng.choice(found), rng.choice([op for op in isa.ALU.values() if op.operands == 2])
    late = isa.latency(chip, isa.KINDS[one.op]) - isa.latency(chip, isa.KINDS[op.name])
    cycle = max(0, one.cycle + late + rng.choice((0, 0, 1)))
    fields = {"a_from": isa.Source.IMM, "b_from": isa.Source.IMM, "imm": 5}
    return section(old.name, old.cycles, (*old.issues, issue(one.queue, op.name, cycle, **fields)))


def _op(rng: random.Random, old: Section, chip: Chip) -> Section:
    index, one = _pick(rng, old)
    fields = isa.KINDS[one.op].fields
    like = [kind.name for kind in isa.KINDS.values() if kind.fields == fields]
    names = like if rng.random() < 0.8 else [*isa.KINDS]
    return _change(old, index, replace(one, op=rng.choice(names)))


def _length(rng: random.Random, old: Section, chip: Chip) -> Section:
    return replace(old, cycles=old.cycles + rng.choice((-2, -1, -1, 1, 7)))


def _form(rng: random.Random, old: Section, chip: Chip) -> Section:
    """What belongs to no instruction: tags, order, too many fields."""
    index, one = _pick(rng, old)
    sort = rng.randrange(4)
    if sort == 0:
        return _change(old, index, replace(one, tag=rng.choice((-1, 1))))
    if sort == 1:
        return _change(old, index, replace(one, args=(*one.args, 0)))
    if sort == 2:
        return replace(old, issues=old.issues[::-1])
    return replace(old, tags=("a", "b"))


_KINDS: dict[str, Callable[[random.Random, Section, Chip], Section]] = {
    "field": _field,
    "harmless field": _harmless_field,
    "another harmless field": _harmless_field,
    "cycle": _cycle,
    "count": _count,
    "drop": _drop,
    "double": _double,
    "queue": _move,
    "early": _early,
    "twin": _twin,
    "op": _op,
    "length": _length,
}


def _bases_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    """One base of one run: another value, stride or place, twice or not at all."""

    def change(run: Run) -> Run:
        bases = [*run.bases]
        if not bases:
            return run
        at = rng.randrange(len(bases))
        one = bases[at]
        sort = rng.randrange(6)
        if sort <= 1:
            bases[at] = replace(one, value=one.value + rng.choice((-1, 1, 1)))
        elif sort == 2:
            bases[at] = replace(one, strides=((rng.choice("ij"), rng.choice((-1, 1, 1))),))
        elif sort == 3:
            bases[at] = replace(one, **{rng.choice(("slice", "reg")): rng.randint(-1, 8)})
        elif sort == 4:
            bases.append(one)
        else:
            del bases[at]
        return replace(run, bases=tuple(bases))

    def walk(body: tuple[Run | Loop, ...]) -> tuple[Run | Loop, ...]:
        return tuple(
            change(item) if isinstance(item, Run) else replace(item, body=walk(item.body))
            for item in body
        )

    return replace(program, plan=walk(program.plan))


def _plan_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    one = program.plan[0]
    if isinstance(one, Run):
        new: Run | Loop = replace(one, section=rng.choice((-1, 0, len(program.sections))))
    else:
        change = rng.choice(
            (
                {"count": "nobody"},
                {"count": -1},
                {"count": 0},
                {"count": 3},
                {"count": "m"},
                {"by": "i"},
                {"by": "j"},
                {"var": "j"},
            )
        )
        new = replace(one, **change)
    return replace(program, plan=(new, *program.plan[1:]))


def _params_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    one, two = program.params
    change = rng.choice(
        (
            (replace(one, highest=one.highest + 1), two),
            (replace(one, lowest=-1), two),
            (replace(one, lowest=9), two),
            (one, replace(two, values=rng.randint(0, 3))),
            (one, replace(two, highest=3)),
            (one, one),
            (one,),
        )
    )
    return replace(program, params=change)


def _memory_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    index = rng.randrange(len(program.image))
    one = program.image[index]
    change = rng.choice(
        (
            {"word": one.word + rng.choice((-1, 1, 5, -90, 5000))},
            {"slice": rng.randint(-1, chip.slices)},
            {"data": one.data[:, :5]},
            {"data": one.data[:0]},
            {"data": one.data.view(np.int8)},
        )
    )
    image = (*program.image[:index], replace(one, **change), *program.image[index + 1 :])
    if rng.random() < 0.5:
        word, count = rng.choice(((0, 1), (200, 5), (chip.words - 90, 60), (41, 2), (42, 2)))
        return replace(program, used=(("state", rng.randint(-1, 3), word, count),))
    return replace(program, image=image)


def _ports_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    index = rng.randrange(2)
    one = program.ports[index]
    vector = one.vectors[0]
    change = rng.choice(
        (
            {"rows": rng.choice((0, 1, 700, 2000))},
            {"direction": "up"},
            {"name": "y"},
            {"vectors": (replace(vector, word=rng.choice((-1, 0, 1, chip.words))),)},
            {"vectors": (replace(vector, slices=(0, 99)),)},
            {"vectors": (replace(vector, slices=()),)},
            {"features": one.features - np.int32(rng.randint(0, 2))},
            {"features": one.features[:, 1:]},
        )
    )
    ports = [*program.ports]
    ports[index] = replace(one, **change)
    return replace(program, ports=tuple(ports))


def _maps_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    maps = program.maps.copy()
    for _ in range(4):
        maps[rng.randrange(_MAPS), rng.randrange(chip.lanes)] = rng.randrange(-1, chip.lanes)
    if rng.random() < 0.2:
        maps[0, 0] = rng.choice((-2, chip.lanes))
    return replace(program, maps=maps if rng.random() < 0.8 else maps[: rng.randint(0, _MAPS)])


def _form_changed(rng: random.Random, program: Program, chip: Chip) -> Program:
    number = rng.randrange(len(program.sections))
    before = program.sections[number]
    if not before.issues or rng.random() < 0.1:
        return replace(program, chip="another")
    sections = [*program.sections]
    sections[number] = _form(rng, before, chip)
    return replace(program, sections=tuple(sections))


_RARE: dict[str, Callable[[random.Random, Program, Chip], Program]] = {
    "bases": _bases_changed,
    "other bases": _bases_changed,
    "plan": _plan_changed,
    "parameters": _params_changed,
    "memory": _memory_changed,
    "ports": _ports_changed,
    "maps": _maps_changed,
    "form": _form_changed,
}
