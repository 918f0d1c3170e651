"""In: programs, legal and damaged. Out: check says what Step finds, rule by rule and at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from random_programs import damaged, issue, params, random_program, section
from random_sections import TINY

from openlpu import cost, isa
from openlpu import program as programs
from openlpu.check import check
from openlpu.chip import Chip
from openlpu.errors import MachineError, ProgramError
from openlpu.program import Base, Issue, Loop, Param, Port, Program, Run, Segment, Vector
from openlpu.sim import Step

SEEDS = 380
SLOW = replace(
    TINY,
    latency=replace(TINY.latency, mem_write=3, base_load=3, mxm_load=3, mxm_install=4),
    repeats=1,
    history_cycles=4,
)
UNITS = isa.units(TINY)
VXM, SXM = UNITS.vxm, UNITS.sxm
LOAD, ACT, OUT = (UNITS.load + part for part in range(3))  # plane 0, at position 0
W0, W2, E0, E1, E2 = 0, 2, 16, 17, 18  # slices at positions 9, 8, 11, 11, 12
A = TINY.streams  # the first eastward stream
# Maps: one that leaves superlanes, one that uses lanes often.
PAIR = np.stack([np.roll(np.arange(32), 1), np.arange(32) // 16 * 16 + 3]).astype(np.int16)


def program(issues: Sequence[Issue], cycles: int, **rest: object) -> Program:
    """One section, run once, if nothing else is said."""
    plain = Program("tiny", (section("s", cycles, issues),), (Run(0),), (), PAIR, (), ())
    return replace(plain, **rest)  # type: ignore[arg-type]


def verdict(one: Program, chip: Chip) -> tuple[str, str]:
    """What check and Step say; "" if nothing. Step runs with the highest parameters."""
    said = []
    try:
        check(one, chip)
        said.append("")
    except ProgramError as error:
        said.append(str(error))
    try:
        Step(one, chip).run(params(random.Random(0), one, True))
        said.append("")
    except MachineError as error:
        said.append(str(error))
    assert "\n" not in "".join(said)
    return said[0], said[1]


# -- at random


def compare(one: Program, chip: Chip, what: str, rng: random.Random) -> bool:
    """check accepts <=> Step runs; and then counters and cycles are what was predicted."""
    by_check, by_step = verdict(one, chip)
    assert bool(by_check) == bool(by_step), f"{what}: check {by_check!r}, step {by_step!r}"
    if by_check:
        return False
    values = params(rng, one, rng.random() < 0.5)
    result = Step(one, chip).run(values)
    assert cost.count(one, chip, values) == result.counters, what
    assert programs.cycles(one, values) == result.cycles == result.counters["cycles"], what
    return True


def test_check_accepts_what_step_runs() -> None:
    """Random programs, and each of them damaged twice."""
    accepted, refused, issued = Counter[str](), Counter[str](), Counter[str]()
    for seed in range(SEEDS):
        rng = random.Random(seed)
        one, chip = random_program(seed)
        assert compare(one, chip, f"random_program({seed})", rng), seed
        issued.update(cost.count(one, chip, params(rng, one, True)))
        for turn in (2 * seed, 2 * seed + 1):
            hurt, kind = damaged(turn, one, chip)
            what = f"damaged({turn}, *random_program({seed})), {kind}"
            (accepted if compare(hurt, chip, what, rng) else refused)[kind] += 1
    print(f"damaged: {accepted.total()} legal {dict(accepted)}")
    print(f"damaged: {refused.total()} illegal {dict(refused)}")
    assert SEEDS / 2 < accepted.total() < 3 * SEEDS / 2, "damage is too mild or too hard"
    kinds = {kind.name for kind in isa.KINDS.values() if kind.unit not in ("icu", "c2c")}
    assert {f"issue.{name}" for name in kinds} <= set(issued), "some instruction never came"


# -- rule by rule


class Case(NamedTuple):
    """A rule: what keeps it, what breaks it, and what check says then."""

    name: str
    legal: Program
    illegal: Program
    message: str
    chip: Chip = TINY


def read(queue: int, t: int, dst: int, **rest: int) -> Issue:
    return issue(queue, "read", t, dst=dst, **rest)


def write(queue: int, t: int, src: int, take: int = 1, **rest: int) -> Issue:
    return issue(queue, "write", t, src=src, take=take, **rest)


def alu(t: int, op: str = "mov", number: int = 0, **rest: int) -> Issue:
    """An operation on immediates, if nothing else is said."""
    rest = {f"{letter}_from": isa.Source.IMM for letter in "abc"[: isa.ALU[op].operands]} | rest
    return issue(VXM + number, op, t, **rest)


def act(t: int, slot: int = 2, add: int = 0) -> Issue:
    return issue(ACT, "act", t, slot=slot, src=20, take=1, add=add)


def twice(t: int, end: int) -> list[Issue]:
    """Two reads of e0 until `end`, and two writes of it from t on; values come from the west."""
    values = [read(W0, t - 5 + i, A + 8) for i in (0, 1)]
    reads = issue(E0, "read", end - 1, 2, word=1024, dst=A + 9)
    return [*values, reads, issue(E0, "write", t, 2, src=A + 8, take=1)]


def sixteen(t: int, first: int = 0) -> list[Issue]:
    """Reads of slices w0 .. w15 that stand on 16 streams at position 0 at t."""
    return [read(s, t - TINY.mem_position(s) - TINY.latency.mem_read, first + s) for s in range(16)]


def installed(t: int, load: int = 15, rest: Sequence[Issue] = ()) -> list[Issue]:
    """A load of plane 0 at `load`, an install at t, and what else is wanted."""
    return [*sixteen(load), issue(LOAD, "load", load), issue(LOAD, "install", t), *rest]


def acted(*rest: Issue, t: int = 24) -> list[Issue]:
    """An act into slot 2 at t of a plane that is installed."""
    value = read(W0, t - 12, 20)
    return installed(18, rest=(value, act(t), *rest))


def set_base(t: int, reg: int = 4, limit: int = 9) -> list[Issue]:
    """setbase in e0 at t."""
    return [
        read(W0, t - 5, A + 7),
        issue(E0, "setbase", t, reg=reg, limit=limit, src=A + 7, take=1),
    ]


def loops(value: int, stride: int, word: int = 1000, **bases: int) -> Program:
    """A read whose base moves with a loop that a parameter counts."""
    base = replace(Base(W0, 1, value, (("i", stride),)), **bases)
    plan = (Loop("i", "n", (Run(0, (base,)),)),)
    one = program([read(W0, 0, A, word=word, base=1)], 20)
    return replace(one, plan=plan, params=(Param("n", 1, 0, 4),))


def gather(limit: int, word: int = 1000, take: int = 1) -> Program:
    maps = [read(W0, 0, A), read(1, 0, A + 1)]
    one = issue(E0, "gather", 5, word=word, dst=A + 2, map=A, take=take, limit=limit)
    return program([*maps, one], 25)


def port(**changes: object) -> Program:
    features = np.arange(32, dtype=np.int32)[None]
    one = Port("x", "in", 3, (Vector((1, 2), 2000, 20),), features)
    return program([], 1, ports=(replace(one, **changes),))  # type: ignore[arg-type]


def segments(first: int, second: int, used: int = 500) -> Program:
    data = np.zeros((10, 32), np.uint8)
    image = (Segment(3, first, data, "weights"), Segment(3, second, data, "weights"))
    return program([], 1, image=image, used=(("state", 3, used, 4),))


PUSH = read(W0, 0, A)  # at position 9 in cycle 3, at e0 in cycle 5, at the end in cycle 14

CASES = [
    Case(
        "a read finds a value",
        program([PUSH, write(E0, 5, A)], 20),
        program([PUSH, write(E0, 6, A)], 20),
        "cycle 6, mem.e0, write(word=0, step=0, base=0, src=32, take=1): stream 32: there is noth",
    ),
    Case(
        "a take ends a value",
        program([PUSH, write(E0, 5, A, 0), write(E2, 6, A)], 20),
        program([PUSH, write(E0, 5, A), write(E2, 6, A)], 20),
        "cycle 6, mem.e2",
    ),
    Case(
        "a take and a read share a cycle",
        program([PUSH, write(E0, 5, A), write(E1, 5, A, 0)], 20),
        program([PUSH, write(E0, 5, A), write(E1, 5, A, 0), write(E2, 6, A, 0)], 20),
        "there is nothing",
    ),
    Case(
        "a value meets none that arrives",
        program([read(W2, 0, A), read(W0, 2, A)], 30),
        program([read(W2, 0, A), read(W0, 1, A)], 30),
        "cycle 1, mem.w0, read(word=0, step=0, base=0, dst=32): stream 32: it meets another value",
    ),
    Case(
        "a value that was read goes on",
        program([PUSH, write(E0, 5, A), read(E2, 3, A)], 20),
        program([PUSH, write(E0, 5, A, 0), read(E2, 3, A)], 20),
        "cycle 3, mem.e2, read(word=0, step=0, base=0, dst=32): stream 32: it meets another value",
    ),
    Case(
        "two values are not put to one register",
        program([read(W0, 0, A), read(1, 0, A + 1)], 30),
        program([read(W0, 0, A), read(1, 0, A)], 30),
        "it meets another value",
    ),
    Case(
        "values run in their own direction",
        program([read(E0, 0, 0), write(W0, 5, 0)], 20),
        program([read(E0, 0, A), write(W0, 5, A)], 20),
        "there is nothing",
    ),
    Case(
        "values are gone when a section ends",
        program([PUSH], 15),
        program([PUSH], 14),
        "stream 32 holds a value at the end",
    ),
    Case(
        "results come inside the section",
        program([read(W0, 0, A), write(W0, 3, A)], 4),
        program([read(W0, 0, A)], 3),
        "its result comes after the section",
    ),
    Case(
        "writes are done when a section ends",
        program([PUSH, write(E0, 5, A)], 8),
        program([PUSH, write(E0, 5, A)], 7),
        "it is not done when the section ends",
        SLOW,
    ),
    Case(
        "one read a cycle",
        program([read(W0, 0, A), read(W0, 1, A)], 30),
        program([read(W0, 0, A), read(W0, 0, A + 1)], 30),
        "the queue issues another in this cycle",
    ),
    Case(
        "repetitions take their cycles",
        program([issue(W0, "read", 0, 3, 2, dst=A), read(W0, 3, A + 1)], 30),
        program([issue(W0, "read", 0, 3, 2, dst=A), read(W0, 4, A + 1)], 30),
        "the queue issues another in this cycle",
    ),
    Case(
        "a read and a write in different banks",
        program([PUSH, write(E0, 5, A), read(E0, 5, A, word=1024)], 30),
        program([PUSH, write(E0, 5, A), read(E0, 5, A, word=1023)], 30),
        "a write uses the same bank",
    ),
    Case(
        "a setbase is beside a read",
        program([*set_base(5), read(E0, 5, A)], 30),
        program([*set_base(5), write(E0, 5, A + 7)], 30),
        "the queue issues another in this cycle",
    ),
    Case(
        "repeats under way",
        program(
            [
                issue(W0, "read", 0, 2, 3, dst=A),
                issue(W0, "read", 4, 2, 3, dst=A),
                read(W0, 2, A),
            ],
            40,
        ),
        program([issue(W0, "read", 0, 2, 3, dst=A), issue(W0, "read", 2, 2, 3, dst=A)], 40),
        "more than 1 repetitions are under way",
        SLOW,
    ),
    Case(
        "a repeat is under way to its last cycle",
        program(twice(11, 10), 40),
        program(twice(10, 10), 40),
        "more than 1 repetitions are under way",
        SLOW,
    ),
    Case(
        "repetitions stay in the section",
        program([issue(VXM, "mov", 0, 3, 4, a_from=5)], 9),
        program([issue(VXM, "mov", 0, 3, 4, a_from=5)], 8),
        "its last repetition is not in the section",
    ),
    Case(
        "steps stay in memory",
        program([issue(W0, "read", 0, 2, 1, dst=A, word=2046, step=1)], 30),
        program([issue(W0, "read", 0, 3, 1, dst=A, word=2046, step=1)], 30),
        "word leaves 0 .. 2047",
    ),
    Case(
        "a base is set before it is used",
        program([*set_base(5), read(E0, 8, A, base=4)], 30),
        program([*set_base(5), read(E0, 7, A, base=4)], 30),
        "base register 4 holds nothing",
        SLOW,
    ),
    Case(
        "the limit of a setbase keeps the bank",
        program([*set_base(5), read(E0, 8, A, base=4, word=1014)], 30),
        program([*set_base(5), read(E0, 8, A, base=4, word=1015)], 30),
        "the word leaves its bank",
        SLOW,
    ),
    Case(
        "the old base holds until the new one does",
        program(
            [*set_base(5, 1), read(E0, 7, A, base=1, word=1000), read(E0, 8, A, base=1, word=1)],
            30,
            plan=(Run(0, (Base(E0, 1, 20),)),),
        ),
        program(
            [*set_base(5, 1), read(E0, 7, A, base=1, word=1004), read(E0, 8, A, base=1, word=1)],
            30,
            plan=(Run(0, (Base(E0, 1, 20),)),),
        ),
        "cycle 7, mem.e0, read(word=1004, step=0, base=1, dst=32): the word leaves its bank when",
        SLOW,
    ),
    Case("a run loads its bases", loops(0, 1), loops(0, 1, reg=2), "a run does not load it"),
    Case("all turns of a loop stay in the bank", loops(20, 1), loops(21, 1), "loads base 24"),
    Case("loops that go down", loops(23, -8), loops(23, -9), "is loaded with -4"),
    Case("-1 turns off", loops(-1, 0, 1023), loops(-1, 1, 1023), "loads base 2"),
    Case("-2 is no base", loops(-1, 0), loops(-2, 1), "is loaded with -2"),
    Case("maps are cut to a limit in the bank", gather(23), gather(24), "leaves its bank"),
    Case("maps are on two streams", gather(3), gather(3, take=2), "take is not in 0 .. 1"),
    Case(
        "install needs a load",
        program(installed(18), 40),
        program([issue(LOAD, "install", 18)], 40),
        "no load came since the last install",
        SLOW,
    ),
    Case(
        "install waits for the load",
        program(installed(18), 40),
        program(installed(17), 40),
        "cycle 17, mxm0.load, install(): the last load is not done",
        SLOW,
    ),
    Case(
        "a second install needs a second load",
        program(
            installed(18, rest=[issue(LOAD, "load", 19, src=16), issue(LOAD, "install", 22)])
            + [replace(one, cycle=one.cycle + 4) for one in sixteen(15, 16)],
            40,
        ),
        program(installed(18, rest=[issue(LOAD, "install", 22)]), 40),
        "no load came since the last install",
        SLOW,
    ),
    Case(
        "act waits for the install",
        program(acted(t=22), 40),
        program(acted(t=21), 40),
        "nothing is installed on the plane",
        SLOW,
    ),
    Case(
        "act adds to what is there",
        program(acted(read(W0, 13, 20), act(25, add=1)), 40),
        program(acted(read(W0, 13, 20), act(25, slot=3, add=1)), 40),
        "there is nothing to add to in its slot",
    ),
    Case(
        "out waits for the last act",
        program(acted(issue(OUT, "out", 30, slot=2)), 40),
        program(acted(issue(OUT, "out", 29, slot=2)), 40),
        "the last act on its slot is not done",
    ),
    Case(
        "out and act of a slot do not share a cycle",
        program(
            acted(issue(OUT, "out", 30, slot=2), read(W0, 19, 20), act(31)),
            40,
        ),
        program(
            acted(issue(OUT, "out", 30, slot=2), read(W0, 18, 20), act(30)),
            40,
        ),
        "the last act on its slot is not done",
    ),
    Case(
        "out reads a slot that was written",
        program(acted(issue(OUT, "out", 30, slot=2)), 40),
        program(acted(issue(OUT, "out", 30, slot=1)), 40),
        "its slot is empty",
    ),
    Case(
        "a tap finds a result",
        program([alu(0), alu(3, number=1, a_from=isa.Source.TAP, a_at=2)], 10),
        program([alu(0), alu(3, number=1, a_from=isa.Source.TAP, a_at=1)], 10),
        "operand a: the ALU delivered nothing then",
    ),
    Case(
        "a tap does not reach into the time before the section",
        program([alu(9), alu(1, number=2, a_from=isa.Source.TAP, a_at=64), alu(0, number=1)], 11),
        program([alu(9), alu(0, number=2, a_from=isa.Source.TAP, a_at=65)], 11),
        "operand a: the ALU delivered nothing then",
    ),
    Case(
        "a tap reaches as far as the history",
        program([alu(0), alu(4, number=1, a_from=isa.Source.TAP, a_at=3)], 10),
        program([alu(0), alu(5, number=1, a_from=isa.Source.TAP, a_at=4)], 10),
        "operand a: no such ALU, or no such delay",
        SLOW,
    ),
    Case(
        "an ALU delivers one result a cycle",
        program([alu(0, "mul"), alu(1)], 10),
        program([alu(0, "mul"), alu(2)], 10),
        "another result comes at the same cycle",
    ),
    Case(
        "results after the section are dropped",
        program([alu(0, "mul"), alu(2)], 3),
        program([alu(0, "mul"), alu(2)], 4),
        "another result comes at the same cycle",
    ),
    Case(
        "segments do not overlap",
        segments(20, 30),
        segments(20, 29),
        "segment 'weights' of slice 3 and segment 'weights' of slice 3 overlap",
    ),
    Case("segments are in memory", segments(0, 2038), segments(0, 2039), "are no memory"),
    Case("memory in use is empty", segments(0, 50, 60), segments(0, 50, 59), "overlaps a segment"),
    Case("ports are in memory", port(), port(rows=4), "port 'x': slice 1, words 2000 .. 2060"),
    Case("ports have rows", port(rows=1), port(rows=0), "port 'x' has 0 rows"),
    Case("ports have a direction", port(direction="out"), port(direction="io"), "no direction"),
    Case("programs have a chip", program([], 1), program([], 1, chip="x"), "is made for x"),
    Case(
        "loops count by loops around them",
        replace(loops(0, 0), plan=(Loop("i", 1, (Loop("j", "n", (), "i"),)),)),
        replace(loops(0, 0), plan=(Loop("i", 2, (Loop("j", "n", (), "i"),)),)),
        "n has fewer values than i has",
    ),
    Case(
        "bases move with loops around them",
        replace(loops(0, 0), plan=(Loop("i", 1, (Run(0, (Base(0, 1, 0, (("i", 1),)),)),)),)),
        replace(loops(0, 0), plan=(Loop("j", 1, (Run(0, (Base(0, 1, 0, (("i", 1),)),)),)),)),
        "moves by ['i'], no loops outside",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case) -> None:
    assert verdict(case.legal, case.chip) == ("", "")
    by_check, by_step = verdict(case.illegal, case.chip)
    assert case.message in by_check
    assert by_step


WELL_FORMED = {
    "shift": (SXM, {"src": 4, "dst": 8, "wide": 1, "amount": -1024}),
    "permute": (SXM, {"map": 0}),
    "distribute": (SXM, {"map": 1}),
    "transpose": (SXM, {"src": 48, "dst": 16}),
    "setbase": (0, {"reg": 7, "lane": 30, "limit": 32767}),
    "load": (LOAD, {"group": 1, "src": 48, "mode": 4}),
    "act": (ACT, {"slot": 255, "src": 63}),
    "gather": (0, {"map": 62, "limit": 0, "word": 2047}),
    "add": (
        VXM,
        {"a_from": 3, "a_at": 127 - 6, "b_from": 4, "b_at": 15 * 64 + 31}
        | {"width": 4, "east": 29},
    ),
    "fsqrt": (VXM, {"a_from": 2, "a_at": 124, "width": 2, "west": 31, "east": 31}),
    "mov": (VXM + 15, {"a_from": 5, "imm": -(1 << 31)}),
}
ILL_FORMED = [
    ("shift", {"src": 5}),
    ("shift", {"dst": 64}),
    ("shift", {"amount": 1024}),
    ("permute", {"map": 1}),
    ("permute", {"map": 2}),
    ("distribute", {"map": 0}),
    ("transpose", {"src": 8}),
    ("setbase", {"reg": 0}),
    ("setbase", {"reg": 8}),
    ("setbase", {"lane": 29}),
    ("setbase", {"lane": 32}),
    ("setbase", {"limit": 32768}),
    ("load", {"group": 2}),
    ("load", {"src": 8}),
    ("load", {"mode": 5}),
    ("act", {"slot": 256}),
    ("gather", {"map": 61}),
    ("gather", {"base": 8}),
    ("gather", {"word": 2048}),
    ("add", {"b_from": 0, "b_at": 0}),
    ("add", {"c_from": 5}),
    ("add", {"c_at": 1}),
    ("add", {"imm": 1}),
    ("add", {"a_from": 6}),
    ("add", {"a_at": 118}),
    ("add", {"b_at": 16 * 64}),
    ("add", {"b_at": 32}),
    ("add", {"width": 3}),
    ("add", {"width": 0}),
    ("add", {"east": 0}),
    ("add", {"east": 30}),
    ("fsqrt", {"west": 33}),
    ("fsqrt", {"a_at": 126}),
    ("mov", {"a_at": 1}),
    ("mov", {"imm": 1 << 31}),
]


def formed(op: str, changes: dict[str, int]) -> Program:
    """A section that never runs, so that only the form of its instruction is judged."""
    queue, fields = WELL_FORMED[op]
    return program([issue(queue, op, 0, **{**fields, **changes})], 1, plan=())


@pytest.mark.parametrize("op", WELL_FORMED)
def test_fields_in_range(op: str) -> None:
    assert verdict(formed(op, {}), TINY) == ("", "")


@pytest.mark.parametrize(("op", "changes"), ILL_FORMED, ids=str)
def test_fields_out_of_range(op: str, changes: dict[str, int]) -> None:
    assert all(verdict(formed(op, changes), TINY))


def test_streams_stay_in_their_direction() -> None:
    """Sixteen streams from 16 on, where a direction has 24."""
    chip = replace(TINY, streams=24, install_streams=8)
    assert verdict(formed("transpose", {"src": 0, "dst": 0}), chip) == ("", "")
    assert all(verdict(formed("transpose", {"src": 16, "dst": 0}), chip))
    other = replace(TINY, superlanes=4, superlane_lanes=8)
    assert all(verdict(formed("transpose", {}), other))


@pytest.mark.parametrize(
    ("queue", "op"),
    [(VXM, "read"), (ACT, "out"), (SXM, "mov"), (0, "nop"), (0, "send"), (999, "mov")],
)
def test_queues_drive_their_own_unit(queue: int, op: str) -> None:
    assert all(verdict(program([issue(queue, op, 0)], 1, plan=()), TINY))


@pytest.mark.parametrize(
    "change",
    [
        *({"count": 0}, {"period": 0}, {"cycle": -1}, {"cycle": 20}, {"tag": 1}),
        *({"op": "none"}, {"args": ()}, {"count": 1 << 70}, {"args": (1 << 70,) * 4}),
        *({"period": 2}, {"count": 2, "period": 20}),
    ],
    ids=str,
)
def test_issues_are_well_formed(change: dict[str, int]) -> None:
    one = program([], 20)
    broken = replace(one.sections[0], issues=(replace(PUSH, **change),))  # type: ignore[arg-type]
    assert all(verdict(replace(one, sections=(broken,), plan=()), TINY))


@pytest.mark.parametrize(("field", "most"), [("count", 1 << 16), ("period", (1 << 16) - 1)])
def test_repetitions_are_those_that_repeat_can_say(field: str, most: int) -> None:
    """16 bits for each; the first issue is no repetition. So what is legal can be written."""
    for value in (most, most + 1):
        pushes = replace(PUSH, **{"count": 2, "period": 1, field: value})
        said = verdict(program([pushes], 1 << 17), TINY)
        assert [field in words for words in said] == [value > most] * 2


def test_issues_are_sorted() -> None:
    one = program([read(W0, 0, A), read(1, 0, A + 1)], 20)
    turned = replace(one.sections[0], issues=one.sections[0].issues[::-1])
    assert all("not sorted" in said for said in verdict(replace(one, sections=(turned,)), TINY))


def test_what_no_run_reaches_is_not_run() -> None:
    """A section that cannot run may be wrong in time, but not in form."""
    wrong = program([write(E0, 5, A)], 20)
    assert verdict(replace(wrong, plan=()), TINY) == ("", "")
    never = (Loop("i", "n", (Run(0),)),)
    assert verdict(replace(wrong, plan=never, params=(Param("n", 1, 0, 0),)), TINY) == ("", "")
    assert all(verdict(replace(wrong, plan=never, params=(Param("n", 1, 0, 1),)), TINY))
