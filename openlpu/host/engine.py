"""In: a quantized Graph and its tensors. Out: HostModel, which runs steps on this processor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import GraphError, RequestError
from openlpu.graph import Batch, Graph, TensorSource
from openlpu.graph.step import PAGE
from openlpu.host.codegen import load_kernels
from openlpu.host.kernels import symbol
from openlpu.host.layout import (
    APART_CHUNKS,
    APART_ROWS,
    LINE_WORDS,
    MAX_ROWS,
    TASK_ARGS,
    TASK_BARRIER,
    TASK_KERNEL,
    TASK_WANTED,
    TASK_WORDS,
    Context,
    padded,
)
from openlpu.host.pack import Packed, Piece, open_or_pack
from openlpu.host.plan import Arg, make_plan
from openlpu.host.threads import Team
from openlpu.jit import Loaded, select
from openlpu.knobs import THREADS
from openlpu.numerics.rope import cos_sin
from openlpu.store import Store

MAX_THREADS = 256
_FIRST_POSITIONS = 2048  # rope table rows at the start; grows by doubling
Progress = Callable[[str, int, int], None]
I32 = NDArray[np.int32]


def default_threads() -> int:
    """The knob's, or one per core this process may use, up to what the engine can drive."""
    return THREADS.value or min(MAX_THREADS, len(os.sched_getaffinity(0)), _quota())


def _quota() -> int:
    """Cores that a control group grants this process (containers), at least 1."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return MAX_THREADS


def _aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that starts at a cache line; untouched pages cost nothing."""
    raw = np.zeros(size_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size_bytes]


class HostModel:
    """A model compiled for this processor. One step at a time: callers in several threads wait.

    max_rows: rows of one step, of one sequence or of many. pages: K/V pages of PAGE positions in
    the pool. packed_bytes and kv_bytes: sizes of the weights and of the pool. identity: sha256 over
    contract, graph and tensors. threads and kernels: what runs it.
    """

    max_rows = rows_of_a_sequence = MAX_ROWS
    slots = 1 << 16
    shares_pages = True

    def __init__(
        self,
        graph: Graph,
        packed: Packed,
        *,
        store: Store,
        threads: int,
        kernels: str | None,
        pages: int,
        progress: Progress | None,
    ) -> None:
        target = select(kernels)
        self._lock = threading.Lock()
        self.graph, self.threads, self.kernels = graph, threads, target.name
        self.identity, self.packed_bytes = packed.identity, packed.weight_bytes
        self._packed = packed
        self._vocabulary = next(op.params[0].shape[0] for op in graph.ops if op.kind == "embed")
        self._plan = make_plan(graph, threads)
        code = load_kernels(self._plan.specs, target, store, progress)
        self._context = _aligned(8 * (Context.WORKERS + LINE_WORDS * threads)).view(np.int64)
        self._slots = [_aligned(size) for size in self._plan.slots]
        self._queries = _aligned(self._plan.query_bytes)
        self._parts = _aligned(0)
        self._tasks, self._output_at = self._link(code)
        self._turns = np.array(graph.rope.turns, np.uint64)
        self._cosines, self._sines = self._rope(_FIRST_POSITIONS)
        self.page_bytes = self._plan.layers * self._plan.kv_head_bytes
        self._kv = np.zeros(0, np.uint8)
        self.pages = 0
        self.grow(pages)
        self._set(Context.TASKS, self._tasks.ctypes.data)
        self._set(Context.THREADS, threads)
        self._set(Context.PAGE_BYTES, self.page_bytes)
        self._team = Team(code, self._context)

    @property
    def kv_bytes(self) -> int:
        return self._kv.shape[0]

    @property
    def kv(self) -> NDArray[np.uint8]:
        """The pool itself, [pages][page_bytes]; not while a step runs."""
        return self._kv.reshape(self.pages, self.page_bytes)

    def _set(self, field: Context, value: int) -> None:
        self._context[field] = value

    def _rope(self, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        tables = cos_sin(self._turns, np.arange(positions), magnitude=self.graph.rope.magnitude)
        self._set(Context.COSINES, tables[0].ctypes.data)
        self._set(Context.SINES, tables[1].ctypes.data)
        return tables

    def _link(self, code: Loaded) -> tuple[NDArray[np.int64], list[int]]:
        """The task table with addresses; and which of its words hold the output's."""
        table = _aligned(8 * TASK_WORDS * len(self._plan.tasks)).view(np.int64)
        output_at: list[int] = []
        base = self._packed.data.ctypes.data
        for index, task in enumerate(self._plan.tasks):
            row = table[index * TASK_WORDS : (index + 1) * TASK_WORDS]
            row[TASK_KERNEL] = code.address(symbol(task.spec))
            row[TASK_BARRIER] = task.barrier
            row[TASK_WANTED] = task.wanted
            piece = self._packed.pieces.get(task.op, Piece(0, 0, 0, 0))
            for i, arg in enumerate(task.args, TASK_ARGS):
                if arg.kind == "value" and arg.name == self._plan.output:
                    output_at.append(index * TASK_WORDS + i)
                    continue
                row[i] = self._address(arg, piece, base)
        return table, output_at

    def _address(self, arg: Arg, piece: Piece, base: int) -> int:
        if arg.kind == "number":
            return arg.offset_bytes
        if arg.kind == "queries":
            return self._queries.ctypes.data
        if arg.kind == "value":
            slot = self._slots[self._plan.place[arg.name]]
            return int(slot.ctypes.data) + arg.offset_bytes
        offset: int = getattr(piece, arg.kind)
        return base + offset + arg.offset_bytes

    def grow(self, pages: int) -> None:
        """Make the K/V pool at least `pages` pages; what is in it stays."""
        if pages <= self.pages:
            return
        with self._lock:  # a step in another thread must not lose its pool
            wider = _aligned(pages * self.page_bytes)
            wider[: self.kv_bytes] = self._kv
            self._kv, self.pages = wider, pages
            self._set(Context.KV, wider.ctypes.data)

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step; returns the logits of the wanted rows, float32 [L, V], in fresh memory.

        A row that left the finite range comes back as NaN, and spares the others. Raises
        RequestError if the batch breaks the rules of Batch.
        """
        plan = self._plan
        with self._lock:
            logits = np.empty((len(batch.wanted), padded(plan.output_width)), np.float32)
            for at in self._output_at:
                self._tasks[at] = logits.ctypes.data
            self._run(batch, len(plan.tasks))
            return logits[:, : plan.output_width]

    def states(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step up to the last norm; returns the residual stream of the wanted rows, float32
        [L, D]. Otherwise like `step`."""
        plan = self._plan
        if not plan.states:
            raise GraphError("the graph picks no rows, so there are no states to read")
        with self._lock:
            self._run(batch, plan.states_tasks)
            slot = self._slots[plan.place[plan.states]].view(np.float32)
            rows, width = len(batch.wanted), padded(plan.states_width)
            return slot[: rows * width].reshape(rows, width)[:, : plan.states_width].copy()

    def _run(self, batch: Batch, tasks: int) -> None:
        """Run the first `tasks` tasks of a step."""
        arrays = [
            np.ascontiguousarray(a, np.int32)
            for a in (batch.tokens, batch.positions, batch.slots, batch.wanted, batch.pages)
        ]
        rows, wanted = arrays[0].size, arrays[3].size
        last, shared = self._check(*arrays)
        if rows == 0:
            return
        parts = self._parts_of(arrays[1])
        if last >= self._cosines.shape[0]:
            self._cosines, self._sines = self._rope(max(last + 1, 2 * self._cosines.shape[0]))
        for field, value in (
            (Context.ROWS, rows),
            (Context.WANTED_ROWS, wanted),
            (Context.TOKENS, arrays[0].ctypes.data),
            (Context.POSITIONS, arrays[1].ctypes.data),
            (Context.SLOTS, arrays[2].ctypes.data),
            (Context.WANTED, arrays[3].ctypes.data),
            (Context.PAGE_TABLE, arrays[4].ctypes.data),
            (Context.PAGE_STRIDE, arrays[4].shape[1]),
            (Context.SHARED_KV, int(shared or parts)),
            (Context.PARTS, self._parts.ctypes.data if parts else 0),
            (Context.TASK_COUNT, tasks),
        ):
            self._context[field] = value
        self._team.step()

    def _parts_of(self, positions: I32) -> int:
        """How many parts threads share in this step, for which there is room then; 0: none."""
        if self.threads == 1 or positions.size > APART_ROWS:
            return 0
        chunks = positions // self._plan.chunk + 1
        if chunks.max() < APART_CHUNKS:
            return 0
        parts = int(chunks.sum()) * self._plan.kv_heads
        if self._parts.size < parts * self._plan.part_bytes:
            self._parts = _aligned(2 * parts * self._plan.part_bytes)
        return parts

    def _check(
        self, tokens: I32, positions: I32, slots: I32, wanted: I32, pages: I32
    ) -> tuple[int, bool]:
        """The last position, and whether some sequence has several rows. RequestError unless all
        is in bounds, for generated code checks nothing. Lists, because most steps have few rows."""
        rows = tokens.size
        if rows > self.max_rows or wanted.size > rows:
            raise RequestError(f"a step of {rows} rows; at most {self.max_rows} are possible")
        if not (tokens.shape == positions.shape == slots.shape == (rows,)) or pages.ndim != 2:
            raise RequestError("the arrays of the batch have different lengths")
        if rows == 0:
            return 0, False
        ids, places, owners = tokens.tolist(), positions.tolist(), slots.tolist()
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise RequestError(f"a token id is outside the vocabulary of {self._vocabulary}")
        if min(places) < 0 or min(owners) < 0 or max(owners) >= pages.shape[0]:
            raise RequestError("a position or slot of the batch is out of range")
        if any(not 0 <= row < rows for row in wanted.tolist()):
            raise RequestError("a wanted row is out of range")
        ends: dict[int, int] = {}  # {slot: pages that its rows reach}
        for slot, position in zip(owners, places, strict=True):
            ends[slot] = max(ends.get(slot, 0), position // PAGE + 1)
        if max(ends.values()) > pages.shape[1]:
            raise RequestError("a position has no K/V page")
        for slot, end in ends.items():
            used = pages[slot, :end].tolist()
            if min(used) < 0 or max(used) >= self.pages:
                raise RequestError("a K/V page of the batch is outside the pool")
        return max(places), len(ends) < rows

    def close(self) -> None:
        """End the worker threads; the model is of no use afterwards."""
        self._team.close()


def build(
    graph: Graph,
    source: TensorSource,
    *,
    store: Store,
    key: str,
    threads: int | None = None,
    kernels: str | None = None,
    pages: int = 16,
    progress: Progress | None = None,
) -> HostModel:
    """Pack (or map) the weights, compile (or map) the kernels, start the threads.

    key names checkpoint, precision and graph: while the cache holds packed weights under it,
    `source` is not touched. Raises UnsupportedTarget, StoreError, GraphError, CheckpointError.
    """
    count = default_threads() if threads is None else threads
    if not 1 <= count <= MAX_THREADS:
        raise RequestError(f"threads is {count}; it must be 1 to {MAX_THREADS}")
    packed = open_or_pack(store, key, graph, source, progress)
    return HostModel(
        graph,
        packed,
        store=store,
        threads=count,
        kernels=kernels,
        pages=pages,
        progress=progress,
    )
