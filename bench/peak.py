"""In: a number of threads. Out: products of 8-bit integers per second that they can sum together.

The loop is generated like the engine's own kernels: products of registers into several
accumulators, so that nothing but the processor's units bounds it. Dot products of vectors have 64
products each; where the processor has tiles (AMX), those count, with 16,384 each.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

from openlpu.jit import Loaded, compile_ir, select

ACCUMULATORS = 16  # more than latency x instructions per cycle of the processors that have it
TILES = 4  # of sums; four more are the factors
TURNS = 10_000_000  # long enough for the system to spread the threads over the cores
PASSES = 3
KERNELS = "avx512"  # the vectors with such an instruction


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


def tile_ir() -> str:
    """LLVM IR of `i32 dots(i64 turns, i32 x)`: products of tiles of zeros; returns x."""
    sizes = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]  # 8 of 16 rows of 64 bytes
    bytes_ = ", ".join(f"i8 {n}" for n in sizes)
    calls = [f"call void @llvm.x86.tilezero(i8 {i})" for i in range(2 * TILES)]
    body = [
        f"call void @llvm.x86.tdpbusd(i8 {i}, i8 {TILES + i % 2}, i8 {TILES + 2 + i // 2})"
        for i in range(TILES)
    ]
    return "\n".join(
        [
            "declare void @llvm.x86.ldtilecfg(ptr)",
            "declare void @llvm.x86.tilerelease()",
            "declare void @llvm.x86.tilezero(i8)",
            "declare void @llvm.x86.tdpbusd(i8, i8, i8)",
            f"@sizes = internal constant [64 x i8] [{bytes_}], align 64",
            "define i32 @dots(i64 %turns, i32 %value) {",
            *("entry:", "call void @llvm.x86.ldtilecfg(ptr @sizes)", *calls, "br label %loop"),
            *("loop:", "%i = phi i64 [0, %entry], [%next, %loop]", *body),
            *("%next = add i64 %i, 1", "%more = icmp ult i64 %next, %turns"),
            "br i1 %more, label %loop, label %done",
            *("done:", "call void @llvm.x86.tilerelease()", "ret i32 %value", "}"),
        ]
    )


class IntegerPeak:
    """Threads that sum products. Without AVX-512 VNNI there is no such peak: `known` is false."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        target = select()
        self.known = target.vectors == KERNELS
        if self.known:
            self._pool = ThreadPoolExecutor(threads)
            # A turn of tiles has 16 times the products of one of vectors, and a turn takes longer.
            self._turns = TURNS // 4 if target.tiles else TURNS
            self._products = 16**2 * 64 * TILES if target.tiles else 64 * ACCUMULATORS
            ir = tile_ir() if target.tiles else dot_ir()
            self._code = Loaded(compile_ir(ir, target), ["dots"])
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
            found = self._pool.map(self._dots, [self._turns] * self._threads, range(self._threads))
            list(found)  # wait for all
            best_s = min(best_s, time.perf_counter() - started_s)
        return self._products * self._turns * self._threads / best_s

    def close(self) -> None:
        """End the threads."""
        if self.known:
            self._pool.shutdown()
