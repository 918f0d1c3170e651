"""In: a float Graph and how the checkpoint stores its matrices. Out: grouped weights, unrotated.

Matrices stored as q4_0, q4_1 or q8_0 are kept to the bit. A file of 4-bit blocks usually has a few
matrices in other encodings (the table, some down projections): those become q8_0, which is finer
than what they were. A checkpoint without a single kept matrix is refused: rounding it here to
blocks would be worse than w8 in every respect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op, Param
from openlpu.graph.ops import BLOCK_FORMATS
from openlpu.numerics import GROUP
from openlpu.passes.quantize_w8 import in_contract, insert_quant, quantized_name, refuse_odd_sizes
from openlpu.passes.rewrite import with_ops, with_params


def quantize_blocks(graph: Graph, encodings: Mapping[str, str]) -> Graph:
    """encodings says how the checkpoint stores each tensor. Raises UnsupportedModel when it
    stores none in blocks that import without loss, or when a size is not a multiple of 32."""
    refuse_odd_sizes(graph, multiple=GROUP)
    matrices = [param.source for param in graph.params() if len(param.shape) == 2]
    if not any(encodings.get(source) in BLOCK_FORMATS for source in matrices):
        raise UnsupportedModel(
            "precision w4 keeps the blocks of a checkpoint, and this one has no matrix in "
            f"{', '.join(BLOCK_FORMATS)}; use precision w8"
        )

    def in_blocks(param: Param) -> Param:
        if len(param.shape) == 1:
            return param
        stored = encodings.get(param.source, "")
        return replace(param, format=stored if stored in BLOCK_FORMATS else "q8_0")

    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "linear":
            insert_quant(ops, op.src[0], group=GROUP)
            op = replace(op, src=(quantized_name(op.src[0]),))
        ops.append(in_contract(with_params(op, in_blocks)))
    return with_ops(graph, ops)
