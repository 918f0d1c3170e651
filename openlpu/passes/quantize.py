"""In: a float Graph. Out: W8A8 (quantize_w8), or the checkpoint's own blocks (quantize_blocks).

w8: the table and every linear get int8 weights with a scale per row; the input of down gets the
online Hadamard of 16, with its inverse in the weights. Blocks: matrices stored as q4_0, q4_1 or
q8_0 are kept to the bit; a file of 4-bit blocks usually has a few matrices in other encodings (the
table, some down projections), and those become q8_0, which is finer than what they were.
In both, what a linear reads is quantized once, norms take 16 bits and attention int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op, Param, attrs
from openlpu.graph.ops import BLOCK_FORMATS
from openlpu.numerics import CHUNK, GROUP, SUPERLANE
from openlpu.passes.rewrite import Wires, with_attrs, with_ops, with_params, with_step


def quantize_w8(graph: Graph) -> Graph:
    """Raises UnsupportedModel when a size is not a multiple of 16."""
    _refuse_odd_sizes(graph, multiple=SUPERLANE)
    wires = Wires(graph)
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "embed":
            ops.append(with_params(op, lambda p: replace(p, format="w8")))
        elif op.kind == "linear":
            hadamard = SUPERLANE if wires.made_by(op.src[0], "swiglu") else 0
            _insert_quant(ops, op.src[0], hadamard=hadamard)
            op = with_params(op, partial(_quantized, hadamard=hadamard))
            ops.append(replace(op, src=(_quantized_name(op.src[0]),)))
        else:
            ops.append(_in_contract(op))
    return with_ops(graph, ops)


def quantize_blocks(graph: Graph, encodings: Mapping[str, str]) -> Graph:
    """encodings says how the checkpoint stores each tensor. Raises UnsupportedModel when it
    stores none in blocks that import without loss, or when a size is not a multiple of 32."""
    _refuse_odd_sizes(graph, multiple=GROUP)
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
            _insert_quant(ops, op.src[0], group=GROUP)
            op = replace(op, src=(_quantized_name(op.src[0]),))
        ops.append(_in_contract(with_params(op, in_blocks)))
    return with_ops(graph, ops)


def _refuse_odd_sizes(graph: Graph, *, multiple: int) -> None:
    """UnsupportedModel for the first matrix or head whose inputs are not whole superlanes."""
    for op in graph.ops:
        if op.kind == "attention" and op.integer("head_dim") % SUPERLANE:
            raise UnsupportedModel(
                f"head_dim {op.integer('head_dim')} is not a multiple of {SUPERLANE}; "
                "only precision f32 can run this model"
            )
        for param in op.params:
            if op.kind == "linear" and param.shape[-1] % multiple and len(param.shape) == 2:
                raise UnsupportedModel(
                    f"{param.source} has {param.shape[1]} inputs, not a multiple of {multiple}; "
                    "only precision f32 can run this model"
                )


def _quantized_name(value: str) -> str:
    """The name of a value after its quantization."""
    return f"{value}.q8"


def _insert_quant(ops: list[Op], value: str, *, hadamard: int = 0, group: int = 0) -> None:
    """Append the op that quantizes `value`, unless an earlier reader needed it already."""
    out = _quantized_name(value)
    if all(op.out != out for op in reversed(ops)):
        ops.append(Op("quant", out, (value,), (), attrs(group=group, hadamard=hadamard)))


def _in_contract(op: Op) -> Op:
    """Norms and attention in the formats of the contract; other ops as they are."""
    if op.kind == "rmsnorm":
        return with_attrs(op, bits=16)
    if op.kind == "attention":
        return with_attrs(op, format="i8", chunk=CHUNK)
    return op


def _quantized(param: Param, *, hadamard: int) -> Param:
    if len(param.shape) == 1:
        return param  # a bias stays float32
    quantized = replace(param, format="w8")
    return with_step(quantized, "hadamard_in") if hadamard else quantized
