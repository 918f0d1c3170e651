"""In: a chip's name. Out: a made-up Program as large as a small model's, to be looked at, not run.

Its values meet as those of a compiled model do (a slice sends words so that they reach a plane when
it loads them), but nobody took care that streams never collide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from openlpu.chip import Chip, load_chip
from openlpu.isa import KINDS, Source, latency, place, units
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

NO_MAPS = np.zeros((0, 0), np.int16)


@lru_cache
def _queues(chip: Chip) -> dict[tuple[str, int], int]:
    places = (place(chip, queue) for queue in range(units(chip).count))
    return {(where.unit, where.index): queue for queue, where in enumerate(places)}


@dataclass
class Draft:
    """A section being written: tasks that move values the way a compiled model does."""

    chip: Chip
    name: str
    tag: int = 0
    tags: list[str] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    def operation(self, tag: str) -> None:
        self.tag = len(self.tags)
        self.tags.append(tag)

    def put(
        self, queue: int, cycle: int, op: str, *args: int, count: int = 1, period: int = 1
    ) -> None:
        self.issues.append(Issue(cycle, queue, op, args, count, period, self.tag))

    def queue(self, unit: str, index: int) -> int:
        return _queues(self.chip)[unit, index]

    def stream(self, source: int, target: int, number: int) -> int:
        return number % self.chip.streams + (self.chip.streams if target > source else 0)

    def feed(
        self, cycle: int, target: int, slice_index: int, word: int, number: int, count: int
    ) -> int:
        """A slice sends words so that the first is at position `target` at `cycle`."""
        source = self.chip.mem_position(slice_index)
        stream = self.stream(source, target, number)
        start = cycle - abs(target - source) - self.chip.latency.mem_read
        self.put(slice_index, start, "read", word, 1, 0, stream, count=count)
        return stream

    def matmul(self, cycle: int, plane: int, tile: int, rows: int) -> int:
        """Weights from 16 slices, `rows` vectors, results on four streams; when they are out."""
        chip, side = self.chip, plane // self.chip.planes_per_hemisphere
        first, wide = side * chip.slices_per_hemisphere, chip.install_streams
        position, groups = chip.mxm_position(plane), chip.lanes // wide
        for j in range(wide):
            slice_index = first + (tile * wide + j) % chip.slices_per_hemisphere
            self.feed(
                cycle, position, slice_index, 40 + tile * groups, (plane % 2) * wide + j, groups
            )
        base = (plane % 2) * wide + (chip.streams if side else 0)
        self.put(self.queue("load", plane), cycle, "load", 0, 1, base, 0, 0, count=groups)
        self.put(self.queue("load", plane), cycle + groups, "install")
        ready = cycle + groups + chip.latency.mxm_install
        source = first + (tile + 3) % chip.slices_per_hemisphere
        stream = self.feed(ready, position, source, 8, 30, rows)
        self.put(self.queue("act", plane), ready, "act", 0, 1, stream, 1, tile % 2, count=rows)
        done = ready + chip.latency.mxm_dot
        back = 4 * (tile % 4) + (0 if side else chip.streams)
        self.put(self.queue("out", plane), done, "out", 0, 1, back, count=rows)
        return done + chip.latency.mxm_out + abs(position - chip.vxm_position)

    def lane_ops(self, cycle: int, ops: tuple[str, ...], source: int, rows: int, alu: int) -> int:
        """A chain of ALUs on the rows of four streams; the result goes east into a slice."""
        chip, at = self.chip, cycle
        operand = (int(Source.WORD), source * 2 + 1)
        for i, op in enumerate(ops):
            where = (alu + i) % chip.alus
            last = i == len(ops) - 1
            second = (int(Source.IMM), 0) if KINDS[op].unit == "vxm" and op in TWO else (0, 0)
            args = (*operand, *second, 0, 0, 7 if op in TWO else 0)
            out = (1, 0, 9 + alu % 8) if last else (0, 0, 0)
            self.put(self.queue("vxm", where), at, op, *args, *out, count=rows, period=1)
            at += latency(chip, KINDS[op])
            operand = (int(Source.TAP), where * 64)
        slice_index = chip.slices_per_hemisphere + 5 + alu % 8
        arrives = at + abs(chip.mem_position(slice_index) - chip.vxm_position)
        stream = chip.streams + 8 + alu % 8
        self.put(slice_index, arrives, "write", 8, 1, 0, stream, 1, count=rows)
        return arrives + rows

    def done(self) -> Section:
        end = max(i.last_cycle for i in self.issues) + 40
        issues = sorted(self.issues, key=lambda i: (i.queue, i.cycle, i.op, i.args))
        return Section(self.name, end, tuple(issues), tuple(self.tags))


TWO = {"fmul", "fadd", "max", "min", "fmax"}
CHAIN = ("itof", "fmul", "fadd", "frint", "ftoi")


def linear(draft: Draft, start: int, tag: str, tiles: int, rows: int) -> int:
    """A matrix product on all planes, and what follows it on the lanes."""
    chip = draft.chip
    at = [start] * chip.planes
    end = start
    draft.operation(f"{tag} mxm")
    mxm, lanes = draft.tag, len(draft.tags)
    draft.tags += [f"{tag} scale", f"{tag} quant"]
    for tile in range(tiles):
        plane = tile % chip.planes
        draft.tag = mxm
        ready = draft.matmul(at[plane], plane, tile, rows)
        at[plane] += chip.lanes // chip.install_streams + max(rows, 4)
        if tile % 2:
            draft.tag = lanes + tile // 2 % 2
            side = plane // chip.planes_per_hemisphere
            stream = 4 * (tile % 4) + (0 if side else chip.streams)
            end = draft.lane_ops(ready, CHAIN, stream, rows, tile)
    return max(end, *at)


def norm(draft: Draft, start: int, tag: str, words: int) -> int:
    chip, end = draft.chip, start
    draft.operation(f"{tag} norm")
    for i in range(words):
        stream = draft.feed(
            start + 3 * i, chip.vxm_position, i % chip.slices, 100 + i, 4 * (i % 4), 1
        )
        end = draft.lane_ops(start + 3 * i, ("fmul", "fadd", "fsqrt"), stream - stream % 4, 1, i)
    draft.operation(f"{tag} rope")
    shuffle = draft.queue("sxm", chip.sxm_queues)
    draft.put(shuffle, end, "rotate", 32, 40, 0, 1, 3, count=max(2, words // 4), period=2)
    return end + words


@lru_cache
def model(chip_name: str = "tsp_v1", scale: int = 1, rows: int = 8) -> Program:
    """Five sections like those of a small language model, and its plan."""
    chip = load_chip(chip_name)
    sections = []
    for name, tag, linears in (
        ("attn_in", "l.attn_in", (("qkv", 12),)),
        ("attend", "l.attend", (("scores", 4), ("pv", 4))),
        ("attn_out", "l.attn_out", (("o", 8),)),
        ("ffn", "l.ffn", (("gate_up", 40), ("down", 20))),
        ("head", "head", (("logits", 120),)),
    ):
        draft = Draft(chip, name)
        at = norm(draft, 60, tag, 24 * scale)
        for part, tiles in linears:
            at = linear(draft, at, f"{tag}.{part}", tiles * scale, rows)
        sections.append(draft.done())
    per, hemisphere = chip.words // 3, chip.slices_per_hemisphere
    image, used = [], []
    for s in range(chip.slices):
        heavy = per + per * (s * 37 % 11) // 16
        image.append(Segment(s, per, np.zeros((heavy, chip.lanes), np.uint8), "weights"))
        if s % hemisphere < 6:
            image.append(Segment(s, 16, np.zeros((40, chip.lanes), np.uint8), "constants"))
        used.append(("context", s, chip.words - per, per - 64 - 8 * (s % 5)))
        used.append(("text", s, chip.words - 48, 48))
        used.append(("state", s, 0, 16))
    features = np.arange(chip.lanes, dtype=np.int32)[None]
    ports = (
        Port("x", "in", rows, (Vector((0, 1, 2, 3), 20, 1),), features),
        Port("logits", "out", rows, (Vector((hemisphere,), 400, 1),), features),
    )
    chunks = Loop(
        "chunk", "chunks", (Run(1, (Base(3, 1, 0, (("layer", 8), ("chunk", 2))),)),), "row"
    )
    layer = Loop("layer", 30, (Run(0), Loop("row", rows, (chunks,)), Run(2), Run(3)))
    return Program(
        chip=chip_name,
        sections=tuple(sections),
        plan=(layer, Run(4)),
        params=(Param("chunks", rows, 0, 26),),
        maps=NO_MAPS,
        image=tuple(image),
        ports=ports,
        used=tuple(used),
        meta=json.dumps({"model": "made-up 135M"}),
    )


ONE: Params = {"chunks": (1,) * 8}
