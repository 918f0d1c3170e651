"""In: a Graph with 4-bit weights, float Weights and tokens. Out: the blocks of those weights.

The contract's own reference runs the tokens through the graph, op after op. Before a linear runs,
its weights are rounded with what it is about to read, so that later ones see what the rounding of
earlier ones made of the text. One linear's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from openlpu.calibrate.feedback import round_blocks
from openlpu.calibrate.moments import factored, second_moments
from openlpu.graph import Batch, F32Tensor, Graph, GroupedTensor, Op, Param, Tensor, TensorSource
from openlpu.graph.ops import weights_and_biases
from openlpu.reference import Known, Quantized, Reference

WINDOW = 512  # tokens of one sequence
FORMATS = ("q4_0", "q4_1")


def calibrate(
    graph: Graph,
    source: TensorSource,
    tokens: Sequence[int],
    made: Callable[[Param, GroupedTensor], None],
) -> None:
    """Round every linear's weights that have a format of FORMATS; `made` gets them in order.

    source makes float32 of any param, and whatever else the graph needs.
    """
    here: dict[str, GroupedTensor] = {}

    def seen(op: Op, values: Sequence[Known]) -> None:
        if op.kind != "linear":
            return
        here.clear()
        params = [op.params[i] for i in weights_and_biases(op)[0]]
        if all(param.format not in FORMATS for param in params):
            return
        x = values[0]
        assert isinstance(x, Quantized)
        factor = factored(second_moments(x.q, x.scale))
        for param in params:
            wide = source.whole(replace(param, format="f32"))
            assert isinstance(wide, F32Tensor)
            here[param.name] = round_blocks(wide.value.astype(np.float64), factor, param.format)
            made(param, here[param.name])

    Reference(graph, _Rounded(source, here), keep=False).watch(_windows(tokens), seen)


class _Rounded:
    """The source, but for the tensors that were just made."""

    def __init__(self, source: TensorSource, made: dict[str, GroupedTensor]) -> None:
        self._source, self._made = source, made

    def blocks(self, param: Param) -> Iterator[Tensor]:
        """In one block what is at hand whole."""
        yield from (
            [self._made[param.name]] if param.name in self._made else self._source.blocks(param)
        )

    def whole(self, param: Param) -> Tensor:
        """All rows at once."""
        return self._made[param.name] if param.name in self._made else self._source.whole(param)


def _windows(tokens: Sequence[int]) -> Batch:
    """One step over all tokens, each WINDOW of them a sequence; one row's logits are wanted."""
    at = np.arange(len(tokens), dtype=np.int32)
    slots = at // WINDOW
    return Batch(
        tokens=np.asarray(tokens, np.int32),
        positions=at % WINDOW,
        slots=slots,
        wanted=np.zeros(1, np.int32),
        pages=np.zeros((int(slots[-1]) + 1, 1), np.int32),
    )
