"""In: nothing. Out: the memory layouts that generated code and Python agree on.

Weights of w8 and q8_0: bytes [N/16][K/4][16][4] of value + 128, N padded to N_PAD with
zero weights, so that one 64-byte line feeds one dot4 and a panel of outputs is one stream.
Weights of q4_0 and q4_1: [N/16][K/32][4][16][4] bytes of two values + BIAS; the high one
is of k + 16. Their scales and minima, and those of q8_0: halves [N/16][K/32][16].
Tables: rows of int8, or of groups of 16 bytes of two values, of k and k + 16; scales by row
(float32), or scales and minima by row and group (halves).
Matrices of values: row-major float32, leading dimension padded to N_PAD.
Quantized values: int8 [rows][K], then per row (or group): scale float32, correction int32, which
is -128 * sum(q) where the target's dot4 is biased, else 0. While a step has at most FEW_ROWS rows
each thread quantizes them for itself into its own copy: cheaper than a barrier.
K/V page (PAGE positions), per layer and kv head: K as dot4 blocks of 16 positions
[PAGE/16][d/4][16][4], V as dot4 blocks of 16 dimensions [d/16][PAGE/4][16][4], both value + 128,
then PAGE float32 scales of K and of V.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from openlpu.errors import GraphError
from openlpu.graph.step import PAGE
from openlpu.numerics import GROUP

N_PAD = 64  # outputs; four 16-lane blocks
APART_ROWS = 16  # rows up to which threads may share the chunks of units
APART_CHUNKS = 2  # chunks of the longest row from which they do
FEW_ROWS = 2  # rows up to which each thread quantizes for itself, which is cheaper than a barrier
MAX_ROWS = 512  # rows of one native step; longer prompts go in chunks
LINE_WORDS = 8  # 64-bit words of a cache line


class Context(IntEnum):
    """64-bit fields at the head of the context."""

    ROWS = 0
    WANTED_ROWS = 1
    TOKENS = 2  # int32 [ROWS]
    POSITIONS = 3  # int32 [ROWS]
    SLOTS = 4  # int32 [ROWS]
    WANTED = 5  # int32 [WANTED_ROWS]
    PAGE_TABLE = 6  # int32 [slots][PAGE_STRIDE]
    PAGE_STRIDE = 7
    KV = 8  # base of the K/V pool
    PAGE_BYTES = 9
    COSINES = 10  # float32 [positions][d/2]
    SINES = 11
    TASKS = 12
    TASK_COUNT = 13
    THREADS = 14
    SHARED_KV = 15  # 1 when threads read what others have installed
    PARTS = 16  # room for the parts of all chunks, when threads share them; else 0
    STOPPING = 3 * LINE_WORDS  # 1 once the workers shall leave
    GENERATION = 4 * LINE_WORDS  # each of these stands alone in its cache line
    ARRIVED = 5 * LINE_WORDS
    PHASE = 6 * LINE_WORDS
    WORKERS = 7 * LINE_WORDS  # one line per thread: 1 while it is parked, and its semaphore


class Barrier(IntEnum):
    """What a task's threads do after it."""

    NONE = 0
    ALWAYS = 1
    MANY_ROWS = 2  # when the step has more than FEW_ROWS rows of the task's kind
    SHARED_KV = 3  # when threads read what others have installed


TASK_WORDS = 24
TASK_KERNEL, TASK_BARRIER, TASK_WANTED = 0, 1, 2  # TASK_WANTED: 1 when rows means L
TASK_ARGS = 3


BIAS = {"q4_0": 8, "q4_1": 0}  # what makes a nibble of a value


def packed_format(name: str, formats: Iterable[str]) -> str:
    """How the weights of an op are packed; those of several formats, as the bytes that all are.
    Raises GraphError if only some have minima."""
    found = set(formats)
    if len(found) == 1:
        return found.pop()
    if "q4_1" in found:
        raise GraphError(f"%{name} mixes formats with and without minima")
    return "q8_0"


def group_bytes(block_format: str) -> int:
    """Bytes of 16 outputs' weights in a group."""
    return 16 * GROUP // (1 if block_format == "q8_0" else 2)


def padded(n: int) -> int:
    """Outputs or leading dimension, rounded up to N_PAD."""
    return -(-n // N_PAD) * N_PAD


def quantized_bytes(width: int, group: int) -> int:
    """Bytes of one quantized row: values, then a scale and a correction per row or group."""
    return -(-(width + 8 * (width // group if group else 1)) // 64) * 64


def head_bytes(head_dim: int) -> int:
    """Bytes of one layer and kv head in a K/V page."""
    return PAGE * (2 * head_dim + 8)
