"""In: Weights and a Param's recipe. Out: its canonical tensor, the same bits on every machine.

Recipes are evaluated in float64, step after step, by blocks of rows; only a step along N (the
*_out steps) needs a matrix whole. No step adds in an order that depends on the block, and none
uses BLAS, so neither the block size nor the number of callers' threads can change a bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import CheckpointError, GraphError
from openlpu.graph import F32Tensor, GroupedTensor, Param, RowTensor, Step, Tensor
from openlpu.graph.ops import BLOCK_FORMATS
from openlpu.load.blocks import quantize_blocks, unpack_blocks
from openlpu.load.weights import Weights
from openlpu.numerics import rotation
from openlpu.numerics.quant import quantize_weight

F64 = NDArray[np.float64]

_VALUES_AT_ONCE = 1 << 18  # 2 MiB of float64: a few arrays of it stay in a core's cache


class Materializer:
    """A TensorSource over one checkpoint. Holds no state: several threads may share it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def blocks(self, param: Param) -> Iterator[Tensor]:
        """The param's rows in order, a few at a time. Raises CheckpointError for a missing
        tensor, one of another shape, or one that holds an infinity or a NaN."""
        self._check(param)
        if len(param.shape) == 1:
            vector = self._weights.rows(param.source).astype(np.float64)[:, None]
            yield _formatted(param, self._apply(param, vector)[:, 0])
            return
        rows, width = param.shape
        at_once = max(16, _VALUES_AT_ONCE // width // 16 * 16)  # packers take 16 rows at a time
        spans = [(at, min(at + at_once, rows)) for at in range(0, rows, at_once)]
        if param.format in BLOCK_FORMATS:
            yield from (self._grouped(param, *span) for span in spans)
        elif any(step.kind.endswith("_out") for step in param.recipe):
            turned = self._apply(param, self._wide(param))
            yield from (_formatted(param, turned[slice(*span)]) for span in spans)
        else:
            for start, stop in spans:
                part = self._weights.rows(param.source, start, stop).astype(np.float64)
                yield _formatted(param, self._apply(param, part))

    def whole(self, param: Param) -> Tensor:
        """All rows of the param at once."""
        return _joined(list(self.blocks(param)))

    def _check(self, param: Param) -> None:
        found = self._weights.shape(param.source)
        if found != param.shape:
            raise CheckpointError(
                f"tensor {param.source} has shape {list(found)}, the configuration says "
                f"{list(param.shape)}; the files do not belong together"
            )

    def _wide(self, param: Param) -> F64:
        """The whole stored matrix as float64, read by parts."""
        rows, width = param.shape
        wide = np.empty((rows, width))
        at_once = max(1, _VALUES_AT_ONCE // width)
        for at in range(0, rows, at_once):
            wide[at : at + at_once] = self._weights.rows(param.source, at, min(at + at_once, rows))
        return wide

    def _apply(self, param: Param, w: F64) -> F64:
        for step in param.recipe:
            w = self._step(step, w)
        return w

    def _step(self, step: Step, w: F64) -> F64:
        match step.kind, step.args:
            case "gain", (str(name),):
                return w * self._weights.rows(name)  # float32 widens exactly
            case "rotate_in", (int(seed),):
                return rotation.rotate_last(w, seed=seed)
            case "rotate_out", (int(seed),):
                return rotation.rotate_first(w, seed=seed)
            case "heads_in", (int(heads), int(seed)):
                return rotation.rotate_heads_last(w, heads, seed=seed)
            case "heads_out", (int(heads), int(seed)):
                return rotation.rotate_heads_first(w, heads, seed=seed)
            case "hadamard_in", ():
                return rotation.hadamard16_last(w)
        raise GraphError(f"recipe step {step.kind} {step.args} is not known")

    def _grouped(self, param: Param, start: int, stop: int) -> GroupedTensor:
        if param.recipe:
            raise GraphError(f"{param.name}: block format {param.format} takes no recipe")
        if self._weights.encoding(param.source) == param.format:
            found = unpack_blocks(self._weights.blocks(param.source, start, stop), param.format)
            halves = [found.scale] if found.minimum is None else [found.scale, found.minimum]
            if not all(np.isfinite(part).all() for part in halves):
                raise CheckpointError(
                    f"tensor {param.source} has an infinite scale; fetch the file again"
                )
            return found
        if param.format != "q8_0":
            raise GraphError(f"{param.name}: {param.source} is not stored as {param.format}")
        return quantize_blocks(self._weights.rows(param.source, start, stop))


def _formatted(param: Param, w: F64) -> Tensor:
    """Rows [n, K], or a vector [n], rounded to the param's format."""
    tensor: Tensor
    with np.errstate(over="ignore"):
        if param.format == "f32":
            value = np.ascontiguousarray(w, dtype=np.float32)
            tensor, limit = F32Tensor(value), value
        elif param.format == "w8":
            q, scale = quantize_weight(w)
            tensor, limit = RowTensor(q, scale), scale
        else:
            raise GraphError(f"{param.name}: format {param.format} is not known")
    if not np.isfinite(limit).all():
        raise CheckpointError(f"{param.source}: a row leaves the range of float32")
    return tensor


def _joined(parts: list[Tensor]) -> Tensor:
    """Blocks of rows put together again."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, F32Tensor):
        return F32Tensor(np.concatenate([p.value for p in parts if isinstance(p, F32Tensor)]))
    if isinstance(first, RowTensor):
        rows = [p for p in parts if isinstance(p, RowTensor)]
        return RowTensor(
            np.concatenate([p.q for p in rows]), np.concatenate([p.scale for p in rows])
        )
    groups = [p for p in parts if isinstance(p, GroupedTensor)]
    minima = [p.minimum for p in groups if p.minimum is not None]
    return GroupedTensor(
        np.concatenate([p.q for p in groups]),
        np.concatenate([p.scale for p in groups]),
        np.concatenate(minima) if minima else None,
    )
