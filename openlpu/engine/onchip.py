"""In: a Program of a model and a simulator of its chip. Out: OnChip, a Runner: steps in cycles.

The program's rows belong to its sequences, equally many to each; a batch that brings more of one
sequence takes several steps of the chip, one after the other. K/V live in the chip's memory, where
a sequence's positions have fixed places: who begins anew writes over what was there.

A program may come from a stranger's file: what its meta says is judged before it is used.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.engine.pages import pages_for
from openlpu.engine.runner import Runner
from openlpu.engine.verify import Differences
from openlpu.errors import GraphError, MachineError, ProgramError, RequestError
from openlpu.graph import Graph
from openlpu.graph.step import Batch
from openlpu.graph.text import loads
from openlpu.program import Program
from openlpu.sim.drive import Driver, Machine
from openlpu.sim.result import Result

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

MachineName = Literal["fast", "step"]
MACHINES: tuple[MachineName, ...] = ("fast", "step")

_COUNTS = (
    *("rows", "sequences", "context", "layers", "vocabulary", "chunk", "groups"),
    *("chunks_per_group", "tiles_per_chunk", "head_dim"),
)
_TABLE = (
    *("rows_per_slice", "slices", "vectors"),
    *("scale_tokens", "scale_words", "scale_slices"),
)
_MOST = 1 << 24  # of any count: a number beyond is a mistake, and would take memory
_MOST_ROWS = 1 << 12
_TURN = re.compile(r"[0-9a-f]{16}")
_MAGNITUDE = re.compile(r"0x[01](\.[0-9a-f]{1,13})?p[+-][0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a compiled program says about itself. Texts may be empty: a stranger wrote them."""

    model: str
    checkpoint: str
    """Where the tokenizer is: a name or a path, as it was given to the compiler."""
    precision: str
    identity: str
    """Hex sha256 over contract, graph and tensors: equal identities promise equal bits."""
    rows: int
    sequences: int
    context: int
    vocabulary: int
    group_positions: int
    """A sequence of n positions takes n / group_positions groups, rounded up."""

    @property
    def rows_of_a_sequence(self) -> int:
        return self.rows // self.sequences


@dataclass(frozen=True, slots=True)
class ChipStep:
    """One step of the chip: whose rows it computed, how long it took there, and here."""

    positions: tuple[int, ...]
    slots: tuple[int, ...]
    cycles: int
    machine_s: float
    """Seconds in the simulator, the host's work around it left out."""


def facts(program: Program) -> Facts:
    """The facts of a model's program. Raises ProgramError if it is none."""
    meta = _meta(program)
    texts = {name: meta.get(name, "") for name in ("model", "checkpoint", "precision", "identity")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ProgramError(f"the program's meta: {name} is no text")
    counts = {name: meta[name] for name in ("rows", "sequences", "context", "vocabulary")}
    return Facts(**texts, **counts, group_positions=meta["chunk"] * meta["chunks_per_group"])


def graph_of(program: Program) -> Graph:
    """The Graph that the program was made from. Raises ProgramError if it does not hold it."""
    text = program.tables.get("graph")
    if text is None or text.dtype != np.uint8 or text.ndim != 1:
        raise ProgramError("the program holds no graph")
    try:
        return loads(text.tobytes().decode())
    except (UnicodeDecodeError, GraphError) as error:
        raise ProgramError(f"the program's graph: {error}") from None


def machine(program: Program, chip: Chip, name: MachineName = "fast") -> Machine:
    """A chip with the program in its memory. fast: compiled tables; step: cycle by cycle, plainly.

    Raises ProgramError where the program is not legal.
    """
    if name == "fast":
        from openlpu.sim.fast import Fast

        return Fast(program, chip)
    from openlpu.check import check
    from openlpu.sim.step import Step

    check(program, chip)  # the same faults as from fast, before anything runs
    return Step(program, chip)


class OnChip:
    """A simulated chip as a Runner. Slots of a batch are the program's sequences."""

    def __init__(
        self,
        program: Program,
        chip: Chip,
        on: Machine,
        *,
        told: Callable[[ChipStep], None] | None = None,
    ) -> None:
        """on: what simulates the chip. told: called after each of its steps.

        Raises ProgramError if the program is no model's.
        """
        self.facts = facts(program)
        _demand_ports(program, self.facts)
        self.max_rows = self.facts.rows
        self.rows_of_a_sequence = self.facts.rows_of_a_sequence
        self.slots = self.facts.sequences
        self.shares_pages = False
        self.pages = pages_for(self.facts.context) * self.facts.sequences
        self.steps: list[ChipStep] = []
        self._clocked = _Clocked(on)
        self._driver: Driver | None = Driver(program, chip, self._clocked)
        self._told = told

    @property
    def identity(self) -> str:
        """Hex sha256 that promises equal bits; "" if the program's maker gave none."""
        return self.facts.identity

    @property
    def cycles(self) -> int:
        """Cycles simulated so far."""
        return sum(step.cycles for step in self.steps)

    def grow(self, pages: int) -> None:
        """Only the count: a position's place in the chip's memory is fixed."""
        self.pages = pages

    def step(self, batch: Batch) -> F32:
        """Logits float32 [L, V] of the wanted rows, after as many steps of the chip as needed.

        Raises RequestError for rows outside what the program was compiled for.
        """
        logits = np.zeros((len(batch.wanted), self.facts.vocabulary), np.float32)
        for part in cut(batch.slots, self.facts):
            chosen = np.isin(batch.wanted, part)
            wanted = np.searchsorted(part, batch.wanted[chosen]).astype(np.int32)
            logits[chosen] = self._step(
                Batch(
                    batch.tokens[part],
                    batch.positions[part],
                    batch.slots[part],
                    wanted,
                    batch.pages,
                )
            )
        return logits

    def _step(self, batch: Batch) -> F32:
        driver = self._driver
        assert driver is not None, "the runner is closed"
        try:
            logits = driver.step(batch)
        except (IndexError, OverflowError) as error:
            raise ProgramError(f"the program's meta does not fit its ports: {error}") from error
        report = driver.reports.pop()
        found, predicted = report.result.cycles, report.predicted_cycles
        if found != predicted:
            raise MachineError(f"a step took {found:,} cycles, and {predicted:,} were predicted")
        positions, slots = batch.positions.tolist(), batch.slots.tolist()
        step = ChipStep(tuple(positions), tuple(slots), found, self._clocked.take_s())
        self.steps.append(step)
        if self._told is not None:
            self._told(step)
        return logits

    def close(self) -> None:
        """Forget the chip and its memory."""
        self._driver = None


class Checked:
    """A Runner that runs every step on another one, too, and compares the logits of all rows. Its
    answers are the first one's."""

    def __init__(self, first: Runner, second: Runner) -> None:
        self._first, self._second = first, second
        self._found = Differences()
        self.max_rows = min(first.max_rows, second.max_rows)
        self.rows_of_a_sequence = min(first.rows_of_a_sequence, second.rows_of_a_sequence)
        self.slots = min(first.slots, second.slots)
        self.shares_pages = first.shares_pages and second.shares_pages
        self.pages = 0
        self.grow(max(first.pages, second.pages))
        self.second_s = 0.0
        """Seconds in the second one."""

    @property
    def logits(self) -> int:
        """Numbers compared."""
        return self._found.compared // 32

    @property
    def differing_bits(self) -> int:
        return self._found.differing

    def grow(self, pages: int) -> None:
        """Make both pools this large."""
        self.pages = pages
        for runner in (self._first, self._second):
            if runner.pages < pages:
                runner.grow(pages)

    def step(self, batch: Batch) -> F32:
        """Logits float32 [L, V] of the wanted rows."""
        rows = np.arange(len(batch.tokens), dtype=np.int32)
        whole = Batch(batch.tokens, batch.positions, batch.slots, rows, batch.pages)
        mine = self._first.step(whole)
        began_s = time.perf_counter()
        others = self._second.step(whole)
        self.second_s += time.perf_counter() - began_s
        self._found.add(mine, others)
        wanted: F32 = mine[batch.wanted]
        return wanted

    def close(self) -> None:
        """Give the memory of both back."""
        self._first.close()
        self._second.close()


def cut(slots: I32, sizes: Facts) -> list[NDArray[np.int64]]:
    """Which rows of a batch each step of the chip computes, in order: as many of each sequence as
    the program takes. Raises RequestError for a sequence that it has not."""
    if len(slots) and int(slots.max()) >= sizes.sequences:
        raise RequestError(
            f"the program holds {sizes.sequences} sequences; compile it with more --sequences"
        )
    turn = np.zeros(len(slots), np.int64)
    for slot in np.unique(slots):
        rows = np.flatnonzero(slots == slot)
        turn[rows] = np.arange(len(rows)) // sizes.rows_of_a_sequence
    return [np.flatnonzero(turn == i) for i in range(int(turn.max(initial=-1)) + 1)]


class _Clocked:
    """A Machine, and the seconds that its steps took."""

    def __init__(self, on: Machine) -> None:
        self._on = on
        self.read, self.write = on.read, on.write
        self._s = 0.0

    def run(self, params: dict[str, tuple[int, ...]]) -> Result:
        began_s = time.perf_counter()
        result = self._on.run(params)
        self._s += time.perf_counter() - began_s
        return result

    def take_s(self) -> float:
        """Seconds since the last time."""
        taken, self._s = self._s, 0.0
        return taken


def _meta(program: Program) -> dict[str, Any]:
    """The meta of a model's program, every entry that drives it of the right kind and in range."""

    def demand(condition: bool, what: str) -> None:
        if not condition:
            raise ProgramError(f"the program is no compiled model: {what}")

    try:
        meta = json.loads(program.meta)
    except (ValueError, RecursionError):
        meta = None
    demand(isinstance(meta, dict), "its meta is no JSON object")
    table, rope = meta.get("table"), meta.get("rope")
    demand(isinstance(table, dict), "its meta has no table")
    demand(isinstance(rope, dict), "its meta has no rope")
    counts = [(name, meta.get(name)) for name in _COUNTS]
    counts += [(f"table.{name}", table.get(name)) for name in _TABLE]
    for name, value in counts:
        whole = isinstance(value, int) and not isinstance(value, bool)
        demand(whole and 1 <= value <= _MOST, f"its meta's {name} is no count")
    demand(meta["rows"] <= _MOST_ROWS, f"its meta's rows are more than {_MOST_ROWS:,}")
    demand(meta["rows"] % meta["sequences"] == 0, "its rows are no multiple of its sequences")
    windows, turns, magnitude = meta.get("windows"), rope.get("turns"), rope.get("magnitude")
    demand(isinstance(windows, list) and len(windows) == meta["layers"], "its windows are no list")
    sound = all(type(window) is int and 0 <= window <= _MOST for window in windows)
    demand(sound, "a window is no count")
    demand(isinstance(turns, list), "its rope has no turns")
    sound = all(isinstance(turn, str) and _TURN.fullmatch(turn) for turn in turns)
    demand(sound, "a turn of its rope is no 16 hex digits")
    sound = isinstance(magnitude, str) and _MAGNITUDE.fullmatch(magnitude) is not None
    demand(sound, "the magnitude of its rope is no number")
    found: dict[str, Any] = meta
    return found


def _demand_ports(program: Program, sizes: Facts) -> None:
    """Raise ProgramError unless the program gives logits of its rows and counts its groups."""
    ports = [port for port in program.ports if port.name == "logits"]
    logits = ports[0] if len(ports) == 1 and ports[0].direction == "out" else None
    if logits is None or logits.rows != sizes.rows:
        raise ProgramError("the program is no compiled model: it has no logits of its rows")
    words = {len(vector.slices) for vector in logits.vectors}
    if words != {4} or int(logits.features.max(initial=-1)) + 1 != sizes.vocabulary:
        raise ProgramError("the program's logits are no float32 of its vocabulary")
    if [(param.name, param.values) for param in program.params] != [("groups", sizes.sequences)]:
        raise ProgramError("the program's parameters are no groups of its sequences")
