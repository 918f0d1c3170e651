"""In: nothing. Out: the Graph form (ir), what may stand in it (ops), its text form (text)."""

from openlpu.graph.ir import Attr, Graph, Op, Param, RopeTable, Step, Value, attrs
from openlpu.graph.ops import OPS, infer, types
from openlpu.graph.step import Batch
from openlpu.graph.tensors import F32Tensor, GroupedTensor, RowTensor, Tensor, TensorSource

__all__ = [
    "OPS",
    "Attr",
    "Batch",
    "F32Tensor",
    "Graph",
    "GroupedTensor",
    "Op",
    "Param",
    "RopeTable",
    "RowTensor",
    "Step",
    "Tensor",
    "TensorSource",
    "Value",
    "attrs",
    "infer",
    "types",
]
