"""In: nothing. Out: Batch, the description of one step of a Graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]

PAGE = 64  # positions of one K/V page


@dataclass(frozen=True, slots=True)
class Batch:
    """One step over R rows of up to S sequences.

    tokens [R], positions [R] (absolute), slots [R] (which sequence, 0..S-1), wanted [L] (row
    indices whose logits are returned, ascending). The rows of a sequence stand in ascending order
    of position, the first one continuing where the sequence's K/V ends. pages [S, P] names the
    K/V pages of each sequence: position p lives in page pages[slot, p // PAGE].
    """

    tokens: I32
    positions: I32
    slots: I32
    wanted: I32
    pages: I32
