"""In: small programs. Out: Step does to memory what isa says, and counts what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from random_programs import issue, section
from random_sections import TINY

from openlpu import cost, isa
from openlpu.asm.binary import encode
from openlpu.check import check
from openlpu.chip import Chip
from openlpu.errors import MachineError, RequestError
from openlpu.program import Base, Issue, Loop, Param, Port, Program, Run, Segment, Vector
from openlpu.sim import Result, Step, ports

LANES = TINY.lanes
UNITS = isa.units(TINY)
A = TINY.streams
E0, E2, E4 = 16, 18, 20  # slices at positions 11, 12, 13
LAST = 1 << 15
NOISE = np.random.default_rng(7).integers(0, 256, (32, 128, LANES), np.uint8)


def program(issues: Sequence[Issue], cycles: int, **rest: object) -> Program:
    """One section on slices whose first 128 words are NOISE."""
    image = tuple(Segment(s, 0, NOISE[s], "noise") for s in range(TINY.slices))
    maps = np.zeros((0, LANES), np.int16)
    plain = Program("tiny", (section("s", cycles, issues),), (Run(0),), (), maps, image, ())
    return replace(plain, **rest)  # type: ignore[arg-type]


def step(one: Program, chip: Chip = TINY, **params: tuple[int, ...]) -> Step:
    """The machine after a step, whose counters are those that cost says."""
    check(one, chip)
    machine = Step(one, chip)
    assert machine.run(params).counters == cost.count(one, chip, params)
    return machine


def arriving(x: int, t: int, streams: Sequence[int], word: int = 0) -> list[Issue]:
    """Reads of slices 0, 1, ... that stand on the streams at position x at t."""
    found = []
    for s, stream in enumerate(streams):
        away = abs(TINY.mem_position(s) - x)
        found.append(
            issue(s, "read", t - away - TINY.latency.mem_read, 1, 1, word=word, dst=stream)
        )
    return found


def leaving(x: int, t: int, streams: Sequence[int], word: int = 500) -> list[Issue]:
    """Writes into east slices 16, 18, ..., two apart, of what stands on streams at x at t."""
    found = []
    for j, stream in enumerate(streams):
        s = E0 + j
        at = t + abs(TINY.mem_position(s) - x)
        found.append(issue(s, "write", at, word=word, src=stream, take=1))
    return found


# -- MEM


def test_gather_takes_each_lane_from_its_own_word() -> None:
    image = NOISE.copy()
    offsets = np.array([(-1, 0, 1, 5, 300, -700, 9, 8)[l % 8] for l in range(LANES)], np.int16)
    image[0, 0], image[1, 0] = offsets.view(np.uint8).reshape(-1, 2).T
    issues = [
        *arriving(11, 10, (A, A + 1)),
        issue(E0, "gather", 10, word=20, dst=A + 2, map=A, take=1, limit=7),
        issue(E2, "write", 14, word=500, src=A + 2, take=1),
    ]
    segments = tuple(Segment(s, 0, image[s], "noise") for s in range(TINY.slices))
    memory = step(program(issues, 15, image=segments)).memory
    wanted = [
        image[E0, 20 + min(offset, 7), lane] if offset >= 0 else 0
        for lane, offset in enumerate(offsets.tolist())
    ]
    assert memory[E2, 500].tolist() == wanted


def test_scatter_writes_each_lane_to_its_own_word() -> None:
    image = NOISE.copy()
    offsets = np.array([(-1, 0, 1, 5, 300, -700, 9, 8)[l % 8] for l in range(LANES)], np.int16)
    image[0, 0], image[1, 0] = offsets.view(np.uint8).reshape(-1, 2).T
    issues = [
        *arriving(11, 10, (A, A + 1, A + 2)),
        issue(E0, "scatter", 10, word=20, src=A + 2, map=A, take=1, limit=7),
    ]
    segments = tuple(Segment(s, 0, image[s], "noise") for s in range(TINY.slices))
    memory = step(program(issues, 11, image=segments)).memory
    wanted = image[E0].copy()
    for lane, offset in enumerate(offsets.tolist()):
        if offset >= 0:
            wanted[20 + min(offset, 7), lane] = image[2, 0, lane]
    assert (memory[E0, :128] == wanted).all()


@pytest.mark.parametrize(
    ("number", "base"), [(5, 5), (40, 30), (30, 30), (0, 0), (-1, -1), (-300, -1), (LAST - 1, 30)]
)
def test_setbase_cuts_what_it_reads(number: int, base: int) -> None:
    image = NOISE.copy()
    image[0, 0, 6:8] = np.array([number], "<i2").view(np.uint8)
    issues = [
        *arriving(11, 10, (A,)),
        issue(1, "read", 6, dst=A + 3),
        issue(E0, "setbase", 10, reg=5, lane=6, limit=30, src=A, take=1),
        issue(E0, "write", 11, word=60, base=5, src=A + 3, take=1),
        issue(E0, "read", 12, word=70, base=5, dst=A),
        issue(E2, "write", 16, word=500, src=A, take=1),
    ]
    segments = tuple(Segment(s, 0, image[s], "noise") for s in range(TINY.slices))
    memory = step(program(issues, 17, image=segments)).memory
    wanted = image[E0].copy()
    if base >= 0:
        wanted[60 + base] = image[1, 0]
    assert (memory[E0, :128] == wanted).all()
    read = wanted[70 + base] if base >= 0 else np.zeros(LANES)
    assert (memory[E2, 500] == read).all()


@pytest.mark.parametrize("late", [0, 1])
def test_a_read_sees_writes_that_are_done(late: int) -> None:
    chip = replace(TINY, latency=replace(TINY.latency, mem_write=4))
    other_bank = TINY.words_per_bank
    issues = [
        *arriving(11, 10, (A,)),
        issue(E0, "write", 10, word=3, src=A, take=1),
        issue(E0, "read", 13 + late, word=3, dst=A + 1),
        issue(E2, "write", 17 + late, word=other_bank, src=A + 1, take=1),
    ]
    memory = step(program(issues, 30), chip).memory
    assert (memory[E2, other_bank] == (NOISE[0, 0] if late else NOISE[E0, 3])).all()


def test_bases_move_with_loops_and_parameters() -> None:
    """A copy whose source goes down and whose target goes up; -1 turns it off in the end."""
    issues = [
        issue(0, "read", 0, word=1, base=1, dst=A),
        issue(E0, "write", 5, word=500, base=2, src=A, take=1),
    ]
    bases = (Base(0, 1, 2, (("i", -1), ("j", 40))), Base(E0, 2, 0, (("i", 1), ("j", 10))))
    plan = (Loop("j", 2, (Loop("i", "n", (Run(0, bases),), "j"),)),)
    one = program([*issues], 6, plan=plan, params=(Param("n", 2, 0, 4),))
    memory = step(one, n=(4, 2)).memory
    wanted = np.zeros((12, LANES), np.uint8)
    wanted[:3] = NOISE[0, [3, 2, 1]]
    wanted[10:] = NOISE[0, [43, 42]]
    assert (memory[E0, 500:512] == wanted).all()


# -- MXM


def matrix(row: int, mode: int, words: int = 0) -> np.ndarray:
    """What two loads of 16 slices make of a plane's buffer [lane, column]."""
    loaded = np.concatenate([NOISE[:16, words], NOISE[:16, words + 1]])
    if mode:
        loaded = loaded >> 4 if mode in (2, 4) else loaded & 15
    numbers = loaded.view(np.int8).astype(np.int64) - (8 if mode >= 3 else 0)
    return numbers if row else numbers.T


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("mode", isa.Mode)
@pytest.mark.parametrize("plane", [0, 3])
def test_products_of_a_plane(row: int, mode: int, plane: int) -> None:
    """Two loads, two acts that add up, one that does not; all four bytes come out."""
    first = UNITS.load + 3 * plane
    x = TINY.mxm_position(plane)
    stream, out, base = (0, A + 20, 20) if x == 0 else (A, 20, 4)
    issues = []
    for s in range(16):
        t = 25 - abs(TINY.mem_position(s) - x) - TINY.latency.mem_read
        issues.append(issue(s, "read", t, 2, 1, word=0, step=1, dst=stream + s))
        issues.append(issue(s, "read", t + 5, 3, 1, word=10, step=1, dst=stream + s))
    issues += [
        issue(first, "load", 25, 2, 1, src=stream, row=row, mode=mode, step=1),
        issue(first, "install", 27),
        issue(first + 1, "act", 30, slot=9, src=stream + 4),
        issue(first + 1, "act", 31, slot=9, src=stream + 5, take=1, add=1),
        issue(first + 1, "act", 32, slot=8, src=stream + 6, take=1),
        issue(first + 2, "out", 38, 2, 1, slot=8, step=1, dst=out),
    ]
    for j in range(4):
        s = base + j
        at = 39 + abs(TINY.mem_position(s) - x)
        issues.append(issue(s, "write", at, 2, 1, word=500, step=1, src=out + j, take=1))
    memory = step(program(issues, 80)).memory
    weights = matrix(row, mode)
    acts = [NOISE[4, 10], NOISE[5, 11], NOISE[6, 12]]
    rows = [act.view(np.int8).astype(np.int64) @ weights for act in acts]
    found = np.ascontiguousarray(np.moveaxis(memory[base : base + 4, 500:502], 0, 2)).view("<i4")
    assert found[0, :, 0].tolist() == rows[2].tolist()
    assert found[1, :, 0].tolist() == (rows[0] + rows[1]).tolist()


def test_an_act_sees_the_install_before_it() -> None:
    """The first act after a second install still sees the first weights, the next the second."""
    chip = replace(TINY, latency=replace(TINY.latency, mxm_install=3))
    issues = []
    for s in range(16):
        t = 25 - TINY.mem_position(s) - TINY.latency.mem_read
        issues.append(issue(s, "read", t, 2, 3, word=0, step=1, dst=s))
    value = issue(20, "read", 31 - TINY.mem_position(20) - 3, 2, 1, word=10, step=1, dst=20)
    first = UNITS.load
    issues += [
        value,
        issue(first, "load", 25, 2, 3),
        issue(first, "install", 26),
        issue(first, "install", 29),
        issue(first + 1, "act", 31, 2, 1, step=1, src=20, take=1),
        issue(first + 2, "out", 38, 2, 1, step=1, dst=A),
        *(issue(E0 + j, "write", 50 + j // 2, 2, 1, word=500, step=1, src=A + j) for j in range(4)),
    ]
    memory = step(program(issues, 80), chip).memory
    found = np.ascontiguousarray(np.moveaxis(memory[E0 : E0 + 4, 500:502], 0, 2)).view("<i4")
    old = np.zeros((LANES, LANES), np.int64)
    old[:, :16] = NOISE[:16, 0].view(np.int8).T
    new = old.copy()
    new[:, :16] = NOISE[:16, 1].view(np.int8).T
    rows = NOISE[20, 10:12].view(np.int8).astype(np.int64)
    assert found[0, :, 0].tolist() == (rows[0] @ old).tolist()
    assert found[1, :, 0].tolist() == (rows[1] @ new).tolist()


# -- SXM and VXM


@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("amount", [0, 1, -1, 15, 16, -17, 31, 32, -40, 1023])
@pytest.mark.parametrize("op", ["shift", "rotate"])
def test_moves_by_an_amount(op: str, amount: int, wide: int) -> None:
    streams = range(4) if wide else range(1)
    t = 15 + isa.latency(TINY, isa.KINDS[op])
    issues = [
        *arriving(1, 15, list(streams)),
        issue(UNITS.sxm, op, 15, src=0, dst=A, wide=wide, take=1, amount=amount),
        *leaving(1, t, [A + j for j in streams]),
    ]
    memory = step(program(issues, 50)).memory
    for j in streams:
        row = NOISE[j, 0].tolist()
        if op == "shift":
            wanted = [row[l - amount] if 0 <= l - amount < LANES else 0 for l in range(LANES)]
        else:
            wanted = [row[l // 16 * 16 + (l + amount) % 16] for l in range(LANES)]
        assert memory[E0 + j, 500].tolist() == wanted


@pytest.mark.parametrize("op", ["permute", "distribute"])
def test_moves_by_a_map(op: str) -> None:
    lanes = list(range(LANES))[::-1] if op == "permute" else [l // 16 * 16 + 3 for l in range(32)]
    lanes[5] = -1
    issues = [
        *arriving(1, 15, (0,)),
        issue(UNITS.sxm + 2, op, 15, src=0, dst=A, take=1, map=0),
        *leaving(1, 15 + isa.latency(TINY, isa.KINDS[op]), (A,)),
    ]
    memory = step(program(issues, 50, maps=np.array([lanes], np.int16))).memory
    assert memory[E0, 500].tolist() == [0 if l < 0 else NOISE[0, 0, l] for l in lanes]


def test_transpose() -> None:
    issues = [
        *arriving(1, 15, range(16)),
        issue(UNITS.sxm, "transpose", 15, src=0, dst=A + 16),
        *leaving(1, 15 + TINY.latency.sxm_transpose, range(A + 16, A + 32)),
    ]
    memory = step(program(issues, 70)).memory
    for j in range(16):
        wanted = [NOISE[lane % 16, 0, lane // 16 * 16 + j] for lane in range(LANES)]
        assert memory[E0 + j, 500].tolist() == wanted


@pytest.mark.parametrize(("source", "width"), isa.SOURCE_WIDTH.items())
def test_operands_and_results_have_bytes(source: isa.Source, width: int) -> None:
    """A sign-extended operand, plus a constant, on both sides, low byte first."""
    fields = {"a_from": source, "a_at": 2 * A + 1, "b_from": isa.Source.IMM, "imm": 1 << 20}
    issues = [
        *arriving(10, 10, range(A, A + width)),
        issue(UNITS.vxm, "add", 10, width=width, west=1 + width, east=1 + width, **fields),
        *leaving(10, 11, range(A + width, A + 2 * width)),
        *(issue(j, "write", 12 + j // 2, word=500, src=width + j, take=1) for j in range(width)),
    ]
    memory = step(program(issues, 40)).memory
    numbers = np.ascontiguousarray(NOISE[:width, 0].T).view(f"<i{width}")[:, 0].astype(np.int64)
    wanted = ((numbers + (1 << 20)) & 0xFFFFFFFF).astype("<u4").view(np.uint8).reshape(-1, 4).T
    assert (memory[E0 : E0 + width, 500] == wanted[:width]).all()
    assert (memory[:width, 500] == wanted[:width]).all()


def test_a_tap_gives_what_was_delivered_then() -> None:
    """ALU 0 delivers 1, 2, 3, ...; ALU 1 adds what came 0 and 3 cycles ago."""
    first = UNITS.vxm
    taps = {"a_from": isa.Source.TAP, "b_from": isa.Source.TAP, "a_at": 0, "b_at": 3}
    issues = [
        *(issue(first, "mov", t, a_from=isa.Source.IMM, imm=t + 1) for t in range(10)),
        issue(first + 1, "add", 8, width=1, east=1, **taps),
        *leaving(10, 9, (A,)),
    ]
    assert (step(program(issues, 20)).memory[E0, 500] == 8 + 5).all()


# -- ports, steps, counters, errors


def port(direction: str, slices: tuple[int, ...], rows: int = 2) -> Port:
    """Two vectors that hold elements 0 .. 39; element 3 stands in two lanes, some lanes empty."""
    features = np.full((2, LANES), -1, np.int32)
    features[0] = np.arange(LANES)
    features[1, :9] = [*range(32, 40), 3]
    vectors = (Vector(slices, 600, 2), Vector(slices, 601, 2))
    return Port("p", direction, rows, vectors, features)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_ports_carry_rows(kind: type) -> None:
    one = Step(program([], 1, ports=(port("in", (3, 1, 9, 20)),)), TINY)
    rows = NOISE[0, :10].reshape(-1).view(np.int32)[:80].reshape(2, 40).view(kind)
    data = ports.to_lanes(one.program.port("p"), rows)
    assert data.shape == (2, 2, 4, LANES)
    one.write("p", data)
    assert (one.read("p") == data).all()
    back = ports.from_lanes(one.program.port("p"), one.read("p"), kind, 40)
    assert back.dtype == kind
    assert (back.view(np.int32) == rows.view(np.int32)).all()
    low_byte = rows.view(np.int32) & 255
    assert (one.memory[3, 602, :] == low_byte[1, :32]).all()
    assert one.memory[3, 603, 8] == low_byte[1, 3]
    assert not one.memory[3, 603, 9:].any()


def test_ports_of_fewer_bytes_are_signed() -> None:
    one = port("out", (4, 5))
    rows = np.arange(-40, 40, dtype=np.int32).reshape(2, 40) * 800
    assert (ports.from_lanes(one, ports.to_lanes(one, rows), np.int32, 40) == rows).all()


def test_ports_refuse_what_does_not_fit() -> None:
    one = Step(program([], 1, ports=(port("out", (4, 5)),)), TINY)
    data = np.zeros((2, 2, 2, LANES), np.uint8)
    with pytest.raises(RequestError, match="no port 'p' of direction in"):
        one.write("p", data)
    with pytest.raises(RequestError, match="'q'"):
        one.read("q")
    with pytest.raises(RequestError, match=r"takes uint8 \[2, 2, 2, 32\]"):
        ports.write(one.memory, one.program.port("p"), data[:1])
    with pytest.raises(RequestError, match="2 bytes"):
        ports.to_lanes(one.program.port("p"), np.zeros((2, 40), np.float32))
    with pytest.raises(RequestError, match="element 39"):
        ports.to_lanes(one.program.port("p"), np.zeros((2, 39), np.int32))
    with pytest.raises(RequestError, match="rows"):
        ports.to_lanes(one.program.port("p"), np.zeros((3, 40), np.int32))
    with pytest.raises(RequestError, match="no float32"):
        ports.from_lanes(one.program.port("p"), data, np.float32, 40)


def test_memory_lives_from_step_to_step() -> None:
    issues = [
        issue(0, "read", 0, word=5, dst=A),
        issue(E0, "write", 5, word=5, src=A, take=1),
        issue(E0, "read", 0, word=5, dst=0),
        issue(0, "write", 5, word=5, src=0, take=1),
    ]
    machine = Step(program(issues, 6), TINY)
    for place in (0, E0):
        machine.run({})
        assert (machine.memory[E0, 5] == NOISE[place, 5]).all()
    assert (machine.memory[:, :128] == NOISE).all()


def test_counters_by_hand() -> None:
    """A value taken after 2 registers, one lost after 11, one after none; twice over."""
    issues = [
        issue(0, "read", 0, dst=A),
        issue(E0, "write", 5, src=A, take=1),
        issue(0, "read", 5, dst=A),
        issue(0, "read", 20, 2, 1, dst=A),
        issue(1, "write", 23, 2, 1, src=A, take=1),
    ]
    one = program(issues, 26, plan=(Loop("i", "n", (Run(0),)),), params=(Param("n", 1, 0, 2),))
    machine = Step(one, TINY)
    counters = {"cycles": 52, "hops": 26, "issue.read": 8, "issue.write": 6}
    assert machine.run({"n": (2,)}) == Result(52, counters)
    assert cost.count(one, TINY, {"n": (2,)}) == counters
    assert machine.run({"n": (0,)}) == Result(0, {"cycles": 0, "hops": 0})
    assert cost.count(one, TINY, {"n": (0,)}) == {"cycles": 0, "hops": 0}


def test_energy_is_events_times_their_energy() -> None:
    counters = {"cycles": 9, "hops": 10, "issue.act": 2, "issue.load": 3, "issue.install": 1}
    counters |= {"issue.fadd": 4, "issue.mul": 5, "issue.read": 6, "issue.gather": 1}
    counters |= {"issue.scatter": 7, "issue.shift": 1, "issue.transpose": 1, "issue.out": 1}
    found = cost.energy_pj(counters, 11, TINY)
    energy = TINY.energy_pj
    bytes_loaded = 3 * 16 * LANES + LANES * LANES + 4 * LANES
    assert found == {
        "mac": energy.mac * 2 * LANES * LANES,
        "alu_int": 0.0,
        "alu_mul": energy.alu_mul * 5 * LANES,
        "alu_float": energy.alu_float * 4 * LANES,
        "alu_convert": 0.0,
        "alu_divide": 0.0,
        "mem_read_byte": energy.mem_read_byte * 7 * LANES,
        "mem_write_byte": energy.mem_write_byte * 7 * LANES,
        "stream_hop_byte": energy.stream_hop_byte * 10 * LANES,
        "load_byte": energy.load_byte * bytes_loaded,
        "permute_byte": energy.permute_byte * 20 * LANES,
        "fetch_byte": energy.fetch_byte * 11,
    }


def test_every_run_fetches_its_texts() -> None:
    one = program(
        [issue(E0, "read", 0, dst=A)],
        9,
        plan=(Loop("i", "n", (Run(0),)),),
        params=(Param("n", 1, 0, 3),),
    )
    (text,) = encode(one.sections[0], TINY).values()
    for n in (0, 3):
        assert cost.fetched_bytes(one, TINY, {"n": (n,)}) == n * len(text)
    with pytest.raises(RequestError):
        cost.fetched_bytes(one, TINY, {"n": (4,)})


def test_an_error_names_its_place() -> None:
    machine = Step(program([issue(E0, "write", 4, word=7, src=A, take=1)], 9), TINY)
    wanted = (
        "section 's', cycle 4, mem.e0, write(word=7, step=0, base=0, src=32, take=1): "
        "stream 32 is empty at position 11"
    )
    with pytest.raises(MachineError) as caught:
        machine.run({})
    assert str(caught.value) == wanted


def test_parameters_are_checked() -> None:
    one = program([], 5, params=(Param("n", 1, 0, 2),))
    for values in ({}, {"n": (3,)}, {"n": (1, 1)}, {"m": (1,)}):
        with pytest.raises(RequestError):
            Step(one, TINY).run(values)
        with pytest.raises(RequestError):
            cost.count(one, TINY, values)


def test_one_section_can_run_alone() -> None:
    """With bases given by hand; the plan is not asked."""
    issues = [
        issue(0, "read", 0, word=1, base=1, dst=A),
        issue(E0, "write", 5, word=500, src=A, take=1),
    ]
    machine = Step(program(issues, 6, plan=()), TINY)
    machine.run_section(0, {(0, 1): 30})
    assert (machine.memory[E0, 500] == NOISE[0, 31]).all()
    with pytest.raises(MachineError, match="base register 1 holds nothing"):
        machine.run_section(0, {})
    with pytest.raises(MachineError, match="leaves its bank"):
        machine.run_section(0, {(0, 1): 1023})
