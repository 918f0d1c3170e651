"""In: a seed and a chip like `tiny`. Out: a random legal Section, and the bases it asks for.

A section is built by reservation: an instruction is kept only if its queue is free, its operands
are on their streams (put there by reads that are added with it, or met on their way), and its
results meet nothing. So nearly every program is legal, by reasoning of its own, not by check's.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from openlpu import isa
from openlpu.chip import Chip, load_chip
from openlpu.program import Issue, Section

# Fewer base registers than a field can name, so that some are missing.
TINY = replace(load_chip("tiny"), base_registers=8)
LOADED, _SET, BOTH = (1, 2, 3), (4, 5), (6,)  # base registers: by runs, by setbase, by both
MARGIN = 32  # words with contents at both ends of each bank
_FLOATS = (0x3F800000, 0x40490FDB, 0x7F800000, 0x7FC00000, 0x00000001, 0x4B000001, -1, 0)


class Full(Exception):
    """The instruction does not fit here."""


def issue(queue: int, op: str, cycle: int, count: int = 1, period: int = 1, **fields: int) -> Issue:
    """An issue with fields by name; those not named are 0."""
    kind = isa.KINDS[op]
    unknown = set(fields) - {entry.name for entry in kind.fields}
    assert not unknown, unknown
    args = tuple(int(fields.get(entry.name, 0)) for entry in kind.fields)
    return Issue(cycle, queue, op, args, count, period)


def section(name: str, cycles: int, issues: Iterable[Issue]) -> Section:
    """A section, its issues in order."""
    return Section(name, cycles, tuple(sorted(issues, key=_order)))


def _order(one: Issue) -> tuple[int, int, str, tuple[int, ...]]:
    return one.queue, one.cycle, one.op, one.args


def variation(rng: random.Random) -> Chip:
    """tiny itself, or tiny with other latencies and fewer registers."""
    if rng.random() < 0.4:
        return TINY
    slow = {
        name: rng.randint(1, 7)
        for name in ("mem_write", "base_load", "mxm_load", "mxm_install", "mxm_out", "alu_int")
    }
    latency = replace(TINY.latency, **slow)
    return replace(
        TINY,
        latency=latency,
        repeats=rng.choice((1, 2, 64)),
        history_cycles=rng.choice((3, 12, 32)),
        accumulators=rng.choice((4, 256)),
    )


@dataclass
class Value:
    """A value on its flow: first and last register it stands in, and the last that is read."""

    first: int
    last: int
    read: int = 0
    taken: bool = False


@dataclass
class Plane:
    """What a plane has done; new instructions come later than these cycles."""

    load_queue: int = -1
    loaded: int | None = None
    ready: int | None = None
    slots: dict[int, int] = field(default_factory=dict)


class SectionBuilder:
    """Builds one section."""

    def __init__(self, rng: random.Random, chip: Chip, maps: int) -> None:
        self.rng, self.chip, self.maps = rng, chip, maps
        self.length = rng.randint(25, 110)
        self.issues: list[Issue] = []
        self.busy: set[tuple[int, bool, int]] = set()
        self.banks: dict[tuple[int, int], int] = {}
        self.repeats: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.flows: dict[tuple[int, int], list[Value]] = defaultdict(list)
        self.results: set[tuple[int, int]] = set()
        self.highest: dict[tuple[int, int], int] = {}  # of base registers, whoever sets them
        self.set_at: dict[tuple[int, int], int] = {}  # first cycle that sees a setbase
        self.planes = [Plane() for _ in range(chip.planes)]
        self.last = 0  # cycle before which the section cannot end
        self.undo: list[Callable[[], object]] = []
        self.first = isa.units(chip)

    def build(self, name: str) -> Section:
        actions = (
            [self.alu] * 8
            + [self.write] * 5
            + [self.sxm] * 4
            + [self.gather, self.scatter, self.setbase, self.setbase] * 2
            + [self.transpose, self.read]
            + [self.load, self.load, self.install, self.act, self.act, self.out] * 2
        )
        for _ in range(self.rng.randint(10, 60)):
            self.attempt(self.rng.choice(actions))
        ends = [flow + 1 for (_, flow), row in self.flows.items() if any(not v.taken for v in row)]
        cycles = max([self.last, *ends])
        return section(name, cycles + self.rng.choice((0, 0, 0, 1, 5)), self.issues)

    def attempt(self, action: Callable[[], None]) -> None:
        self.undo = []
        try:
            action()
        except Full:
            for step in reversed(self.undo):
                step()

    # -- reservations; each raises Full

    def issue(self, queue: int, op: str, t: int, times: tuple[int, int], **fields: int) -> None:
        """times: count and period."""
        count, period = times
        cycles = [t + i * period for i in range(count)]
        second = op in ("write", "scatter", "setbase")
        if t < 0 or any((queue, second, c) in self.busy for c in cycles):
            raise Full
        if "word" in fields:
            for i, c in enumerate(cycles):
                bank = (fields["word"] + i * fields["step"]) // self.chip.words_per_bank
                if self.banks.get((queue, c)) == bank:
                    raise Full
                self._assign(self.banks, (queue, c), bank)
        if count > 1:
            spans = [*self.repeats[queue], (t, cycles[-1])]
            starts = [sum(a <= b0 <= b for a, b in spans) for b0, _ in spans]
            if max(starts) > self.chip.repeats:
                raise Full
            self._append(self.repeats[queue], (t, cycles[-1]))
        for c in cycles:
            self.busy.add((queue, second, c))
            self.undo.append(lambda c=c: self.busy.discard((queue, second, c)))  # type: ignore[misc]
        self._append(self.issues, issue(queue, op, t, count, period, **fields))
        self._at_least(cycles[-1] + 1)

    def _append(self, row: list, entry: object) -> None:  # type: ignore[type-arg]
        row.append(entry)
        self.undo.append(row.pop)

    def _assign(self, table: dict, key: object, value: object) -> None:  # type: ignore[type-arg]
        before = table.get(key)
        table[key] = value

        def back() -> None:
            if before is None:
                del table[key]
            else:
                table[key] = before

        self.undo.append(back)

    def _set(self, target: object, name: str, value: object) -> None:
        before = getattr(target, name)
        setattr(target, name, value)
        self.undo.append(lambda: setattr(target, name, before))

    def _at_least(self, cycle: int) -> None:
        self._set(self, "last", max(self.last, cycle))

    def _flow(self, stream: int, x: int, t: int) -> tuple[tuple[int, int], int]:
        """Key of a flow, and how far along it a register is."""
        edge = self.chip.positions - 1
        progress = x if stream >= self.chip.streams else edge - x
        return (stream, t - progress + edge), progress

    def put(self, stream: int, x: int, t: int, read: int = 0, take: bool = False) -> None:
        """A value that is read, and perhaps taken, at `read`; else it goes to the chip's end."""
        key, progress = self._flow(stream, x, t)
        last = read if take else self.chip.positions - 1
        value = Value(progress, last, max(progress, read), take)
        row = self.flows[key]
        if any(value.first <= v.last and v.first <= value.last for v in row):
            raise Full
        self._append(row, value)
        self._at_least(t + 1)

    def meet(self, stream: int, x: int, t: int, take: bool) -> bool:
        """Read a value that comes by, if one does."""
        key, progress = self._flow(stream, x, t)
        for value in self.flows.get(key, ()):
            if value.first <= progress <= value.last:
                if take and progress < value.read:
                    raise Full
                self._set(value, "read", max(value.read, progress))
                if take:
                    self._set(value, "last", progress)
                    self._set(value, "taken", True)
                return True
        return False

    def supply(self, stream: int, x: int, t: int, take: bool, times: tuple[int, int]) -> None:
        """Values on a stream at t and its repetitions: met, or read from memory for it."""
        count, period = times
        met = [self.meet(stream, x, t + i * period, take) for i in range(count)]
        if all(met):
            return
        if any(met):
            raise Full
        _, progress = self._flow(stream, x, t)
        east = stream >= self.chip.streams
        before = [
            s
            for s in range(self.chip.slices)
            if (self.chip.mem_position(s) <= x if east else self.chip.mem_position(s) >= x)
        ]
        for s in self.rng.sample(before, min(6, len(before))):
            start = self.chip.mem_position(s)
            at = t - abs(start - x) - self.chip.latency.mem_read
            mark = len(self.undo)
            try:
                self.issue(s, "read", at, times, dst=stream, **self.address(s, at, times))
                for i in range(count):
                    put_at = at + i * period + self.chip.latency.mem_read
                    self.put(stream, start, put_at, progress, take)
                return
            except Full:
                while len(self.undo) > mark:
                    self.undo.pop()()
        raise Full

    def supplies(
        self, first: int, width: int, x: int, t: int, take: bool, times: tuple[int, int]
    ) -> None:
        for j in range(width):
            self.supply(first + j, x, t, take, times)

    def address(self, s: int, t: int, times: tuple[int, int], reach: int = 0) -> dict[str, int]:
        """word, step and base of an access that stays in its bank."""
        rng, bank_words = self.rng, self.chip.words_per_bank
        base = rng.choice((0, 0, 0, *LOADED, *_SET, *BOTH))
        key = s, base
        if base in _SET and self.set_at.get(key, t + 1) > t:
            base = 0
        if base in LOADED + BOTH and key not in self.highest:
            self._assign(self.highest, key, rng.choice((-1, 0, 3, 9)))
        highest = self.highest[key] if base else 0
        # What a base of -1 turns off may point anywhere.
        room = bank_words - 1 - (highest + reach if highest >= 0 else 0)
        offset = room if rng.random() < 0.2 else rng.randint(0, MARGIN - 1)
        step = 0
        if times[0] > 1 and offset != room:
            step = rng.choice((0, 1, 2, -1))
        if offset + step * (times[0] - 1) < 0:
            step = 0
        return {"word": offset + bank_words * rng.randint(0, 1), "step": step, "base": base}

    # -- choices

    def times(self, chance: float = 0.25) -> tuple[int, int]:
        if self.rng.random() < chance:
            return self.rng.randint(2, 4), self.rng.randint(1, 5)
        return 1, 1

    def stream(self, width: int) -> int:
        return self.rng.randrange(0, 2 * self.chip.streams, width)

    def take(self) -> bool:
        return self.rng.random() < 0.7

    def somewhere(self, places: list[int], width: int) -> tuple[int, int, int]:
        """First stream, position and cycle of an operand; often where a value comes by."""
        rng = self.rng
        if self.flows and rng.random() < 0.6:
            stream, flow = rng.choice(list(self.flows))
            row = self.flows[stream, flow]
            x = rng.choice(places)
            edge = self.chip.positions - 1
            progress = x if stream >= self.chip.streams else edge - x
            if any(v.first <= progress <= v.last for v in row):
                return stream // width * width, x, flow - edge + progress
        return self.stream(width), rng.choice(places), rng.randint(4, self.length)

    def mem(self, position: int) -> int:
        found = [s for s in range(self.chip.slices) if self.chip.mem_position(s) == position]
        return self.rng.choice(found)

    def mem_places(self) -> list[int]:
        return [self.chip.mem_position(s) for s in range(self.chip.slices)]

    # -- MEM

    def read(self) -> None:
        s, t, times = self.rng.randrange(self.chip.slices), self.rng.randint(0, self.length), (1, 1)
        stream = self.stream(1)
        self.issue(s, "read", t, times, dst=stream, **self.address(s, t, times))
        self.put(stream, self.chip.mem_position(s), t + self.chip.latency.mem_read)

    def write(self) -> None:
        stream, x, t = self.somewhere(self.mem_places(), 1)
        s, take, times = self.mem(x), self.take(), self.times()
        self.supply(stream, x, t, take, times)
        address = self.address(s, t, times)
        self.issue(s, "write", t, times, src=stream, take=take, **address)
        self._at_least(t + (times[0] - 1) * times[1] + self.chip.latency.mem_write)

    def gather(self) -> None:
        stream, x, t = self.somewhere(self.mem_places(), 2)
        s, take, times, limit = self.mem(x), self.take(), self.times(), self.rng.randint(0, 40)
        self.supplies(stream, 2, x, t, take, times)
        dst = self.stream(1)
        address = self.address(s, t, times, limit)
        fields = {"dst": dst, "map": stream, "take": take, "limit": limit, **address}
        self.issue(s, "gather", t, times, **fields)
        for i in range(times[0]):
            self.put(dst, x, t + i * times[1] + self.chip.latency.mem_read)

    def scatter(self) -> None:
        stream, x, t = self.somewhere(self.mem_places(), 2)
        s, take, times, limit = self.mem(x), self.take(), self.times(), self.rng.randint(0, 40)
        self.supplies(stream, 2, x, t, take, times)
        src = self.stream(1)
        if src // 2 != stream // 2:
            self.supply(src, x, t, take, times)
        address = self.address(s, t, times, limit)
        fields = {"src": src, "map": stream, "take": take, "limit": limit, **address}
        self.issue(s, "scatter", t, times, **fields)
        self._at_least(t + (times[0] - 1) * times[1] + self.chip.latency.mem_write)

    def setbase(self) -> None:
        stream, x, t = self.somewhere(self.mem_places(), 1)
        s, reg, take = self.mem(x), self.rng.choice(_SET + BOTH), self.take()
        if self.highest.get((s, reg), 0) < 0:
            raise Full
        if (s, reg) not in self.highest:
            self._assign(self.highest, (s, reg), self.rng.choice((0, 3, 17)))
        self.supply(stream, x, t, take, (1, 1))
        lane = 2 * self.rng.randrange(self.chip.lanes // 2)
        fields = {"reg": reg, "lane": lane, "limit": self.highest[s, reg], "src": stream}
        self.issue(s, "setbase", t, (1, 1), take=take, **fields)
        seen = t + self.chip.latency.base_load
        self._assign(self.set_at, (s, reg), min(seen, self.set_at.get((s, reg), seen)))

    # -- MXM

    def load(self) -> None:
        number = self.rng.randrange(self.chip.planes)
        plane, count = self.planes[number], self.chip.install_streams
        times = self.times(0.4)
        x = self.chip.mxm_position(number)
        direction = 0 if x == 0 else self.chip.streams
        stream = direction + self.rng.randrange(0, self.chip.streams, count)
        t = plane.load_queue + 1 + self.rng.choice((0, 1, 5, 20))
        t = max(t, 25)
        self.supplies(stream, count, x, t, True, times)
        groups = self.chip.lanes // count
        group = self.rng.randrange(groups)
        step = self.rng.choice((0, groups - 1 - group)) if times[0] == 2 else 0
        fields = {"row": self.rng.randint(0, 1), "mode": self.rng.randrange(len(isa.Mode))}
        queue = self.first.load + 3 * number
        self.issue(queue, "load", t, times, group=group, step=step, src=stream, **fields)
        last = t + (times[0] - 1) * times[1]
        self._set(plane, "load_queue", last)
        self._set(plane, "loaded", last)

    def install(self) -> None:
        ready = [n for n, plane in enumerate(self.planes) if plane.loaded is not None]
        if not ready:
            raise Full
        number = self.rng.choice(ready)
        plane, latency = self.planes[number], self.chip.latency
        assert plane.loaded is not None
        t = plane.loaded + latency.mxm_load + self.rng.choice((0, 0, 3))
        self.issue(self.first.load + 3 * number, "install", t, (1, 1))
        self._set(plane, "load_queue", t)
        self._set(plane, "loaded", None)
        if plane.ready is None:
            self._set(plane, "ready", t + latency.mxm_install)

    def _slots(self, plane: Plane, known: bool, count: int) -> tuple[int, int]:
        """A slot and a step."""
        if known:
            return self.rng.choice(list(plane.slots)), 0
        step = self.rng.choice((0, 1)) if count > 1 else 0
        return self.rng.randrange(min(5, self.chip.accumulators) - step * (count - 1)), step

    def act(self) -> None:
        ready = [n for n, plane in enumerate(self.planes) if plane.ready is not None]
        if not ready:
            raise Full
        number = self.rng.choice(ready)
        plane, times = self.planes[number], self.times()
        assert plane.ready is not None
        add = self.rng.random() < 0.5 and bool(plane.slots)
        if not add and self.chip.accumulators < times[0]:
            raise Full
        slot, step = self._slots(plane, add, times[0])
        slots = [slot + i * step for i in range(times[0])]
        after = max(plane.slots.get(one, -1) for one in slots)
        t = max(plane.ready, after + 1) + self.rng.choice((0, 0, 2, 9))
        stream, take = self.stream(1), self.take()
        self.supply(stream, self.chip.mxm_position(number), t, take, times)
        queue = self.first.load + 3 * number + 1
        self.issue(queue, "act", t, times, slot=slot, step=step, src=stream, take=take, add=add)
        for i, one in enumerate(slots):
            self._assign(plane.slots, one, t + i * times[1])

    def out(self) -> None:
        ready = [n for n, plane in enumerate(self.planes) if plane.slots]
        if not ready:
            raise Full
        number = self.rng.choice(ready)
        plane, times, dst = self.planes[number], self.times(), self.stream(4)
        slot, _ = self._slots(plane, True, 1)
        t = plane.slots[slot] + self.chip.latency.mxm_dot + self.rng.choice((0, 0, 4))
        queue = self.first.load + 3 * number + 2
        self.issue(queue, "out", t, times, slot=slot, step=0, dst=dst)
        for i in range(times[0]):
            at = t + i * times[1] + self.chip.latency.mxm_out
            for j in range(4):
                self.put(dst + j, self.chip.mxm_position(number), at)
        self._assign(plane.slots, slot, t + (times[0] - 1) * times[1])

    # -- SXM and VXM

    def sxm(self) -> None:
        rng, wide = self.rng, self.rng.random() < 0.3
        op = rng.choice(("shift", "rotate", "permute", "distribute"))
        width = 4 if wide else 1
        side = rng.randint(0, 1)
        stream, x, t = self.somewhere([self.chip.sxm_position(side)], width)
        take, times, dst = self.take(), self.times(), self.stream(width)
        self.supplies(stream, width, x, t, take, times)
        rest = {"amount": rng.choice((0, 1, -1, 5, -16, 40))}
        if op in ("permute", "distribute"):
            rest = {"map": rng.randrange(self.maps) // 2 * 2 + (op == "distribute")}
        queue = self.first.sxm + side * self.chip.sxm_queues + rng.randrange(self.chip.sxm_queues)
        self.issue(queue, op, t, times, src=stream, dst=dst, wide=wide, take=take, **rest)
        latency = isa.latency(self.chip, isa.KINDS[op])
        for i in range(times[0]):
            for j in range(width):
                self.put(dst + j, x, t + i * times[1] + latency)

    def transpose(self) -> None:
        side = self.rng.randint(0, 1)
        x, t = self.chip.sxm_position(side), self.rng.randint(20, 20 + self.length)
        stream = self.rng.randrange(0, self.chip.streams, 16) + side * self.chip.streams
        dst = self.stream(16)
        self.supplies(stream, 16, x, t, True, (1, 1))
        queue = self.first.sxm + side * self.chip.sxm_queues + self.rng.randrange(3)
        self.issue(queue, "transpose", t, (1, 1), src=stream, dst=dst)
        for j in range(16):
            self.put(dst + j, x, t + self.chip.latency.sxm_transpose)

    def _operand(self, t: int, times: tuple[int, int]) -> tuple[int, int]:
        """Source and place of an ALU's operand."""
        rng = self.rng
        source = rng.choice((*isa.SOURCE_WIDTH, isa.Source.TAP, isa.Source.TAP, isa.Source.IMM))
        if source == isa.Source.TAP:
            found = [
                (alu, t - done)
                for alu, done in self.results
                if 0 <= t - done < self.chip.history_cycles
                and all((alu, done + i * times[1]) in self.results for i in range(times[0]))
            ]
            if found:
                alu, delay = rng.choice(sorted(found))
                return source, alu * isa.DELAYS + delay
            source = isa.Source.IMM
        if source == isa.Source.IMM:
            return source, 0
        width, take = isa.SOURCE_WIDTH[source], self.take()
        stream = self.stream(width)
        self.supplies(stream, width, self.chip.vxm_position, t, take, times)
        return source, 2 * stream + take

    def alu(self) -> None:
        rng, chip, times = self.rng, self.chip, self.times()
        number, op = rng.randrange(chip.alus), isa.ALU[rng.choice(list(isa.ALU))]
        _, x, t = self.somewhere([chip.vxm_position], 4)
        fields: dict[str, int] = {}
        for letter in "abc"[: op.operands]:
            fields[f"{letter}_from"], fields[f"{letter}_at"] = self._operand(t, times)
        if isa.Source.IMM in [fields[f"{letter}_from"] for letter in "abc"[: op.operands]]:
            fields["imm"] = rng.choice((*_FLOATS, rng.randint(-(1 << 31), (1 << 31) - 1)))
        width = rng.choice((0, 1, 2, 4))
        done = [t + i * times[1] + isa.latency(chip, isa.KINDS[op.name]) for i in range(times[0])]
        if any((number, end) in self.results for end in done):
            raise Full
        sides = rng.choice((("west",), ("east",), ("west", "east"))) if width else ()
        for side in sides:
            first = rng.randrange(0, chip.streams, width)
            fields[side] = first + 1
            for end in done:
                for j in range(width):
                    self.put((side == "east") * chip.streams + first + j, x, end)
        self.issue(self.first.vxm + number, op.name, t, times, width=width, **fields)
        for end in done:
            self.results.add((number, end))
            self.undo.append(lambda end=end: self.results.discard((number, end)))  # type: ignore[misc]
