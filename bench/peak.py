"""In: a number of threads. Out: products of 8-bit integers per second that they can sum together.

The loop is generated like the engine's own kernels: dot products of registers, of which each has
64 products, into several accumulators, so that nothing but the processor's units bounds it.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

from openlpu.jit import Loaded, compile_ir, select

ACCUMULATORS = 16  # more than latency x instructions per cycle of the processors that have it
PRODUCTS = 64  # of one instruction
TURNS = 10_000_000  # long enough for the system to spread the threads over the cores
PASSES = 3
KERNELS = "avx512"  # the kernel set with this instruction


def dot_ir() -> str:
    """LLVM IR of `i32 dots(i64 turns, i32 x)`: the sum over the lanes of all accumulators."""
    sums, block, each = "<16 x i32>", "<64 x i8>", range(ACCUMULATORS)
    body = ["%i = phi i64 [0, %entry], [%next, %loop]"]
    body += [f"%old{k} = phi {sums} [%x, %entry], [%new{k}, %loop]" for k in each]
    body += [f"%new{k} = call {sums} @{_DOT}({sums} %old{k}, {block} %b, {block} %b)" for k in each]
    body += [
        "%next = add i64 %i, 1",
        "%more = icmp ult i64 %next, %turns",
        "br i1 %more, label %loop, label %done",
    ]
    end = [f"%sum1 = add {sums} %new0, %new1"]
    end += [f"%sum{k} = add {sums} %sum{k - 1}, %new{k}" for k in each[2:]]
    end += [
        f"%result = call i32 @llvm.vector.reduce.add.v16i32({sums} %sum{ACCUMULATORS - 1})",
        "ret i32 %result",
    ]
    start = [
        f"%one = insertelement {sums} poison, i32 %value, i32 0",
        f"%x = shufflevector {sums} %one, {sums} poison, {sums} zeroinitializer",
        f"%b = bitcast {sums} %x to {block}",
    ]
    return "\n".join(
        [
            f"declare {sums} @{_DOT}({sums}, {block}, {block})",
            f"declare i32 @llvm.vector.reduce.add.v16i32({sums})",
            "define i32 @dots(i64 %turns, i32 %value) {",
            *("entry:", *start, "br label %loop", "loop:", *body, "done:", *end, "}"),
        ]
    )


_DOT = "llvm.x86.avx512.vpdpbusd.512"


class IntegerPeak:
    """Threads that sum products. Without AVX-512 VNNI there is no such peak: `known` is false."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        target = select()
        self.known = target.vectors == KERNELS
        if self.known:
            self._pool = ThreadPoolExecutor(threads)
            self._code = Loaded(compile_ir(dot_ir(), target), ["dots"])
            # ctypes lets go of the interpreter for a call, so the threads do run together.
            function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int32)
            self._dots = function(self._code.address("dots"))

    def products_per_s(self) -> float:
        """The best of a few passes; about an eighth of a second. 0 where it is not known."""
        if not self.known:
            return 0.0
        best_s = float("inf")
        for _ in range(PASSES):
            started_s = time.perf_counter()
            found = self._pool.map(self._dots, [TURNS] * self._threads, range(self._threads))
            list(found)  # wait for all
            best_s = min(best_s, time.perf_counter() - started_s)
        return PRODUCTS * ACCUMULATORS * TURNS * self._threads / best_s

    def close(self) -> None:
        """End the threads."""
        if self.known:
            self._pool.shutdown()
