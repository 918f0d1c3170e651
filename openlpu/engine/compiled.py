"""In: a checkpoint and a precision. Out: Compiled: the graph after each pass, and runners for it.

A start from the cache reads neither the checkpoint's tensors nor a recipe: the packed weights are
found by a key over the checkpoint's fingerprint, the contract and the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from openlpu import __version__
from openlpu.compiler import compile_graph
from openlpu.engine.runner import ReferenceRunner
from openlpu.errors import RequestError
from openlpu.graph import Graph
from openlpu.graph.text import dumps
from openlpu.host import HostModel
from openlpu.host import build as build_host
from openlpu.load.config import ModelConfig
from openlpu.load.weights import Weights
from openlpu.numerics import CONTRACT
from openlpu.passes.recipe import Materializer
from openlpu.store import Store

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

    def host(
        self,
        *,
        threads: int | None = None,
        kernels: str | None = None,
        store: Store | None = None,
        pages: int = FIRST_PAGES,
        progress: Progress | None = None,
    ) -> HostModel:
        """The host engine for it, from the cache where possible.

        Raises UnsupportedTarget if the processor lacks `kernels`, StoreError if the cache fails.
        """
        model = build_host(
            self.graph,
            Materializer(self.weights),
            store=store or Store(),
            key=self.key,
            threads=threads,
            kernels=kernels,
            pages=pages,
            progress=progress,
        )
        self.weights.release()  # packing walked the whole checkpoint; nothing reads it again
        return model

    def reference(self, *, graph: Graph | None = None) -> ReferenceRunner:
        """The slow exact reference, of the last graph or of any other of `stages`."""
        return ReferenceRunner(graph or self.graph, Materializer(self.weights))


def compile_weights(
    config: ModelConfig, weights: Weights, *, precision: Precision = "w8", stop: str = ""
) -> Compiled:
    """Run the passes, all or up to the one named `stop`. No tensor is read."""
    encodings = {name: weights.encoding(name) for name in weights.names()}
    stages = compile_graph(config, encodings, precision=precision, stop=stop)
    return Compiled(config, weights, precision, tuple(stages))
