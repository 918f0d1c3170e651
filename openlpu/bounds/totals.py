"""In: a Graph in plain ops, a Chip, the step's sizes. Out: what the whole step takes at least.

Weight install, MEM ports, streams and work count what must pass; the chain counts what must follow.
A step takes as long as the largest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openlpu.bounds import work
from openlpu.bounds.chain import ChainBound, chain_bound
from openlpu.bounds.work import Shape
from openlpu.chip import Chip
from openlpu.graph import Graph


@dataclass(frozen=True, slots=True)
class InstallBound:
    """tile_cycles: every tile of lanes x lanes loaded whole. byte_cycles: every byte once, which
    holds for any cut of the matrices and is what is proved."""

    weight_bytes: int
    tiles: int
    tile_cycles: int
    byte_cycles: int


@dataclass(frozen=True, slots=True)
class StepBound:
    """All bounds of one step, in cycles."""

    install: InstallBound
    port_cycles: int
    stream_cycles: int
    work_cycles: int
    chain: ChainBound

    @property
    def cycles(self) -> int:
        """No schedule takes fewer."""
        return max(
            self.install.byte_cycles,
            self.port_cycles,
            self.stream_cycles,
            self.work_cycles,
            self.chain.cycles,
        )


def install_bound(graph: Graph, chip: Chip) -> InstallBound:
    """Every weight into a plane once: `install_streams` vectors a cycle and plane."""
    matrices = [work.matrix(op) for op in graph.ops if op.kind == "linear"]
    lanes = chip.lanes
    tiles = sum(-(-n // lanes) * -(-k // lanes) for n, k in matrices)
    size = sum(n * k for n, k in matrices)
    vectors_a_cycle = chip.planes * chip.install_streams
    return InstallBound(
        size,
        tiles,
        -(-tiles * lanes // vectors_a_cycle),
        -(-size // (lanes * vectors_a_cycle)),
    )


def _matrix_bytes(graph: Graph, shape: Shape) -> int:
    """What the planes must be given as weights: matrices, keys and values."""
    weights = sum(n * k for n, k in (work.matrix(op) for op in graph.ops if op.kind == "linear"))
    kept = sum(work.cache_bytes(op, shape) for op in graph.ops if op.kind == "attention")
    return weights + 2 * kept


def port_bound(graph: Graph, chip: Chip, shape: Shape) -> int:
    """Cycles to read all that must be read, a word a slice and cycle. The keys and values of this
    step's own rows may come from the VXM instead."""
    rows = sum(shape.rows * op.params[0].shape[1] for op in graph.ops if op.kind == "embed")
    fresh = sum(
        2 * shape.rows * op.integer("kv_heads") * op.integer("head_dim")
        for op in graph.ops
        if op.kind == "attention"
    )
    size = _matrix_bytes(graph, shape) + rows - fresh
    return -(-size // (chip.slices * chip.lanes))


def stream_bound(graph: Graph, chip: Chip, shape: Shape) -> int:
    """Cycles for weights, keys and values to pass into the planes, on streams that run there."""
    vectors_a_cycle = 2 * min(chip.streams, chip.planes_per_hemisphere * chip.install_streams)
    return -(-_matrix_bytes(graph, shape) // (vectors_a_cycle * chip.lanes))


def work_bound(graph: Graph, chip: Chip, shape: Shape, inputs: Mapping[str, int]) -> int:
    """Cycles of the VXM for all operations, or of the planes for all products, full lanes each."""
    widths = work.widths(graph, inputs)
    lane_operations = sum(work.lane_operations(op, widths[op.out], shape) for op in graph.ops)
    products = sum(
        shape.rows * n * k for n, k in (work.matrix(op) for op in graph.ops if op.kind == "linear")
    )
    return max(
        -(-lane_operations // (chip.alus * chip.lanes)),
        -(-products // (chip.planes * chip.lanes**2)),
    )


def step_bound(
    graph: Graph,
    chip: Chip,
    shape: Shape,
    *,
    inputs: Mapping[str, int] | None = None,
    dense: bool = False,
) -> StepBound:
    """inputs, dense: see chain_bound. Raises UnsupportedModel for fused ops and other weights."""
    given = dict(inputs or {})
    return StepBound(
        install_bound(graph, chip),
        port_bound(graph, chip, shape),
        stream_bound(graph, chip, shape),
        work_bound(graph, chip, shape, given),
        chain_bound(graph, chip, shape, inputs=given, dense=dense),
    )
