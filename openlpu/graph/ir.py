"""In: nothing. Out: Graph, one step of a model over R rows, as plain frozen data.

A row is one token of one sequence; prefill and decode differ only in how many rows there are.
Values are matrices [rows, width] in one of four kinds:

    ids   token ids of the rows
    f32   float32
    q8    int8 with one scale per row
    g8    int8 with one scale per GROUP of 32 along the row

rows is "R" (all rows of the step) or "L" (the rows whose logits are wanted). Number formats are
attributes of ops and params, never a mode. A Param names a tensor and the recipe that makes it
from the checkpoint, so that passes move weights without touching them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from openlpu.errors import GraphError

Attr = int | float | str


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recipe: `kind` with plain arguments.

    gain NAME          multiply columns by the 1-D tensor NAME
    rotate_in SEED     w -> w R along K (R of order K)
    rotate_out SEED    w -> R^T w along N; a bias turns likewise
    heads_in H SEED    w -> w R2 along K, each of H equal parts on its own
    heads_out H SEED   w -> R2^T w along N, each of H equal parts on its own
    hadamard_in        w -> w H16 along K, blocks of 16
    """

    kind: str
    args: tuple[int | str, ...] = ()


@dataclass(frozen=True, slots=True)
class Param:
    """A weight: shape (N, K) = (out, in), or (N,) for a bias or gain.

    format: f32; w8 (int8, one float32 scale per row of N); or a block format kept from the
    checkpoint: q8_0, q4_0, q4_1 (groups of 32 along K).
    source is the canonical tensor name in the checkpoint; name is unique in the graph.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    source: str
    recipe: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """Type of one value."""

    kind: str  # ids f32 q8 g8
    rows: str  # R or L
    width: int


@dataclass(frozen=True, slots=True)
class Op:
    """out = kind(src..., params...) with attrs. Kinds are declared in graph/ops.py."""

    kind: str
    out: str
    src: tuple[str, ...]
    params: tuple[Param, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()  # sorted by name

    def attr(self, name: str, default: Attr | None = None) -> Attr:
        for key, value in self.attrs:
            if key == name:
                return value
        if default is None:
            raise GraphError(f"{self.kind} %{self.out} has no attribute {name!r}")
        return default

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.attr(name, default)
        if not isinstance(value, int):
            raise GraphError(f"{self.kind} %{self.out}: {name} is not an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.attr(name, default)
        if isinstance(value, str):
            raise GraphError(f"{self.kind} %{self.out}: {name} is not a number")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        return str(self.attr(name, default))


def attrs(**values: Attr) -> tuple[tuple[str, Attr], ...]:
    """Attributes in the order that Op keeps them."""
    return tuple(sorted(values.items()))


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies as data: fractions of a turn per position, units of 2**-64, one per pair,
    and the factor that multiplies sine and cosine."""

    turns: tuple[int, ...]
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True)
class Graph:
    """One step of a model. Inputs: "tokens" (ids, R). Positions, sequences, wanted rows and K/V
    come with the batch. `output` is the logits value (f32, L)."""

    name: str
    context: int  # positions the model was trained for
    rope: RopeTable
    ops: tuple[Op, ...]
    output: str
    meta: tuple[tuple[str, Attr], ...] = field(default=())

    @property
    def states(self) -> str:
        """The residual stream of the wanted rows, before the last norm: what the op rows picks.
        Empty for a graph that picks none."""
        return next((op.out for op in self.ops if op.kind == "rows"), "")

    def params(self) -> Iterator[Param]:
        """Every param once, in order of first use."""
        seen: set[str] = set()
        for op in self.ops:
            for param in op.params:
                if param.name not in seen:
                    seen.add(param.name)
                    yield param
