"""In: a rotated float Graph. Out: W8A8: int8 products with a scale per row of weights and values.

The table and every linear get format w8; what a linear reads is quantized, once per value. The
inputs of down get the online Hadamard of 16, with its inverse in the weights. Norms take their
16-bit form, attention its int8 form.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op, Param, attrs
from openlpu.numerics import CHUNK, SUPERLANE
from openlpu.passes.rewrite import Wires, with_attrs, with_ops, with_params, with_step


def quantize_w8(graph: Graph) -> Graph:
    """Raises UnsupportedModel when a size is not a multiple of 16."""
    refuse_odd_sizes(graph, multiple=SUPERLANE)
    wires = Wires(graph)
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "embed":
            ops.append(with_params(op, lambda p: replace(p, format="w8")))
        elif op.kind == "linear":
            hadamard = SUPERLANE if wires.made_by(op.src[0], "swiglu") else 0
            insert_quant(ops, op.src[0], hadamard=hadamard)
            op = with_params(op, partial(_quantized, hadamard=hadamard))
            ops.append(replace(op, src=(quantized_name(op.src[0]),)))
        else:
            ops.append(in_contract(op))
    return with_ops(graph, ops)


def refuse_odd_sizes(graph: Graph, *, multiple: int) -> None:
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


def quantized_name(value: str) -> str:
    """The name of a value after its quantization."""
    return f"{value}.q8"


def insert_quant(ops: list[Op], value: str, *, hadamard: int = 0, group: int = 0) -> None:
    """Append the op that quantizes `value`, unless an earlier reader needed it already."""
    out = quantized_name(value)
    if all(op.out != out for op in reversed(ops)):
        ops.append(Op("quant", out, (value,), (), attrs(group=group, hadamard=hadamard)))


def in_contract(op: Op) -> Op:
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
