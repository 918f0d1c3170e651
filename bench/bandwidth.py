"""In: a number of threads. Out: bytes per second that they read from memory together.

The loop is generated like the engine's own kernels, so that nothing but memory bounds it: 64-byte
loads, one exclusive or each, with and without prefetch; the better of the two counts.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from openlpu.jit import Loaded, compile_ir, select

BUFFER_BYTES = 512 << 20  # far beyond the last cache of common processors
PAGE_BYTES = 4096
LINE_BYTES = 64
LINES = 4  # lines per turn of the loop, each with its own accumulator
PREFETCH_BYTES = (0, 1024)  # how far ahead; 0: left to the hardware
PASSES = 3


def read_ir(ahead_bytes: int) -> str:
    """LLVM IR of `i64 read(ptr, i64 bytes)`: the exclusive or of all words of whole loop turns."""
    vector, lines = f"<{LINE_BYTES} x i8>", range(LINES)
    body = ["%i = phi i64 [0, %entry], [%next, %loop]"]
    body += [f"%old{k} = phi {vector} [zeroinitializer, %entry], [%new{k}, %loop]" for k in lines]
    for k in lines:
        body += [
            f"%at{k} = add i64 %i, {k * LINE_BYTES}",
            f"%p{k} = getelementptr i8, ptr %base, i64 %at{k}",
            f"%line{k} = load {vector}, ptr %p{k}, align {LINE_BYTES}",
            f"%new{k} = xor {vector} %old{k}, %line{k}",
        ]
        if ahead_bytes:
            body += [
                f"%far{k} = getelementptr i8, ptr %p{k}, i64 {ahead_bytes}",
                f"call void @llvm.prefetch.p0(ptr %far{k}, i32 0, i32 3, i32 1)",
            ]
    body += [
        f"%next = add i64 %i, {LINES * LINE_BYTES}",
        "%more = icmp ult i64 %next, %bytes",
        "br i1 %more, label %loop, label %done",
    ]
    end = [f"%sum1 = xor {vector} %new0, %new1"]
    end += [f"%sum{k} = xor {vector} %sum{k - 1}, %new{k}" for k in lines[2:]]
    end += [
        f"%words = bitcast {vector} %sum{LINES - 1} to <8 x i64>",
        "%result = call i64 @llvm.vector.reduce.xor.v8i64(<8 x i64> %words)",
        "ret i64 %result",
    ]
    return "\n".join(
        [
            "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
            "declare i64 @llvm.vector.reduce.xor.v8i64(<8 x i64>)",
            "define i64 @read(ptr %base, i64 %bytes) {",
            *("entry:", "br label %loop", "loop:", *body, "done:", *end, "}"),
        ]
    )


class MemoryRead:
    """A buffer in memory and threads that read it, each its own contiguous part."""

    def __init__(self, threads: int) -> None:
        self._memory = np.ones(BUFFER_BYTES + PAGE_BYTES, np.uint8)  # written, so it has pages
        start = self._memory.ctypes.data
        start += -start % PAGE_BYTES
        self._part_bytes = BUFFER_BYTES // threads // PAGE_BYTES * PAGE_BYTES
        self._parts = [start + i * self._part_bytes for i in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self._code = [Loaded(compile_ir(read_ir(n), select()), ["read"]) for n in PREFETCH_BYTES]
        # ctypes lets go of the interpreter for a call, so the threads do run together.
        function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._read = [function(code.address("read")) for code in self._code]

    def bytes_per_s(self) -> float:
        """The best of a few passes; about a tenth of a second."""
        total_bytes = self._part_bytes * len(self._parts)
        best_s = float("inf")
        for read in self._read * PASSES:
            started_s = time.perf_counter()
            found = self._pool.map(read, self._parts, [self._part_bytes] * len(self._parts))
            list(found)  # wait for all
            best_s = min(best_s, time.perf_counter() - started_s)
        return total_bytes / best_s

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
