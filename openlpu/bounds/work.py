"""In: Ops of a plain Graph, a Chip and the step's sizes. Out: how much of each there is to do.

Operations of the VXM per element, operations in a row, bytes of weights, products: counted as the
contract (docs/numerics.md) has them, without those that a schedule can do away with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openlpu.chip import Chip
from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op
from openlpu.graph.ops import weights_and_biases
from openlpu.numerics.functions import EXP2_COEFFICIENTS

_EXP2_OPS = 2 + 2 * len(EXP2_COEFFICIENTS)  # rint, difference, and a product and a sum each
_SILU_OPS = 1 + _EXP2_OPS + 1 + 2  # product, exp2, times 2^n, sum, quotient
FUSED = "the bounds are those of plain ops; take the fused ones apart first (schedule.normal.plain)"


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: rows of `sequences` sequences, as many of each; the last row of each sequence stands
    at position context - 1."""

    rows: int = 1
    sequences: int = 1
    context: int = 1

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the rows of one sequence."""
        per = self.rows // self.sequences
        return tuple(max(0, self.context - per + i) for i in range(per))


@dataclass(frozen=True, slots=True)
class Latencies:
    """Cycles of chains of VXM operations, each as long as its longest way."""

    integer: int
    product: int
    sum: int
    convert: int
    divide: int

    @property
    def exp2(self) -> int:
        """Up to the product with 2^n, which is exact and can be left to a later product."""
        horner = len(EXP2_COEFFICIENTS) * (self.product + self.sum)
        return self.convert + self.sum + horner

    @property
    def silu(self) -> int:
        """One whole exp2: adding to an exponent is the least that a product with 2^n costs."""
        return self.product + self.exp2 + self.integer + self.sum + self.divide

    def root(self, width: int) -> int:
        """From the sums of squares to 1 / sqrt(mean + eps). Factors 2^k cost nothing: they can be
        put into the others; so does the division by a width that is a power of two."""
        mean = 0 if width & (width - 1) == 0 else self.divide
        return self.convert + 2 * self.sum + mean + self.product + self.sum + 2 * self.divide


def latencies(chip: Chip) -> Latencies:
    lat = chip.latency
    return Latencies(lat.alu_int, lat.alu_mul, lat.alu_float, lat.alu_convert, lat.alu_divide)


def matrix(op: Op) -> tuple[int, int]:
    """Outputs and inputs of a linear. Raises UnsupportedModel for fused ops and other formats."""
    at, _ = weights_and_biases(op)
    weights = [op.params[i] for i in at]
    if op.text("epilogue", "none") != "none":
        raise UnsupportedModel(FUSED)
    if any(weight.format != "w8" for weight in weights):
        raise UnsupportedModel("the bounds are those of 8-bit weights with a scale a row")
    return sum(weight.shape[0] for weight in weights), weights[0].shape[1]


def has_bias(op: Op) -> bool:
    return len(op.params) > op.integer("weights", 1)


def widths(graph: Graph, inputs: Mapping[str, int]) -> dict[str, int]:
    """The width of every value; inputs: those of values that lie in memory."""
    found = dict(inputs)
    for op in graph.ops:
        match op.kind:
            case "embed":
                found[op.out] = op.params[0].shape[1]
            case "linear":
                found[op.out] = matrix(op)[0]
            case "slice":
                found[op.out] = op.integer("width")
            case "rmsnorm" | "quant" | "rope" | "add" | "swiglu" | "attention" | "rows":
                found[op.out] = found[op.src[0]]
            case _:
                raise UnsupportedModel(FUSED)
        if op.kind == "attention" and len(op.src) != 3:
            raise UnsupportedModel(FUSED)
    return found


def visible(op: Op, position: int) -> int:
    """How many positions a query at `position` sees."""
    window = op.integer("window", 0)
    return min(position + 1, window) if window else position + 1


def chunks(op: Op, position: int) -> int:
    """How many chunks hold a visible position."""
    size = op.integer("chunk")
    return position // size - (position + 1 - visible(op, position)) // size + 1


def largest_chunk(op: Op, position: int) -> int:
    """The most visible positions that one chunk holds."""
    size, first = op.integer("chunk"), position + 1 - visible(op, position)
    return max(
        min(position + 1, (i + 1) * size) - max(first, i * size)
        for i in range(first // size, position // size + 1)
    )


def lane_operations(op: Op, width: int, shape: Shape) -> int:
    """Operations on single elements that the VXM cannot be spared, of all rows."""
    match op.kind:
        case "embed":
            each = 2
        case "rmsnorm":
            each = 5 + bool(op.params)  # largest, product, to an integer, its high byte, product
        case "quant":
            each = 2 + 4 * bool(op.integer("hadamard", 0))
        case "linear":
            each = 2 + has_bias(op)
        case "rope":
            each = 3
        case "add":
            each = 1
        case "swiglu":
            each = _SILU_OPS + 1
        case "attention":
            return shape.sequences * sum(_attend_operations(op, p) for p in shape.positions)
        case _:
            each = 0
    return shape.rows * width * each


def _attend_operations(op: Op, position: int) -> int:
    heads, dim = op.integer("heads"), op.integer("head_dim")
    # score: 2; largest; difference and exp2; integer of it; times scale; largest; to bytes: 2
    scores = heads * visible(op, position) * (2 + 1 + 1 + _EXP2_OPS + 1 + 1 + 1 + 2)
    count = chunks(op, position)
    return scores + heads * dim * (2 * count + 3 * (count - 1) + 1)


def cache_bytes(op: Op, shape: Shape) -> int:
    """Keys, or values, that the step's queries see: one of the two, of all sequences."""
    size = op.integer("kv_heads") * op.integer("head_dim")
    return shape.sequences * visible(op, shape.context - 1) * size
