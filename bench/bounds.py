"""In: nothing. Out: of each operation its lower bound and its cycles in the schedule; the totals.

    python bench/bounds.py [--chip tsp_v1] [--model smollm2] [--context 1024] [--effort 1]
    python bench/bounds.py --mlp

The first schedules one token of a model, the second one MLP of Llama-3-8B (176 MB of weights). The
bounds are argued in docs/bounds.md; an operation's cycles are those by which the section grows
until it is done, after the one before it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from openlpu import isa
from openlpu.bounds import ChainBound, Shape, StepBound, step_bound
from openlpu.chip import Chip, load_chip
from openlpu.engine.model import open_model
from openlpu.graph import Graph
from openlpu.graph.ir import RopeTable
from openlpu.passes.recipe import Materializer
from openlpu.program import Section, cycles
from openlpu.schedule.build import Sizes, build_program
from openlpu.schedule.mlp import build_mlp, mlp_ops
from openlpu.schedule.normal import plain

_DIM, _FFN_DIM = 4096, 14336  # Llama-3-8B
_SECTIONS = ("embed", "before", "attend", "after", "head")


def main() -> None:
    """Schedule and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="tsp_v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--effort", type=int, default=1)
    parser.add_argument("--mlp", action="store_true")
    options = parser.parse_args()
    chip = load_chip(options.chip)
    if options.mlp:
        show_mlp(chip)
    else:
        show_model(options.model, chip, options.context, options.effort)


def show_mlp(chip: Chip) -> None:
    """One MLP, random int8 weights."""
    rng = np.random.default_rng(0)
    shapes = {"gate_up": (2 * _FFN_DIM, _DIM), "down": (_DIM, _FFN_DIM)}
    tensors = {
        name: (
            rng.integers(-127, 128, shape).astype(np.int8),
            rng.uniform(1e-4, 3e-4, shape[0]).astype(np.float32),
        )
        for name, shape in shapes.items()
    }
    program = build_mlp(tensors, chip)
    graph = Graph("mlp", 1, RopeTable(()), mlp_ops(_DIM, _FFN_DIM), "y")
    bound = step_bound(graph, chip, Shape(), inputs={"x": _DIM})
    dense = step_bound(graph, chip, Shape(), inputs={"x": _DIM}, dense=True)
    head()
    names = [b.op for b in bound.chain.bounds]
    rows(names, bound.chain, dense.chain, ends(program.sections[0], chip), 0)
    totals(bound, dense, cycles(program, {}))


def show_model(name: str, chip: Chip, context: int, effort: int) -> None:
    """One token of a model at the end of its context."""
    _, compiled = open_model(name)
    started_s = time.perf_counter()
    source = Materializer(compiled.weights)
    program = build_program(compiled.graph, source, chip, Sizes(1, 1, context), effort=effort)
    print(f"scheduled in {time.perf_counter() - started_s:.0f} s")
    graph = plain(compiled.graph)
    shape = Shape(1, 1, context)
    bound, dense = step_bound(graph, chip, shape), step_bound(graph, chip, shape, dense=True)
    sections = {section.name: section for section in program.sections}
    groups = by_section(graph, {b.op for b in bound.chain.bounds})
    head()
    for part in _SECTIONS:
        shift = "l0." if part in ("before", "attend", "after") else ""
        section, ops = sections[part], groups[part]
        found = ends(section, chip)
        if shift:
            found = {name.replace("l0.", "l1.", 1): end for name, end in found.items()}
        if part == "attend":
            found = {ops[0]: section.cycles}
        rows(ops, bound.chain, dense.chain, found, section.cycles)
    highest = {p.name: (p.highest,) * p.values for p in program.params}
    totals(bound, dense, cycles(program, highest))


def by_section(graph: Graph, known: set[str]) -> dict[str, list[str]]:
    """Names of ops by the section that computes them. Layer 1 stands for all: the bounds of layer 0
    are a little smaller, since its row comes from a table."""
    at = [i for i, op in enumerate(graph.ops) if op.kind == "attention"]
    size = at[1] - at[0]
    first = 1 + size  # of layer 1
    cuts = {
        "embed": (0, 1),
        "before": (first, at[1]),
        "attend": (at[1], at[1] + 1),
        "after": (at[1] + 1, first + size),
        "head": (1 + len(at) * size, len(graph.ops)),
    }
    return {
        name: [op.out for op in graph.ops[begin:end] if op.out in known]
        for name, (begin, end) in cuts.items()
    }


def ends(section: Section, chip: Chip) -> dict[str, int]:
    """Of each value the cycle at which the last instruction that makes it has its result."""
    found: dict[str, int] = {}
    for issue in section.issues:
        kind = isa.KINDS[issue.op]
        name = section.tags[issue.tag].split(" ")[0]
        if kind.latency and kind.unit != "mem":
            end = issue.last_cycle + isa.latency(chip, kind)
            found[name] = max(found.get(name, 0), end)
    return found


def head() -> None:
    print(f"{'operation':30}{'bound':>7}{'dense':>7}{'work':>7}{'cycles':>8}{'ratio':>7}  why")


def rows(
    names: list[str],
    bound: ChainBound,
    dense: ChainBound,
    found: dict[str, int],
    section_cycles: int,
) -> None:
    """Bounds are those by which an operation moves the end of the longest way."""
    before, sums = 0, [0, 0]
    for name in names:
        least = [moved(chain, name) for chain in (bound, dense)]
        of = bound.of(name)
        sums = [a + b for a, b in zip(sums, least, strict=True)]
        end = max(before, found.get(name, before))
        took, before = end - before, end
        if of.latency_cycles == 0 and took == 0:
            continue
        ratio = f"{took / least[0]:7.2f}" if least[0] > 0 and took > 0 else " " * 7
        print(f"{name:30}{least[0]:7,}{least[1]:7,}{of.work_cycles:7,}{took:8,}{ratio}  {of.why}")
    if section_cycles:
        ratio = section_cycles / max(1, sums[0])
        print(f"{'= section':30}{sums[0]:7,}{sums[1]:7,}{'':7}{section_cycles:8,}{ratio:7.2f}\n")


def moved(chain: ChainBound, name: str) -> int:
    """By how much an operation moves the end; 0 beside the longest way."""
    if name not in chain.path:
        return 0
    at = chain.path.index(name)
    known = {b.op: b.end_cycle for b in chain.bounds}
    return known[name] - (known.get(chain.path[at - 1], 0) if at else 0)


def totals(bound: StepBound, dense: StepBound, took: int) -> None:
    install = bound.install
    print(f"weights          {install.weight_bytes:10,} bytes in {install.tiles:,} tiles")
    for what, least in (
        ("install, tiles", install.tile_cycles),
        ("install, bytes", install.byte_cycles),
        ("MEM ports", bound.port_cycles),
        ("streams", bound.stream_cycles),
        ("work", bound.work_cycles),
        ("chain", bound.chain.cycles),
        ("largest", bound.cycles),
        ("largest, dense", dense.cycles),
    ):
        print(f"{what:17}{least:10,} cycles; schedule {took:,}: ratio {took / least:.3f}")


if __name__ == "__main__":
    main()
