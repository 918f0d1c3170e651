"""In: programs. Out: Fast leaves the same memory as Step, with the same cycles and counters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import random_sections
from numpy.typing import NDArray
from random_programs import damaged, issue, params, random_program, section
from random_sections import TINY

from openlpu import cost, isa, jit
from openlpu.chip import Chip
from openlpu.errors import ChipError, MachineError, ProgramError, RequestError
from openlpu.program import Base, Issue, Loop, Param, Program, Run, Segment
from openlpu.sim import Step, native
from openlpu.sim.fast import Fast
from openlpu.sim.records import Shape
from openlpu.store import Store

WIDE = replace(TINY, superlanes=20)
KERNELS = jit.available()
FLOATS = "00000000 80000000 7f800000 ff800000 7fc00000 ffc00001 7f800001 00000001 807fffff 3f800000"
FLOATS += (
    " 4b000000 4affffff 3f000000 3fc00000 bf000000 4f000000 cf000000 4effffff cf000001 7fffffff"
)
HALVES = "00007c00 0000fc01 00000001 00008001 000003ff 00000400 ffff7bff 7e00fe00"


def demand_equal(program: Program, chip: Chip, seed: int, target: str | None = None) -> None:
    """Two steps with different parameters and input, one after the other, on both machines."""
    fast, step = Fast(program, chip, target=jit.select(target)), Step(program, chip)
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    for highest in (True, False):
        values = params(rng, program, highest)
        for port in program.ports:
            if port.direction == "in":
                shape = fast.read(port.name).shape
                data = noise.integers(0, 256, shape, np.uint8)
                fast.write(port.name, data)
                step.write(port.name, data)
        result = fast.run(values)
        assert result == step.run(values)
        if highest:
            assert result.counters == cost.count(program, chip, values)
        assert np.array_equal(fast.memory, step.memory)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_programs(first: int) -> None:
    for seed in range(first, first + 50):
        demand_equal(*random_program(seed), seed)


@pytest.mark.parametrize("target", KERNELS[1:])
def test_every_kernel_set_gives_the_same(target: str) -> None:
    for seed in range(400, 412):
        demand_equal(*random_program(seed), seed, target)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("superlanes", [1, 5, 20])
def test_other_widths(superlanes: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill no whole vectors, and rows of several."""
    monkeypatch.setattr(random_sections, "TINY", replace(TINY, superlanes=superlanes))
    for seed in range(500, 505):
        demand_equal(*random_program(seed), seed, target)


def test_what_check_accepts_runs_and_what_it_refuses_does_not() -> None:
    accepted = 0
    for seed in range(60):
        program, chip = random_program(seed)
        program, _ = damaged(seed, program, chip)
        try:
            Fast(program, chip)
        except ProgramError:
            continue
        accepted += 1
        demand_equal(program, chip, seed)
    assert 10 < accepted < 50


# -- by hand


def bring(
    chip: Chip, s: int, word: int, stream: int, x: int, at: int, count: int = 1, **rest: int
) -> Issue:
    """Reads of a slice that stand on a stream at position x from cycle `at` on."""
    away = abs(chip.mem_position(s) - x)
    fields = {"word": word, "dst": stream, "step": int(count > 1)} | rest
    return issue(s, "read", at - away - chip.latency.mem_read, count, **fields)


def keep(
    chip: Chip, s: int, word: int, stream: int, x: int, at: int, count: int = 1, step: int = 1
) -> Issue:
    """Writes of what stands on a stream at position x from cycle `at` on, where it comes by."""
    away = abs(chip.mem_position(s) - x)
    return issue(s, "write", at + away, count, word=word, step=step, src=stream, take=1)


def noise(chip: Chip, words: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (chip.slices, words, chip.lanes), np.uint8)


def whole(
    chip: Chip, parts: Sequence[Sequence[Issue]], image: NDArray[np.uint8], **rest: object
) -> Program:
    """A program that runs sections one after the other."""
    ends = [max(one.last_cycle for one in part) + 2 * chip.positions for part in parts]
    sections = tuple(section(str(i), ends[i], part) for i, part in enumerate(parts))
    maps = np.zeros((0, chip.lanes), np.int16)
    memory = tuple(Segment(s, 0, words, "noise") for s, words in enumerate(image))
    plan = tuple(Run(i) for i in range(len(parts)))
    plain = Program(chip.name, sections, plan, (), maps, memory, ())
    return replace(plain, **rest)  # type: ignore[arg-type]


def operands(rows: int) -> NDArray[np.int32]:
    """[3, rows, lanes] of bits: every pair of the odd floats, odd halves, small and any numbers."""
    odd = np.array([int(text, 16) for text in f"{FLOATS} {HALVES}".split()], np.uint32)
    random_bits = np.random.default_rng(5)
    found = random_bits.integers(0, 1 << 32, (3, rows * TINY.lanes), np.uint64).astype(np.uint32)
    pairs = np.array(np.meshgrid(odd, odd)).reshape(2, -1)
    found[:2, : pairs.shape[1]] = pairs
    small = slice(pairs.shape[1], None, 3)
    found[:, small] %= 40
    near = slice(pairs.shape[1] + 1, None, 3)  # of like size, where rounding matters
    found[:, near] = 0x3F800000 + found[:, near] % (1 << 25)
    return found.view(np.int32).reshape(3, rows, TINY.lanes)


@pytest.mark.parametrize("target", KERNELS)
def test_alu_operations(target: str) -> None:
    """Each operation, from streams to streams, on many bits; isa says what is right."""
    rows, east, x = 36, TINY.streams, TINY.vxm_position
    values = operands(rows)
    image = noise(TINY)
    for i in range(3):
        split = values[i].astype("<i4").view(np.uint8).reshape(rows, TINY.lanes, 4)
        image[4 * i : 4 * i + 4, :rows] = np.moveaxis(split, 2, 0)
    parts, places = [], {}
    for number, (name, op) in enumerate(isa.ALU.items()):
        at, fields = 30, {}
        streams = range(4 * op.operands)
        part = [bring(TINY, i, 0, east + i, x, at, rows) for i in streams]
        for i, letter in enumerate("abc"[: op.operands]):
            fields |= {f"{letter}_from": isa.Source.WORD, f"{letter}_at": (east + 4 * i) * 2 + 1}
        part.append(issue(isa.units(TINY).vxm, name, at, rows, width=4, east=17, **fields))
        done = at + isa.latency(TINY, isa.KINDS[name])
        to = places[name] = TINY.words_per_bank + number * rows
        part += [keep(TINY, 16 + b, to, east + 16 + b, x, done, rows) for b in range(4)]
        parts.append(part)
    machine = Fast(whole(TINY, parts, image), TINY, target=jit.select(target))
    machine.run({})
    for name, op in isa.ALU.items():
        words = machine.memory[16:20, places[name] : places[name] + rows]
        found = np.ascontiguousarray(np.moveaxis(words, 0, 2)).view("<i4")[..., 0]
        with np.errstate(all="ignore"):
            expected = op.compute(*values[: op.operands])
        assert np.array_equal(found, expected), name


def load(
    chip: Chip, at: int, group: int, row: int, first: int, word: int, mode: int = 0
) -> list[Issue]:
    """Loads of plane 0 from the slices first .. of the west."""
    width, x = chip.install_streams, chip.mxm_position(0)
    part = [bring(chip, (first + j) % 16, word, j, x, at) for j in range(width)]
    queue = isa.units(chip).load
    return [*part, issue(queue, "load", at, group=group, row=row, mode=mode)]


def install(chip: Chip, at: int) -> Issue:
    return issue(isa.units(chip).load, "install", at)


def multiply(chip: Chip, at: int, word: int, to: int, count: int = 1, slot: int = 0) -> list[Issue]:
    """One act after the other on a slot of plane 0, with the same row; the sums at word `to`."""
    queue, x, east = isa.units(chip).load, chip.mxm_position(0), chip.streams
    part = [bring(chip, 15, word, 31, x, at, count, step=0)]
    part.append(issue(queue + 1, "act", at, src=31, take=1, slot=slot))
    if count > 1:
        fields = {"src": 31, "take": 1, "add": 1, "slot": slot}
        part.append(issue(queue + 1, "act", at + 1, count - 1, **fields))
    out = at + count - 1 + chip.latency.mxm_dot
    part.append(issue(queue + 2, "out", out, dst=east, slot=slot))
    ready = out + chip.latency.mxm_out
    return part + [keep(chip, 16 + b, to, east + b, x, ready) for b in range(4)]


@pytest.mark.parametrize("chip", [TINY, WIDE], ids=["tiny", "wide"])
def test_tiles_by_columns_by_rows_and_mixed(chip: Chip) -> None:
    """What is not loaded again keeps its bytes, whichever way it came."""
    groups, rng = chip.lanes // chip.install_streams, random.Random(1)
    issues, at = [], 40
    turns = ["columns", "columns", "few columns", "few rows", "rows", "few rows", "both", "columns"]
    for number, turn in enumerate(turns):
        which = rng.sample(range(groups), 1 if "few" in turn else groups)
        for group in which:
            row = rng.randint(0, 1) if turn == "both" else int("rows" in turn)
            mode = rng.choice((0, 0, *isa.Mode))
            issues += load(chip, at, group, row, rng.randrange(16), rng.randrange(200), mode)
            at += 1
        issues.append(install(chip, at))
        issues += multiply(chip, at + 1, 5, 300 + 2 * number)
        issues += multiply(chip, at + 2, 6, 301 + 2 * number, slot=1)
        at += 40
    program = whole(chip, [issues], noise(chip))
    demand_equal(program, chip, 0)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("row", [0, 1])
def test_sums_of_the_extremes_wrap_around(row: int, target: str) -> None:
    chip, image = WIDE, noise(WIDE)
    image[:, :100] = 128
    loads = [load(chip, 40 + g, g, row, 0, 0) for g in range(chip.lanes // chip.install_streams)]
    at = 40 + len(loads)
    issues = [one for part in loads for one in part] + [install(chip, at)]
    count = (1 << 31) // (chip.lanes << 14) + 2
    program = whole(chip, [issues + multiply(chip, at + 1, 7, 300, count)], image)
    demand_equal(program, chip, 0, target)
    machine = Fast(program, chip, target=jit.select(target))
    machine.run({})
    found = np.ascontiguousarray(machine.memory[16:20, 300].T).view("<i4")
    assert (found == (count * chip.lanes << 14) - (1 << 32)).all()


def test_permutations_of_whole_superlanes() -> None:
    """Where neighbours stay neighbours, another way is taken."""
    lanes = np.arange(WIDE.lanes)
    turned = np.roll(lanes, 48)
    gaps = np.where(lanes // 16 % 3 == 1, -1, turned)
    reversed_ = lanes[::-1]
    nearly = np.where(lanes == 17, -1, turned)
    shifted = np.roll(lanes, 8)
    maps = np.array([turned, gaps, reversed_, nearly, shifted], np.int16)
    queue, x = isa.units(WIDE).sxm, WIDE.sxm_position(0)
    issues = []
    for i in range(len(maps)):
        done = 60 + i + WIDE.latency.sxm_across
        issues.append(bring(WIDE, 9, 50 + i, 0, x, 60 + i))
        issues.append(issue(queue, "permute", 60 + i, src=0, dst=WIDE.streams, take=1, map=i))
        issues.append(keep(WIDE, 20, 300 + i, WIDE.streams, x, done))
    image = noise(WIDE)
    program = whole(WIDE, [issues], image, maps=maps)
    demand_equal(program, WIDE, 0)
    machine = Fast(program, WIDE)
    machine.run({})
    for i, table in enumerate(maps):
        expected = np.where(table < 0, 0, image[9, 50 + i][table])
        assert np.array_equal(machine.memory[20, 300 + i], expected)


def test_a_value_on_its_way_is_not_changed_by_a_later_write() -> None:
    """The word is overwritten while what was read from it moves, or is installed in a plane; by
    the same base, by another one, and by a scatter."""
    chip, x = TINY, TINY.mxm_position(0)
    issues = []
    for group in range(2):
        issues += load(chip, 80 + group, group, 0, 0, 20 + group)
    issues += [install(chip, 82), *multiply(chip, 130, 5, 300)]
    # All slices' words 20 and 21 are overwritten a little later, from slice 31.
    issues.append(bring(chip, 31, 7, 20, x, 81))
    for s in range(1, 16, 2):
        take = int(s == 15)
        away = abs(chip.mem_position(s) - x)
        issues.append(issue(s, "write", 81 - away, word=20, src=20, take=take))
    plain = whole(chip, [issues], noise(chip))
    demand_equal(plain, chip, 0)
    for first in (1, 2):
        based = []
        for one in issues:
            if one.op == "read" and one.args[0] in (20, 21) and one.queue < 16:
                args = list(one.args)
                args[0], args[2] = args[0] - 20, 1
                one = replace(one, args=tuple(args))
            elif one.op == "write" and one.queue < 16:
                args = list(one.args)
                args[0], args[2] = args[0] - 19, first
                one = replace(one, args=tuple(args))
            based.append(one)
        bases = [Base(s, 1, 20, (("i", 1),)) for s in range(16)]
        bases += [Base(s, 2, 19, (("i", 1),)) for s in range(16)]
        loop = Loop("i", "n", (Run(0, tuple(bases)),))
        names = (Param("n", 1, 1, 3),)
        program = whole(chip, [based], noise(chip), plan=(loop,), params=names)
        demand_equal(program, chip, 0)


def test_what_takes_several_cycles_is_seen_from_its_cycle_on() -> None:
    """A write, a base and an install, looked at in every cycle around the first that sees them."""
    latency = replace(TINY.latency, mem_write=4, base_load=5, mxm_install=6)
    chip = replace(TINY, latency=latency)
    x = chip.mem_position(0)
    write = [bring(chip, 9, 7, chip.streams, x, 40)]
    write.append(issue(0, "write", 40, word=20, src=chip.streams, take=1))
    write.append(issue(0, "read", 41, 9, word=20, dst=chip.streams + 1))
    write.append(keep(chip, 20, 300, chip.streams + 1, x, 41 + latency.mem_read, 9))
    base = [bring(chip, 9, 7, chip.streams, x, 40)]
    base.append(issue(0, "setbase", 40, reg=1, lane=4, limit=90, src=chip.streams, take=1))
    base.append(issue(0, "read", 38, 12, word=100, base=1, dst=chip.streams + 1))
    base.append(keep(chip, 20, 320, chip.streams + 1, x, 38 + latency.mem_read, 12))
    image = noise(chip)
    image[9, 7, 4:6] = 17, 0
    queue = isa.units(chip).load
    acts = [*load(chip, 40, 0, 0, 0, 3), install(chip, 41), *load(chip, 47, 0, 0, 0, 4)]
    acts += [install(chip, 48), bring(chip, 24, 9, 31, 0, 47, 12, step=0)]
    acts.append(issue(queue + 1, "act", 47, 12, step=1, src=31, take=1))
    acts.append(issue(queue + 2, "out", 80, 12, step=1, dst=chip.streams))
    for b in range(4):
        ready = 80 + latency.mxm_out
        acts.append(keep(chip, 16 + b, 340, chip.streams + b, 0, ready, 12))
    plan = (Run(0), Run(1, (Base(0, 1, 3),)), Run(2))
    program = whole(chip, [write, base, acts], image, plan=plan)
    demand_equal(program, chip, 0)
    machine = Fast(program, chip)
    machine.run({})
    seen = machine.memory[20, 300:309] == image[9, 7]
    assert seen.all(axis=1).tolist() == [False] * 3 + [True] * 6
    based = [103] * 7 + [117] * 5
    assert np.array_equal(machine.memory[20, 320:332], image[0, based])
    sums = machine.memory[16:20, 340:352]
    assert len(np.unique(sums, axis=1)[0]) == 2
    assert (sums[:, :7] == sums[:, :1]).all()
    assert (sums[:, 7:] == sums[:, 7:8]).all()


def test_a_step_begins_with_empty_planes() -> None:
    """What an earlier section or step loaded is not there: groups that are not loaded are zero."""
    chip = TINY
    full = [*load(chip, 40, 0, 0, 0, 3), *load(chip, 41, 1, 0, 0, 4), install(chip, 42)]
    half = [*load(chip, 40, 1, 1, 0, 9), install(chip, 41)]
    parts = [full + multiply(chip, 43, 5, 300), half + multiply(chip, 42, 5, 301)]
    demand_equal(whole(chip, parts, noise(chip)), chip, 0)


def test_a_section_alone() -> None:
    chip = TINY
    part = [bring(chip, 3, 10, 0, 2, 30, base=1), keep(chip, 3, 300, 0, 2, 30)]
    part[1] = replace(part[1], queue=15)
    part[1] = keep(chip, 15, 300, 0, chip.mem_position(15), 30 - 2 + chip.mem_position(15))
    loop = Loop("i", 3, (Run(0, (Base(3, 1, 4, (("i", 2),)),)),))
    unused = section("unused", 5, [])
    plain = whole(chip, [part], noise(chip), plan=(loop,))
    program = replace(plain, sections=(*plain.sections, unused))
    fast, step = Fast(program, chip), Step(program, chip)
    for value in (4, 8, 7):
        fast.run_section(0, {(3, 1): value})
        step.run_section(0, {(3, 1): value})
        assert np.array_equal(fast.memory, step.memory)
    for value in (9, 3, -1, 5000):
        with pytest.raises(MachineError, match="the plan loads 4 to 8"):
            fast.run_section(0, {(3, 1): value})
    with pytest.raises(MachineError, match="slice 3: base register 1 holds nothing"):
        fast.run_section(0, {})
    with pytest.raises(MachineError, match="never runs section 1"):
        fast.run_section(1, {})


def test_faults_of_the_caller() -> None:
    program, chip = random_program(1)
    machine = Fast(program, chip)
    with pytest.raises(RequestError, match="parameters"):
        machine.run({})
    with pytest.raises(RequestError, match="no port 'z'"):
        machine.read("z")
    with pytest.raises(RequestError, match="no port 'y'"):
        machine.write("y", np.zeros(0, np.uint8))
    with pytest.raises(ProgramError):
        Fast(replace(program, chip="another"), chip)
    for changed in (replace(chip, superlane_lanes=8), replace(chip, install_streams=2)):
        with pytest.raises(ChipError, match="use the step one"):
            Fast(program, changed)


def test_an_empty_section() -> None:
    program = whole(TINY, [[bring(TINY, 0, 0, 0, 0, 30)]], noise(TINY))
    idle = replace(program, sections=(section("idle", 10**9, []),))
    result = Fast(idle, TINY).run({})
    assert (result.cycles, result.counters) == (10**9, {"cycles": 10**9, "hops": 0})


def test_generated_code_is_kept_and_damage_is_noticed(tmp_path: Path) -> None:
    store, shape, target = Store(tmp_path), Shape(32, 16), jit.select()
    native.Native(shape, target, store)
    ((kind, key, _),) = store.entries()
    path = store.path(kind, key)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    native.Native(shape, target, store)
    assert path.read_bytes() == good
    path.write_bytes(good[:40] + b"\0" + good[41:])
    native.Native(shape, target, store)
    assert path.read_bytes() == good
