"""In: a ModelConfig, how its tensors are stored. Out: the Graph after each pass.

PASSES is the whole list, per precision, in order. Each pass maps Graph to Graph; every result is
legal and runs on the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from openlpu.errors import RequestError
from openlpu.graph import Graph, types
from openlpu.graph.text import dumps
from openlpu.knobs import debug, timed
from openlpu.load.config import ModelConfig
from openlpu.models import build
from openlpu.passes.fold_gains import fold_gains
from openlpu.passes.fuse import fuse_gate_up, fuse_norm_quant, fuse_qkv, fuse_residual
from openlpu.passes.fuse_attention import fuse_attention
from openlpu.passes.quantize import quantize_blocks, quantize_w8
from openlpu.passes.rotate import rotate

Pass = Callable[[Graph, Mapping[str, str]], Graph]


def _of_graph(change: Callable[[Graph], Graph]) -> Pass:
    """A pass that needs to know nothing of the checkpoint."""
    return lambda graph, encodings: change(graph)


_FUSIONS: dict[str, Pass] = {
    "fuse_qkv": _of_graph(fuse_qkv),
    "fuse_attention": _of_graph(fuse_attention),
    "fuse_gate_up": _of_graph(fuse_gate_up),
    "fuse_norm_quant": _of_graph(fuse_norm_quant),
    "fuse_residual": _of_graph(fuse_residual),
}
PASSES: dict[str, dict[str, Pass]] = {
    "f32": {},
    "w8": {
        "fold_gains": _of_graph(fold_gains),
        "rotate": _of_graph(rotate),
        "quantize_w8": _of_graph(quantize_w8),
        **_FUSIONS,
    },
    "w4": {
        "quantize_blocks": quantize_blocks,
        **_FUSIONS,
    },
}


def compile_graph(
    config: ModelConfig,
    encodings: Mapping[str, str],
    precision: str = "w8",
    *,
    stop: str = "",
) -> list[tuple[str, Graph]]:
    """(pass name, Graph after it), beginning with ("build", the float Graph).

    The last Graph is what an engine runs; `stop` names the last pass to run (default: all).
    encodings says how the checkpoint stores each tensor (only w4 reads it). Raises RequestError
    for an unknown precision or pass, UnsupportedModel where the precision cannot express the
    model.
    """
    if precision not in PASSES:
        raise RequestError(f"precision {precision!r} is not one of: {', '.join(PASSES)}")
    passes = PASSES[precision]
    if stop and stop not in ("build", *passes):
        raise RequestError(f"pass {stop!r} is not one of: {', '.join(('build', *passes))}")
    graph = build(config)
    types(graph)
    stages = [("build", graph)]
    for name, run in passes.items():
        if stages[-1][0] == stop:
            break
        with timed(2, f"pass {name}"):
            graph = run(graph, encodings)
        stages.append((name, graph))
    for name, graph in stages:
        _tell(name, graph)
    return stages


def _tell(name: str, graph: Graph) -> None:
    debug(2, lambda: f"after {name}: {len(graph.ops)} ops")
    debug(3, lambda: dumps(graph))
