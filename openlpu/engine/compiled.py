"""In: a checkpoint and a precision. Out: Compiled: the graph after each pass, what runs it.

A start from the cache reads neither the checkpoint's tensors nor a recipe: the packed weights are
found by a key over the checkpoint's fingerprint, the contract and the graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from openlpu import __version__
from openlpu.compiler import compile_graph
from openlpu.engine.runner import ReferenceRunner
from openlpu.errors import RequestError
from openlpu.graph import Graph, Param, Tensor, TensorSource
from openlpu.graph.identity import IdentityHasher
from openlpu.graph.text import dumps
from openlpu.host import HostModel
from openlpu.host import build as build_host
from openlpu.host.engine import MAX_THREADS
from openlpu.jit import select
from openlpu.knobs import THREADS
from openlpu.load.config import ModelConfig
from openlpu.load.weights import Weights
from openlpu.numerics import CONTRACT
from openlpu.passes.recipe import Materializer
from openlpu.store import Store

if TYPE_CHECKING:
    from openlpu.chip import Chip
    from openlpu.program import Program

Precision = Literal["w8", "w4"]
PRECISIONS: tuple[Precision, ...] = ("w8", "w4")
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""

FIRST_PAGES = 16  # 1,024 positions


def as_precision(text: str) -> Precision:
    """The precision of that name, or RequestError."""
    if text not in PRECISIONS:
        raise RequestError(f"precision is {text!r}; give one of: {', '.join(PRECISIONS)}")
    return text


def as_threads(threads: int | None) -> int | None:
    """A count of threads, or None where the machine decides (None and 0); RequestError if bad."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise RequestError(f"threads is {threads!r}; give a whole number, 0 for one per core")
    name, count = ("threads", threads) if threads else (THREADS.env, THREADS.value)
    if not 0 <= count <= MAX_THREADS:
        raise RequestError(f"{name} is {count}; give 1 to {MAX_THREADS}, or 0 for one per core")
    return threads or None


@dataclass(frozen=True)
class Compiled:
    """A model's graphs. stages[0] is the float graph, stages[-1] what the engines run."""

    config: ModelConfig
    weights: Weights
    precision: Precision
    stages: tuple[tuple[str, Graph], ...]

    @property
    def float_graph(self) -> Graph:
        """The model in full precision, as the checkpoint means it."""
        return self.stages[0][1]

    @property
    def graph(self) -> Graph:
        """The graph after all passes."""
        return self.stages[-1][1]

    @cached_property
    def key(self) -> str:
        """Hex sha256 by which the packed weights of this model are found in the cache."""
        parts = (__version__, CONTRACT, self.weights.fingerprint(), dumps(self.graph))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def packed(self, store: Store) -> bool:
        """Whether the cache holds the packed weights, so that a start is a matter of moments."""
        return store.get("pack", self.key) is not None

    def packed_bytes(self, store: Store) -> NDArray[np.uint8]:
        """The file of packed weights, mapped: uint8 [bytes]; empty without one."""
        path = store.get("pack", self.key)
        return np.empty(0, np.uint8) if path is None else store.map(path)

    def host(
        self,
        *,
        threads: int | None = None,
        kernels: str | None = None,
        store: Store | None = None,
        pages: int = FIRST_PAGES,
        progress: Progress | None = None,
    ) -> HostModel:
        """The host engine for it, from the cache where possible. threads: None or 0 means one per
        usable core.

        Raises RequestError for a bad count of threads, UnsupportedTarget if the processor lacks
        `kernels`, StoreError if the cache fails.
        """
        threads = as_threads(threads)
        select(kernels)  # refused before packing, which takes long
        return build_host(
            self.graph,
            Materializer(self.weights),
            store=store or Store(),
            key=self.key,
            threads=threads,
            kernels=kernels,
            pages=pages,
            progress=progress,
        )

    def program(
        self,
        chip: Chip,
        *,
        rows: int = 1,
        sequences: int = 1,
        context: int = 1024,
        table_region: str = "",
        effort: int = 1,
        checkpoint: str = "",
        progress: Progress | None = None,
    ) -> Program:
        """The program of a step on a chip: `rows` rows, as many of each of `sequences` sequences
        of up to `context` positions. Its meta has what engine.onchip must know, its table "graph"
        the graph's text.
        table_region, effort: see schedule.build. checkpoint: where the tokenizer is found again.

        Raises DoesNotFit, UnsupportedModel, RequestError for sizes that make no sense.
        """
        # Only whoever compiles for a chip pays for the scheduler's start.
        from openlpu.schedule.build import Sizes, build_program

        if effort < 1:
            raise RequestError(f"effort is {effort}; give at least 1")
        if not 1 <= context <= self.graph.context:
            longest = f"{self.graph.context:,}, the model's own"
            raise RequestError(f"context is {context}; give 1 to {longest}")
        source = _Identified(self.graph, Materializer(self.weights))
        sizes = Sizes(rows, sequences, context, table_region)
        program = build_program(self.graph, source, chip, sizes, effort=effort, progress=progress)
        facts = {
            "checkpoint": checkpoint,
            "contract": CONTRACT,
            "identity": source.identity(),
            "precision": self.precision,
        }
        meta = {**json.loads(program.meta), **facts}
        text = np.frombuffer(dumps(self.graph).encode(), np.uint8)
        tables = {**program.tables, "graph": text}
        return replace(program, meta=json.dumps(meta, sort_keys=True), tables=tables)

    def reference(self, *, graph: Graph | None = None) -> ReferenceRunner:
        """The slow exact reference, of the last graph or of any other of `stages`."""
        return ReferenceRunner(graph or self.graph, Materializer(self.weights))


class _Identified:
    """A TensorSource that takes the identity of all it hands out, so that nothing is made twice."""

    def __init__(self, graph: Graph, source: TensorSource) -> None:
        self._graph, self._source = graph, source
        self._hasher = IdentityHasher(graph)
        self._seen: set[str] = set()

    def blocks(self, param: Param) -> Iterator[Tensor]:
        """Blocks as the source makes them."""
        yield from self._source.blocks(param)  # may be left half-way: not counted as seen

    def whole(self, param: Param) -> Tensor:
        """All rows at once."""
        tensor = self._source.whole(param)
        if param.name not in self._seen:
            self._seen.add(param.name)
            self._hasher.add(param, tensor)
        return tensor

    def identity(self) -> str:
        """graph.identity of the graph; reads what nobody asked for."""
        for param in self._graph.params():
            if param.name not in self._seen:
                self._seen.add(param.name)
                for block in self._source.blocks(param):
                    self._hasher.add(param, block)
        return self._hasher.hexdigest()


def compile_weights(
    config: ModelConfig, weights: Weights, *, precision: Precision = "w8", stop: str = ""
) -> Compiled:
    """Run the passes, all or up to the one named `stop`. No tensor is read."""
    encodings = {name: weights.encoding(name) for name in weights.names()}
    stages = compile_graph(config, encodings, precision=precision, stop=stop)
    return Compiled(config, weights, precision, tuple(stages))
