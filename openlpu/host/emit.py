"""In: a target. Out: Kit, the vocabulary in which kernels are written as LLVM IR.

Everything is 16 lanes wide: <16 x float>, <16 x i32>, <64 x i8>. LLVM splits the vectors where a
processor is narrower, so the float code is written once. Only dot4 differs between targets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from openlpu.jit import Target
from openlpu.numerics.functions import EXP2_COEFFICIENTS, EXP2_LIMIT, LOG2E

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
PTR = ir.PointerType()
LANES = 16
VF = ir.VectorType(F32, LANES)
VI = ir.VectorType(I32, LANES)
VB = ir.VectorType(I8, LANES)
BLOCK = ir.VectorType(I8, 64)  # 16 outputs x 4 consecutive k
KERNEL = ir.FunctionType(ir.VoidType(), [PTR, PTR, I64, I64])  # context, task, thread, threads

_MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, nearest even
_MAGIC_BITS = struct.unpack("<i", struct.pack("<f", _MAGIC))[0]
_ALL_LANES = ir.Constant(ir.IntType(16), -1)  # the mask of AVX-512's intrinsics
_CURRENT_MODE = 4  # and their rounding: the thread's own, which walk.py sets to the nearest

Value = Any  # an llvmlite IR value


class Kit:
    """One function under construction, with the operations kernels are made of."""

    def __init__(self, module: ir.Module, target: Target) -> None:
        self.module = module
        self.target = target
        self.b: ir.IRBuilder = ir.IRBuilder()

    # -- functions, constants, control flow ---------------------------------------------------

    @contextmanager
    def function(
        self, name: str, kind: ir.FunctionType = KERNEL, *, internal: bool = False
    ) -> Iterator[tuple[Value, ...]]:
        """Define a function; yields its arguments. Returns void unless the body returned."""
        function = ir.Function(self.module, kind, name)
        if internal:
            function.linkage = "internal"
            function.attributes.add("noinline")
        function.attributes.add("nounwind")
        saved, self.b = self.b, ir.IRBuilder(function.append_basic_block("entry"))
        yield function.args
        if not self.b.block.is_terminated:
            self.b.ret_void()
        self.b = saved

    def defined(self, name: str) -> Any | None:
        return self.module.globals.get(name)

    def external(self, name: str, result: Any, args: Sequence[Any]) -> Any:
        return self.defined(name) or ir.Function(
            self.module, ir.FunctionType(result, args), name=name
        )

    def i64(self, value: int) -> Value:
        return ir.Constant(I64, value)

    def i32(self, value: int) -> Value:
        return ir.Constant(I32, value)

    def f32(self, value: float) -> Value:
        return ir.Constant(F32, float(value))

    def vf(self, value: float) -> Value:
        return ir.Constant(VF, [float(value)] * LANES)

    def vi(self, value: int) -> Value:
        return ir.Constant(VI, [value] * LANES)

    def loop(
        self,
        start: Value,
        stop: Value,
        step: int | Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """for i in range(start, stop, step) with loop-carried values; returns their last values."""
        b = self.b
        entry = b.block
        head = b.append_basic_block("loop")
        inside = b.append_basic_block("body")
        after = b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, entry)
        values = []
        for value in carried:
            phi = b.phi(value.type)
            phi.add_incoming(value, entry)
            values.append(phi)
        b.cbranch(b.icmp_signed("<", i, stop), inside, after)
        b.position_at_end(inside)
        results = body(i, list(values))
        increment = step if not isinstance(step, int) else self.i64(step)
        i.add_incoming(b.add(i, increment), b.block)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def each(
        self, start: Value, stop: Value, body: Callable[[Value], None], *, step: int | Value = 1
    ) -> None:
        """A loop without carried values."""

        def run(i: Value, _: list[Value]) -> list[Value]:
            body(i)
            return []

        self.loop(start, stop, step, [], run)

    # -- memory -------------------------------------------------------------------------------

    def at(self, pointer: Value, offset_bytes: Value | int) -> Value:
        offset = self.i64(offset_bytes) if isinstance(offset_bytes, int) else offset_bytes
        return self.b.gep(pointer, [offset], source_etype=I8)

    def item(self, pointer: Value, index: Value | int, kind: Any) -> Value:
        """Address of element `index` of an array of `kind`."""
        return self.b.gep(
            pointer, [self.i64(index) if isinstance(index, int) else index], source_etype=kind
        )

    def load(self, pointer: Value, kind: Any, *, align: int | None = None) -> Value:
        return self.b.load(pointer, typ=kind, align=align or _natural(kind))

    def store(self, value: Value, pointer: Value, *, align: int | None = None) -> None:
        self.b.store(value, pointer, align=align or _natural(value.type))

    def field(self, struct_: Value, index: int) -> Value:
        """64-bit field of a context or task."""
        return self.load(self.item(struct_, index, I64), I64)

    def pointer(self, struct_: Value, index: int) -> Value:
        """Pointer field of a context or task."""
        return self.load(self.item(struct_, index, I64), PTR, align=8)

    def scratch(self, kind: Any, count: int) -> Value:
        """Aligned stack memory, allocated once at the entry of the function."""
        here = self.b.block
        entry = self.b.function.entry_basic_block
        if entry is here:
            slot = self.b.alloca(kind, count)
        else:
            with self.b.goto_entry_block():
                slot = self.b.alloca(kind, count)
        slot.align = 64
        slot.type = PTR  # opaque, as every pointer here
        return slot

    def prefetch(self, pointer: Value, *, write: bool = False) -> None:
        """Ask for a line to be read into the second cache, or, to be written, into the first; a
        wrong address does nothing."""
        hint = [pointer, self.i32(int(write)), self.i32(3 if write else 2), self.i32(1)]
        function = self.external("llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        self.b.call(function, hint)

    def halves(self, pointer: Value) -> Value:
        """16 finite float16 values as float32, exactly."""
        kind = ir.VectorType(I16, LANES)
        bits = self.load(pointer, kind)
        if self.target.vectors in ("avx512", "neon"):  # they have an instruction for it
            return self.b.fpext(self.bits(bits, ir.VectorType(ir.HalfType(), LANES)), VF)
        return self.widened(self.b.zext(bits, VI))

    def widened(self, bits: Value) -> Value:
        """Finite float16 values, given by their bits in i32, as float32: exponent and fraction in
        float32's places are the value times 2**-112, subnormal ones too."""
        b, kind = self.b, bits.type
        wide = VF if kind == VI else F32

        def constant(value: int) -> Value:
            return self.vi(value) if kind == VI else self.i32(value)

        size = self.bits(b.shl(b.and_(bits, constant(0x7FFF)), constant(13)), wide)
        power = self.vf(2.0**112) if kind == VI else self.f32(2.0**112)
        sign = b.shl(b.and_(bits, constant(0x8000)), constant(16))
        return self.bits(b.or_(self.bits(b.fmul(size, power), kind), sign), wide)

    # -- 16 lanes -----------------------------------------------------------------------------

    def splat(self, scalar: Value) -> Value:
        vector = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, self.i32(0))
        return self.b.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(VI, [0] * LANES)
        )

    def shuffle(self, vector: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def bits(self, value: Value, kind: Any) -> Value:
        return self.b.bitcast(value, kind)

    def intrinsic(self, name: str, result: Any, args: Sequence[Value]) -> Value:
        return self.b.call(self.external(name, result, [a.type for a in args]), args)

    def rne(self, x: Value) -> Value:
        """Round to an integer, nearest even; |x| <= 2**22. Vector or scalar."""
        vector = isinstance(x.type, ir.VectorType)
        if vector and self.target.vectors == "avx512":  # in the current mode, which is the nearest
            name = "llvm.x86.avx512.mask.cvtps2dq.512"
            return self.intrinsic(name, VI, [x, self.vi(0), _ALL_LANES, self.i32(_CURRENT_MODE)])
        magic = self.vf(_MAGIC) if vector else self.f32(_MAGIC)
        base = self.vi(_MAGIC_BITS) if vector else self.i32(_MAGIC_BITS)
        return self.b.sub(self.bits(self.b.fadd(x, magic), VI if vector else I32), base)

    def exp2(self, t: Value) -> Value:
        """numerics.functions.exp2, 16 lanes."""
        high = self.vf(float(EXP2_LIMIT))
        low = self.vf(-float(EXP2_LIMIT))
        t = self.maximum(t, low)  # a NaN becomes `low`
        return self._exp2(self.b.select(self.b.fcmp_ordered("<", t, high), t, high))

    def exp2_below_1(self, t: Value) -> Value:
        """exp2 where no t is above 0, so that nothing has to be clamped there."""
        return self._exp2(self.maximum(t, self.vf(-float(EXP2_LIMIT))))

    def _exp2(self, t: Value) -> Value:
        b = self.b
        if self.target.vectors == "avx512":  # instructions that round, and multiply by 2**n
            n = self.intrinsic("llvm.rint.v16f32", VF, [t])
        else:
            shifted = b.fadd(t, self.vf(_MAGIC))
            n = b.fsub(shifted, self.vf(_MAGIC))
        f = b.fsub(t, n)
        p = self.vf(float(EXP2_COEFFICIENTS[-1]))
        for c in EXP2_COEFFICIENTS[-2::-1]:
            p = b.fadd(b.fmul(p, f), self.vf(float(c)))
        p = b.fadd(b.fmul(p, f), self.vf(1.0))
        if self.target.vectors == "avx512":
            args = [p, n, self.vf(0.0), _ALL_LANES, self.i32(_CURRENT_MODE)]
            return self.intrinsic("llvm.x86.avx512.mask.scalef.ps.512", VF, args)
        exponent = b.sub(self.bits(shifted, VI), self.vi(_MAGIC_BITS - 127))
        return b.fmul(p, self.bits(b.shl(exponent, self.vi(23)), VF))

    def silu(self, g: Value) -> Value:
        """numerics.functions.silu, 16 lanes."""
        b = self.b
        e = self.exp2(b.fmul(b.fneg(g), self.vf(float(LOG2E))))
        return b.fdiv(g, b.fadd(self.vf(1.0), e))

    def hadamard16(self, x: Value) -> Value:
        """numerics.functions.hadamard_blocks of one block."""
        b = self.b
        for stride in (1, 2, 4, 8):
            other = self.shuffle(x, [i ^ stride for i in range(LANES)])
            flip = ir.Constant(VI, [-(1 << 31) if i & stride else 0 for i in range(LANES)])
            x = b.fadd(other, self.bits(b.xor(self.bits(x, VI), flip), VF))  # b + a, a + (-b)
        return b.fmul(x, self.vf(0.25))

    def magnitude_bits(self, x: Value) -> Value:
        return self.b.and_(self.bits(x, VI), self.vi(0x7FFFFFFF))

    def umax(self, a: Value, c: Value) -> Value:
        return self.intrinsic("llvm.umax.v16i32", VI, [a, c])

    def reduce_umax(self, v: Value) -> Value:
        return self.intrinsic("llvm.vector.reduce.umax.v16i32", I32, [v])

    def reduce_add(self, v: Value) -> Value:
        return self.intrinsic("llvm.vector.reduce.add.v16i32", I32, [v])

    def maximum(self, a: Value, c: Value) -> Value:
        """a > c ? a : c on floats; for values without NaN the order does not matter."""
        return self.b.select(self.b.fcmp_ordered(">", a, c), a, c)

    def reduce_max(self, v: Value) -> Value:
        for width in (8, 4, 2, 1):
            v = self.maximum(v, self.shuffle(v, [(i + width) % LANES for i in range(LANES)]))
        return self.b.extract_element(v, self.i32(0))

    def select(self, condition: Value, a: Value, c: Value) -> Value:
        return self.b.select(condition, a, c)

    # -- the integer dot product --------------------------------------------------------------

    @property
    def biased(self) -> bool:
        """Whether dot4 takes stored bytes as they are (value + 128), so that every sum carries
        128 * sum(x), which the accumulator's initial value cancels."""
        return self.target.vectors == "avx512"

    def dot4(self, acc: Value, block: Value, x4: Value) -> Value:
        """acc[i] += sum_k (block[4i+k] (- 128)) * x[k]: block <64 x i8> of value + 128, x4 an i32
        holding four signed bytes in [-127, 127]. See `biased` for the 128."""
        b = self.b
        spread = self.splat(x4)
        if self.target.vectors == "avx512":
            x = self.bits(spread, BLOCK)
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.512", VI, [acc, block, x])
        if self.target.vectors == "avx2":
            return self._dot4_avx2(acc, block, spread)
        signed = b.xor(block, ir.Constant(BLOCK, [-128] * 64))
        if self.target.vectors == "neon":
            return self._dot4_neon(acc, signed, spread)
        if self.target.vectors == "rvv":
            return self._dot4_rvv(acc, signed, x4)
        # Pairs of products fit 16 bits: 2 * 128 * 127 < 2**15.
        wide, quads = ir.VectorType(I16, 64), ir.VectorType(I32, 32)
        product = b.mul(b.sext(signed, wide), b.sext(self.bits(spread, BLOCK), wide))
        even, odd = (self.shuffle(product, range(i, 64, 2)) for i in range(2))
        pairs = b.sext(b.add(even, odd), quads)
        even, odd = (self.shuffle(pairs, range(i, 32, 2)) for i in range(2))
        return b.add(acc, b.add(even, odd))

    def _dot4_avx2(self, acc: Value, block: Value, spread: Value) -> Value:
        """|w| * (x with w's sign): pairs stay below 128 * 127 * 2 < 2**15, so nothing saturates."""
        b = self.b
        half, words = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
        x = self.shuffle(self.bits(spread, BLOCK), list(range(32)))
        quads = ir.VectorType(I32, 8)
        parts = []
        for side in range(2):
            w = self.shuffle(block, list(range(32 * side, 32 * side + 32)))
            w = b.xor(w, ir.Constant(half, [-128] * 32))
            size = self.intrinsic("llvm.abs.v32i8", half, [w, ir.Constant(I1, 0)])
            turned = self.intrinsic("llvm.x86.avx2.psign.b", half, [x, w])
            pairs = self.intrinsic("llvm.x86.avx2.pmadd.ub.sw", words, [size, turned])
            ones = ir.Constant(words, [1] * 16)
            parts.append(self.intrinsic("llvm.x86.avx2.pmadd.wd", quads, [pairs, ones]))
        return b.add(acc, self._joined(*parts))

    def _dot4_neon(self, acc: Value, signed: Value, spread: Value) -> Value:
        """Four quarters, each one instruction, sdot."""
        sums, lines = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
        x = self.bits(self.shuffle(spread, range(4)), lines)
        parts = [
            self.intrinsic(
                "llvm.aarch64.neon.sdot.v4i32.v16i8",
                sums,
                [
                    self.shuffle(acc, range(4 * i, 4 * i + 4)),
                    self.shuffle(signed, range(16 * i, 16 * i + 16)),
                    x,
                ],
            )
            for i in range(4)
        ]
        halves = [self._joined(parts[i], parts[i + 1]) for i in (0, 2)]
        return self._joined(*halves)

    def _dot4_rvv(self, acc: Value, signed: Value, x4: Value) -> Value:
        """Vectors of one k each times a scalar: the products of two k fit 16 bits, as above."""
        b, words = self.b, ir.VectorType(I16, LANES)
        products = []
        for i in range(4):
            x = b.trunc(b.ashr(b.shl(x4, self.i32(24 - 8 * i)), self.i32(24)), I16)
            w = b.sext(self.shuffle(signed, range(i, 64, 4)), words)
            products.append(b.mul(w, self.splat(x)))
        for i in (0, 2):
            acc = b.add(acc, b.sext(b.add(products[i], products[i + 1]), VI))
        return acc

    def _joined(self, low: Value, high: Value) -> Value:
        count = 2 * low.type.count
        lanes = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        return self.b.shuffle_vector(low, high, lanes)


def _natural(kind: Any) -> int:
    """Alignment we can promise: vectors only that of their elements."""
    if isinstance(kind, ir.VectorType):
        kind = kind.element
    if isinstance(kind, ir.IntType):
        return max(1, int(kind.width) // 8)
    return 4 if isinstance(kind, ir.FloatType) else 8
