"""In: a seed. Out: a Program of tiny with any bits in any field, legal or not, and odd names.

For what reads and writes programs; legal ones are made elsewhere.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np

from openlpu.chip import load_chip
from openlpu.isa import KINDS, place, units
from openlpu.program import Base, Issue, Loop, Param, Port, Program, Run, Section, Segment, Vector

TINY = load_chip("tiny")
IN_SECTIONS = [kind for kind in KINDS.values() if kind.unit not in ("icu", "c2c")]


def _args(rng: random.Random, op: str) -> tuple[int, ...]:
    def some(bits: int, signed: bool) -> int:
        low = -(1 << (bits - 1)) if signed else 0
        high = low + (1 << bits) - 1
        return rng.choice([0, low, high, rng.randint(low, high), min(high, rng.randrange(9))])

    return tuple(some(field.bits, field.signed) for field in KINDS[op].fields)


def _issue(rng: random.Random, tags: int) -> Issue:
    queue = rng.randrange(units(TINY).count)
    kinds = [kind.name for kind in IN_SECTIONS if kind.unit == place(TINY, queue).unit]
    op = rng.choice(kinds)
    cycle = rng.choice([0, rng.randrange(9), rng.randrange(70_000), rng.randrange(1 << 20)])
    count = rng.choice([1, 1, 2, 16, 65_536])
    period = 1 if count == 1 else rng.choice([1, 2, 65_535])
    return Issue(cycle, queue, op, _args(rng, op), count, period, rng.randrange(tags))


def some_section(rng: random.Random, name: str, issues: int = 60) -> Section:
    tags = rng.choice([("",), ("", "a", "a"), ("x y", "q\n;", "ü"), tuple(map(str, range(300)))])
    found = [_issue(rng, len(tags)) for _ in range(issues)]
    found += [replace(issue, tag=0) for issue in found if rng.random() < 0.1]  # twice at once
    found.sort(key=lambda issue: (issue.queue, issue.cycle, issue.op, issue.args))
    return Section(name, rng.randrange(1 << 20), tuple(found), tags)


def _plan(rng: random.Random, sections: int, depth: int = 3) -> tuple[Run | Loop, ...]:
    def base() -> Base:
        strides = tuple((rng.choice("ijk"), rng.randint(-9, 9)) for _ in range(rng.randrange(3)))
        return Base(rng.randrange(TINY.slices), rng.randrange(8), rng.randint(-1, 999), strides)

    body: list[Run | Loop] = []
    for _ in range(rng.randint(1, 3)):
        if depth and rng.random() < 0.5:
            count = rng.choice([3, 0, "n", "odd name"])
            by = rng.choice(["", "i"])
            body.append(Loop(rng.choice("ijk"), count, _plan(rng, sections, depth - 1), by))
        elif sections:
            bases = tuple(base() for _ in range(rng.randrange(3)))
            body.append(Run(rng.randrange(sections), bases))
    return tuple(body)


def some_program(seed: int) -> Program:
    rng = random.Random(seed)
    data = np.random.default_rng(seed)
    names = rng.choice([("a", "b"), ("a", "a"), ("a b", 'c"d'), ("Ü", "7")])
    vectors = tuple(
        Vector(tuple(rng.randrange(32) for _ in range(rng.choice([1, 4]))), row, rng.randint(-3, 3))
        for row in range(rng.randrange(3))
    )
    features = data.integers(-1, 99, (len(vectors), 32), np.int32)
    features[:, : rng.randrange(32)] = -1
    tables: dict[str, Any] = {
        "turns": data.random((3, 2)).astype(np.float32),
        "": np.zeros((0, 4), np.int8),
        "a table": data.integers(0, 9, (40, 1, 2), np.int64),
        "one": np.array(7, np.uint16),
    }
    return Program(
        "tiny",
        tuple(some_section(rng, name) for name in names),
        _plan(rng, len(names)),
        (Param("n", 1, 0, 7), Param("odd name", 3, -5, 1 << 20)),
        np.stack([np.arange(32), np.full(32, -1), data.permutation(32)]).astype(np.int16),
        tuple(
            Segment(rng.randrange(32), 7, data.integers(0, 256, (words, 32), np.uint8), what)
            for words, what in ((0, "nothing"), (1, "weights"), (40, "a table"))
        ),
        (
            Port("x", "in", rng.randrange(1, 9), vectors, features),
            Port("the logits", "out", 1, (), np.zeros((0, 32), np.int32)),
        ),
        (("state", 3, 100, 20), ("K, V", 31, 0, 1)),
        rng.choice(["{}", '{"vocab": 96}', "", '"', "; x", " {\n}", '{"ü": "\\"}']),
        {name: tables[name] for name in rng.sample(sorted(tables), 3)},
    )


def same(one: Program, two: Program) -> bool:
    """Whether two programs are equal, array by array."""

    def plain(program: Program) -> list[Any]:
        arrays = {f"table {name}": array for name, array in program.tables.items()}
        arrays |= {f"segment {i}": s.data for i, s in enumerate(program.image)}
        arrays |= {f"port {i}": p.features for i, p in enumerate(program.ports)}
        arrays["maps"] = program.maps
        return [
            (program.chip, program.sections, program.plan, program.params),
            [(s.slice, s.word, s.what) for s in program.image],
            [(p.name, p.direction, p.rows, p.vectors) for p in program.ports],
            (program.used, program.meta),
            {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()},
        ]

    return plain(one) == plain(two)


# A small one, whose every line is known.
SMALL = replace(
    some_program(3),
    sections=(
        Section(
            "layer",
            1200,
            (
                Issue(120, 19, "read", (12, 1, 2, 37), 16, 1, 1),
                Issue(9, 44, "add", (3, 73, 4, 194, 0, 0, 0, 4, 1, 9)),
            ),
            ("", "l0.qkv"),
        ),
    ),
    plan=(Run(0),),
)
