"""In: Programs with known figures. Out: utilization, outline and trace say what is in them."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from made_up_program import NO_MAPS, ONE, model

from openlpu.chip import Chip, load_chip
from openlpu.errors import ProgramError, RequestError
from openlpu.isa import KINDS, Source, latency, place, queue_name, units
from openlpu.program import (
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
    cycles,
    runs,
)
from openlpu.viz import trace as tracing
from openlpu.viz.flows import flows, instruction_text, reads_of, writes_of
from openlpu.viz.outline import outline, run_counts, spans
from openlpu.viz.trace import trace, trace_bytes
from openlpu.viz.utilization import LATENCY, UNITS, occupancy, utilization

TINY = load_chip("tiny")
FIRST = units(TINY)
ACT_EAST = FIRST.load + 3 * 2 + 1  # plane 2
ALU3 = FIRST.vxm + 3


def program(*sections: Section, plan: tuple[Run | Loop, ...] = (), **rest: object) -> Program:
    """A program that runs each section once, unless a plan is given."""
    plan = plan or tuple(Run(i) for i in range(len(sections)))
    whole = Program("tiny", sections, plan, (), NO_MAPS, (), ())
    return replace(whole, **rest)  # type: ignore[arg-type]


def small() -> Section:
    """4 words of slice e0 to plane 2 (each taken there), and one ALU result that nobody takes."""
    position, target = TINY.mem_position(16), TINY.positions - 1
    arrives = 5 + TINY.latency.mem_read + target - position
    mul = (int(Source.TAP), 3 * 64, int(Source.IMM), 0, 0, 0, 7, 1, 2, 0)
    return Section(
        "small",
        64,
        (
            Issue(5, 16, "read", (9, 1, 0, TINY.streams + 2), 4, 2, 0),
            Issue(arrives, ACT_EAST, "act", (0, 1, TINY.streams + 2, 1, 0), 4, 2, 1),
            Issue(20, ALU3, "mul", mul, tag=2),
        ),
        ("fetch", "dot", "scale"),
    )


# -- flows and utilization --------------------------------------------------------------------


def walk(section: Section, chip: Chip) -> Counter[tuple[int, int]] | None:
    """Busy cycles per (stream, position), moving every value one register a cycle; None where two
    values meet. Slow and plain."""
    puts: dict[int, list[tuple[int, int]]] = {}
    takes: dict[int, set[tuple[int, int]]] = {}
    for issue in section.issues:
        where = place(chip, issue.queue).position
        for i in range(issue.count):
            t = issue.cycle + i * issue.period
            for first, width, taken in reads_of(chip, issue):
                if taken:
                    takes.setdefault(t, set()).update((first + b, where) for b in range(width))
            if not writes_of(chip, issue):
                continue
            ready = t + latency(chip, KINDS[issue.op])
            for first, width in writes_of(chip, issue):
                puts.setdefault(ready, []).extend((first + b, where) for b in range(width))
    busy: Counter[tuple[int, int]] = Counter()
    here: set[tuple[int, int]] = set()
    for t in range(section.cycles + 2 * chip.positions):
        for register in puts.get(t, []):
            if register in here:
                return None
            here.add(register)
        busy.update(here)
        here -= takes.get(t, set())
        moved = {(s, x + (1 if s >= chip.streams else -1)) for s, x in here}
        here = {(s, x) for s, x in moved if 0 <= x < chip.positions}
    return busy


@pytest.mark.parametrize("seed", range(6))
def test_flows_are_what_a_walk_along_the_streams_finds(seed: int) -> None:
    dice = random.Random(seed)
    section = Section("random", 120, ())
    while len(section.issues) < 40:
        count, period, t = dice.choice([1, 1, 3, 5]), dice.choice([1, 2, 7]), dice.randrange(80)
        stream = dice.randrange(2 * TINY.streams)
        if dice.random() < 0.5:
            issue = Issue(t, dice.randrange(32), "read", (3, 1, 0, stream), count, period)
        elif dice.random() < 0.5:
            issue = Issue(t, dice.randrange(32), "write", (3, 1, 0, stream, 1), count, period)
        else:
            group = stream // 4 * 4
            args = (
                int(Source.WORD),
                group * 2 + 1,
                0,
                0,
                0,
                0,
                0,
                2,
                0,
                1 + dice.randrange(0, 32, 2),
            )
            issue = Issue(t, FIRST.vxm + dice.randrange(16), "mov", args, count, period)
        longer = replace(section, issues=(*section.issues, issue))
        if walk(longer, TINY) is not None:
            section = longer
    found = flows(section, TINY)
    counted: Counter[tuple[int, int]] = Counter()
    for stream, along, hops in zip(found.stream, found.along, found.hops, strict=True):
        for step in range(along, along + hops + 1):
            x = step if stream >= TINY.streams else TINY.positions - 1 - step
            counted[int(stream), int(x)] += 1
    assert counted == walk(section, TINY)
    used = utilization(program(section), TINY, {}).sections[0].uses[UNITS.index("streams")]
    assert used.busy == counted.total()
    assert used.slots == 2 * TINY.streams * TINY.positions * 120
    cuts = Counter[tuple[bool, int]]()
    for (stream, x), n in counted.items():
        cuts[stream >= TINY.streams, x] += n
    assert used.tightest == pytest.approx(max(cuts.values()) / (TINY.streams * 120))


def test_figures_of_a_section_are_those_counted_by_hand() -> None:
    found = utilization(program(small(), plan=(Loop("i", 3, (Run(0),)),)), TINY, {})
    section = found.sections[0]
    assert (found.cycles, section.runs, section.issues, found.issues) == (192, 3, 9, 27)
    assert found.seconds == 192 / TINY.clock_hz
    busy = {use.unit: (use.busy, use.slots) for use in section.uses}
    assert busy["MEM read"] == (4, 32 * 64)
    assert busy["MEM write"] == (0, 32 * 64)
    assert busy["MXM act"] == (4, 4 * 64)
    assert busy["VXM"] == (1, 16 * 64)
    # Each word is in all registers from slice e0's to plane 2's; the byte runs off the west end.
    way = TINY.positions - TINY.mem_position(16)
    assert busy["streams"] == (4 * way + TINY.vxm_position + 1, 64 * TINY.positions * 64)
    fetch, dot, scale = section.operations
    assert (fetch.tag, fetch.first_cycle, fetch.last_cycle, fetch.cycles) == ("fetch", 5, 11, 7)
    assert fetch.binds == "MEM read"
    assert fetch.uses[0].tightest == pytest.approx(4 / 7)
    assert (scale.tag, scale.cycles, scale.binds) == ("scale", 1, LATENCY)
    assert (dot.tag, dot.binds, dot.issues) == ("dot", "MXM act", 4)
    assert section.binds == found.binds == LATENCY


def test_figures_of_operations_add_up() -> None:
    made = model()
    chip = load_chip(made.chip)
    found = utilization(made, chip, ONE)
    assert found.cycles == cycles(made, ONE)
    assert found.issues == sum(s.runs * s.issues for s in found.sections)
    for u, name in enumerate(UNITS):
        for section in found.sections:
            assert section.uses[u].busy == sum(o.uses[u].busy for o in section.operations), name
            assert section.uses[u].share <= section.uses[u].tightest + 1e-12
        assert found.uses[u].busy == sum(s.runs * s.uses[u].busy for s in found.sections)
        assert found.uses[u].slots == sum(s.runs * s.uses[u].slots for s in found.sections)


def test_memory_is_counted_once() -> None:
    zeros = np.zeros((10, TINY.lanes), np.uint8)
    features = np.zeros((1, TINY.lanes), np.int32)
    made = program(
        small(),
        image=(Segment(0, 100, zeros, "weights"), Segment(31, 0, zeros, "table")),
        used=(("state", 0, 105, 10), ("context", 2, 1000, 48)),
        ports=(Port("x", "in", 3, (Vector((2, 3), 1047, 2),), features),),
    )
    lanes = TINY.lanes
    found = utilization(made, TINY, {})
    assert {(m.region, m.what): m.bytes for m in found.memory} == {
        ("sram", "weights"): 10 * lanes,
        ("sram", "table"): 10 * lanes,
        ("sram", "state"): 5 * lanes,
        ("sram", "context"): 48 * lanes,
        ("sram", "port x"): 5 * lanes,  # one of its six words is context too
    }
    assert (found.used_bytes, found.memory_bytes) == (78 * lanes, TINY.memory_bytes)
    kinds, words = occupancy(made, TINY)
    assert kinds[words[0, 109] - 1] == "weights"
    assert kinds[words[0, 110] - 1] == "state"
    assert words[0, 115] == 0


def test_memory_is_told_by_region() -> None:
    chip = load_chip("lpu_217")
    zeros = np.zeros((200, chip.lanes), np.uint8)
    made = program(Section("s", 1, ()), image=(Segment(0, 0, zeros, "weights"),))
    found = utilization(made, chip, {}).memory
    assert [(m.region, m.bytes // chip.lanes) for m in found] == [("L0", 142), ("L1", 58)]


# -- the plan ---------------------------------------------------------------------------------


def uneven() -> tuple[Program, Params]:
    """Loops in loops, one of whose counts varies with the loop around it and is 0 at first."""
    sections = tuple(Section(name, n, ()) for name, n in (("a", 3), ("b", 5), ("c", 7)))
    inner = Loop("chunk", "chunks", (Run(1),), "row")
    layer = Loop("layer", 4, (Run(0), Loop("row", 3, (inner, Run(0))), Run(2)))
    plan = (Run(2), layer, Loop("never", 0, (Run(1),)), Run(0))
    made = program(*sections, plan=plan, params=(Param("chunks", 3, 0, 9),))
    return made, {"chunks": (0, 2, 1)}


def test_the_outline_agrees_with_the_runs_one_by_one() -> None:
    made, params = uneven()
    parts = outline(made, params)
    assert sum(part.cycles for part in parts) == cycles(made, params)
    counted = Counter(run.section for run, _ in runs(made, params))
    assert run_counts(made, params) == [counted[i] for i in range(3)]
    layer, never = parts[1], parts[2]
    assert (layer.var, layer.times, layer.iterations) == ("layer", 1, 4)
    row = layer.body[1]
    assert (row.times, row.iterations, row.body[0].times, row.body[0].iterations) == (4, 12, 12, 12)
    assert (never.iterations, never.cycles, never.body[0].times) == (0, 0, 0)


def test_spans_cover_the_step_without_a_gap() -> None:
    made, params = uneven()
    found = spans(made, params)
    at = 0
    for span in found:
        if span.depth == 0:
            assert span.start_cycle == at
            at += span.cycles
    assert at == cycles(made, params)
    rows = [(s.first, s.last, s.whole, s.cycles) for s in found if s.var == "row"]
    # Row 0 has no chunk, so row 1 is the one drawn whole.
    assert rows == [(0, 0, False, 3), (1, 1, True, 13), (2, 2, False, 8)]
    whole = next(s for s in found if s.var == "row" and s.whole)
    chunks = [s for s in found if s.var == "chunk"]
    assert [(s.first, s.last, s.whole, s.cycles) for s in chunks] == [
        (0, 0, True, 5),
        (1, 1, False, 5),
    ]
    assert {s.depth for s in chunks} == {whole.depth + 1} == {2}
    assert chunks[0].start_cycle == whole.start_cycle


BAD = {
    "op": Issue(0, 0, "jump", ()),
    "args": Issue(0, 0, "read", (1, 2)),
    "queue": Issue(0, FIRST.count, "read", (0, 0, 0, 0)),
    "unit": Issue(0, ALU3, "read", (0, 0, 0, 0)),
    "tag": Issue(0, 0, "read", (0, 0, 0, 0), tag=1),
    "late": Issue(0, 0, "read", (0, 0, 0, 0), 65),
    "count": Issue(0, 0, "read", (0, 0, 0, 0), 0),
    "early": Issue(-1, 0, "read", (0, 0, 0, 0)),
}


@pytest.mark.parametrize("issue", BAD.values(), ids=BAD)
def test_a_malformed_issue_is_refused(issue: Issue) -> None:
    with pytest.raises(ProgramError, match="section s"):
        utilization(program(Section("s", 64, (issue,))), TINY, {})


@pytest.mark.parametrize(
    "made",
    [
        program(small(), plan=(Run(1),)),
        program(small(), plan=(Loop("i", "n", (Run(0),)),)),
        program(small(), plan=(Loop("i", -1, (Run(0),)),)),
        program(small(), plan=(Loop("i", 2, (Loop("i", 2, (Run(0),)),)),)),
        program(small(), used=(("state", 32, 0, 1),)),
        program(small(), used=(("state", 0, 2040, 9),)),
        program(Section("s", 1 << 40, ())),
    ],
)
def test_a_malformed_program_is_refused(made: Program) -> None:
    for show in (utilization, trace):
        with pytest.raises(ProgramError):
            show(made, TINY, {})


def test_a_loop_beyond_its_parameter_is_refused() -> None:
    made, params = uneven()
    longer = Loop("row", 4, (Loop("chunk", "chunks", (Run(1),), "row"),))
    with pytest.raises(ProgramError, match="not there"):
        trace(replace(made, plan=(longer,)), TINY, params)
    with pytest.raises(RequestError):
        trace(made, TINY, {})


# -- the trace --------------------------------------------------------------------------------


def test_a_trace_is_what_its_readers_take() -> None:
    made = model()
    found = trace(made, load_chip(made.chip), ONE)
    events = found["traceEvents"]
    assert found["displayTimeUnit"] == "ns"
    assert {event["ph"] for event in events} == {"M", "X"}
    ends: dict[tuple[int, int], float] = {}
    for event in events:
        assert {"name", "ph", "pid", "tid", "ts", "args"} <= set(event)
        if event["ph"] == "X":
            track = event["pid"], event["tid"]
            assert event["ts"] >= ends.get(track, 0.0) - 1e-9  # slices of a track never overlap
            assert event["dur"] > 0
            assert isinstance(event["args"]["cycle"], int)
            ends[track] = event["ts"] + event["dur"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named == set(ends)
    chip = load_chip(made.chip)
    assert max(ends.values()) == pytest.approx(cycles(made, ONE) / chip.clock_hz * 1e6, abs=1e-5)
    data = trace_bytes(made, chip, ONE)
    assert len(data) < 4_000_000
    assert data == trace_bytes(made, chip, ONE)
    packed = trace_bytes(made, chip, ONE, packed=True)
    assert packed == trace_bytes(made, chip, ONE, packed=True)
    assert gzip.decompress(packed) == data
    assert json.loads(data) == json.loads(json.dumps(found))


def test_a_trace_names_every_busy_queue_and_each_loop() -> None:
    made = model("tiny")
    found = trace(made, TINY, ONE)["traceEvents"]
    tracks = {e["args"]["name"] for e in found if e["name"] == "thread_name"}
    for section in made.sections:
        for issue in section.issues:
            name = queue_name(TINY, issue.queue)
            assert tracks & {name, f"{name} read", f"{name} write"}
    processes = [e["args"]["name"] for e in found if e["name"] == "process_name"]
    assert processes[:3] == ["step", "MXM", "VXM"]
    summary = next(e for e in found if e["name"].startswith("layer 1..29, x29, "))
    rest = cycles(made, ONE) - made.sections[4].cycles
    assert summary["args"]["cycles"] == rest // 30 * 29
    assert f"{rest // 30 * 29:,} cycles" in summary["name"]


def test_a_burst_is_one_event() -> None:
    events = trace(program(small()), TINY, {})["traceEvents"]
    burst = next(e for e in events if e["name"] == "fetch read")
    word = "word=9 step=1 base=0 dst=34"
    assert burst["args"] == {"cycle": 5, "op": "read", "fields": word, "count": 4, "period": 2}
    assert burst["ts"] == 5 * 10**12 // TINY.clock_hz / 1e6
    busy = [e for e in events if e["name"] == "fetch"]
    assert sum(e["args"]["values"] for e in busy) == 4
    mul = next(e for e in events if e["name"] == "scale mul")
    assert mul["args"]["fields"] == "a=alu3@0 b=imm imm=7 west=s1x1"
    assert instruction_text(Issue(0, FIRST.load, "install", ())) == ""


def test_a_large_trace_draws_a_section_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = program(small(), plan=(Run(0), Run(0)))

    def fetches() -> int:
        events = trace(twice, TINY, {})["traceEvents"]
        assert sum(e["name"] == "small" for e in events) == 2
        return sum(e["name"] == "fetch read" for e in events)

    assert fetches() == 2
    monkeypatch.setattr(tracing, "MOST_EVENTS", 1)
    assert fetches() == 1
