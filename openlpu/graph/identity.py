"""In: a Graph and its canonical tensors. Out: the identity, a sha256 that promises equal bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from openlpu.graph.ir import Graph, Param
from openlpu.graph.tensors import F32Tensor, GroupedTensor, Tensor, TensorSource
from openlpu.graph.text import dumps
from openlpu.numerics import CONTRACT


def identity(graph: Graph, source: TensorSource) -> str:
    """Hex sha256 over the contract's version, the graph's text and every canonical tensor.

    Equal identities promise equal bits; no machine's layout and no file name enters it.
    """
    hasher = IdentityHasher(graph)
    for param in graph.params():
        for block in source.blocks(param):
            hasher.add(param, block)
    return hasher.hexdigest()


class IdentityHasher:
    """The identity, streamed. Params may come in any order and their rows in blocks of any size;
    the rows of one param come in order."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._parts = {param.name: [hashlib.sha256() for _ in range(3)] for param in graph.params()}

    def add(self, param: Param, block: Tensor) -> None:
        """The next rows of a param."""
        for part, array in zip(self._parts[param.name], _arrays(block), strict=False):
            part.update(np.ascontiguousarray(array).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The identity, once every row of every param was added."""
        total = hashlib.sha256(f"{CONTRACT}\n{dumps(self._graph)}".encode())
        for parts in self._parts.values():
            for part in parts:
                total.update(part.digest())
        return total.hexdigest()


def _arrays(block: Tensor) -> Iterator[NDArray[np.generic]]:
    """A tensor's arrays, little-endian, in their declared order."""
    if isinstance(block, F32Tensor):
        yield block.value.astype("<f4", copy=False)
        return
    yield block.q
    yield block.scale.astype("<f4", copy=False)
    if isinstance(block, GroupedTensor) and block.minimum is not None:
        yield block.minimum.astype("<f4", copy=False)
