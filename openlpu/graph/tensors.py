"""In: nothing. Out: the canonical form of a Param's contents, with no machine's layout in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openlpu.graph.ir import Param


@dataclass(frozen=True, slots=True)
class F32Tensor:
    """Format f32: value float32 [N, K], or [N] for a bias or gain."""

    value: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowTensor:
    """Format w8: weight = q * scale[:, None]; q int8 [N, K] in [-127, 127], scale float32 [N]."""

    q: NDArray[np.int8]
    scale: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GroupedTensor:
    """Formats q8_0, q4_0, q4_1: weight = q * scale (+ minimum), per group of 32 along K.

    q int8 [N, K] (q4_0: -8..7, q4_1: 0..15, q8_0: -128..127), scale float32 [N, K/32],
    minimum float32 [N, K/32] or None. Lossless: the block's own 16-bit scales, widened.
    """

    q: NDArray[np.int8]
    scale: NDArray[np.float32]
    minimum: NDArray[np.float32] | None


Tensor = F32Tensor | RowTensor | GroupedTensor


class TensorSource(Protocol):
    """Evaluates recipes. Blocks of one param come in order of rows, so that a large tensor never
    stands in memory whole when its recipe lets it be made by parts."""

    def blocks(self, param: Param) -> Iterator[Tensor]:
        """Consecutive blocks of rows of the param; together all N rows."""
        ...

    def whole(self, param: Param) -> Tensor:
        """All rows at once."""
        ...
