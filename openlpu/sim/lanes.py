"""In: a Kit and a Shape. Out: generated code for the VXM: operands, operations, results.

A lane is an int32; 16 are worked on at once. Every NaN that an operation makes is isa.QUIET_NAN.
"""

from __future__ import annotations

from collections.abc import Callable

from openlpu.host.emit import I32, LANES, VB, VF, VI, Kit, Value
from openlpu.isa import ALU, QUIET_NAN
from openlpu.sim.kernels import Record, copy, handler
from openlpu.sim.records import ALU_CODES, CHUNK, Code, Context, Shape

_WHOLE = float(1 << 23)  # from here on every float32 is a whole number
_SIGN = -(1 << 31)
_GROUP = 4  # vectors of 16 words that a loop's round works on


class Lanes:
    """The operations of isa.ALU on 16 lanes: methods by their names, `float` spelled with f."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def apply(self, name: str, values: list[Value]) -> Value:
        """The result (int32 bits) of operation `name`."""
        method: Callable[..., Value] = getattr(self, f"op_{name}")
        return method(*values[: ALU[name].operands])

    def _float(self, a: Value) -> Value:
        return self.kit.bits(a, VF)

    def _bits(self, value: Value) -> Value:
        """Bits of a float result, every NaN the same."""
        kit = self.kit
        nan = kit.b.fcmp_unordered("uno", value, value)
        return kit.b.select(nan, kit.vi(QUIET_NAN), kit.bits(value, VI))

    def _flag(self, condition: Value) -> Value:
        return self.kit.b.sext(condition, VI)

    def _amount(self, a: Value) -> Value:
        return self.kit.b.and_(a, self.kit.vi(31))

    def op_mov(self, a: Value) -> Value:
        return a

    def op_add(self, a: Value, c: Value) -> Value:
        return self.kit.b.add(a, c)

    def op_sub(self, a: Value, c: Value) -> Value:
        return self.kit.b.sub(a, c)

    def op_mul(self, a: Value, c: Value) -> Value:
        return self.kit.b.mul(a, c)

    def op_and(self, a: Value, c: Value) -> Value:
        return self.kit.b.and_(a, c)

    def op_or(self, a: Value, c: Value) -> Value:
        return self.kit.b.or_(a, c)

    def op_xor(self, a: Value, c: Value) -> Value:
        return self.kit.b.xor(a, c)

    def op_shl(self, a: Value, c: Value) -> Value:
        return self.kit.b.shl(a, self._amount(c))

    def op_shr(self, a: Value, c: Value) -> Value:
        return self.kit.b.ashr(a, self._amount(c))

    def op_max(self, a: Value, c: Value) -> Value:
        return self.kit.b.select(self.kit.b.icmp_signed(">", a, c), a, c)

    def op_min(self, a: Value, c: Value) -> Value:
        return self.kit.b.select(self.kit.b.icmp_signed("<", a, c), a, c)

    def op_lt(self, a: Value, c: Value) -> Value:
        return self._flag(self.kit.b.icmp_signed("<", a, c))

    def op_le(self, a: Value, c: Value) -> Value:
        return self._flag(self.kit.b.icmp_signed("<=", a, c))

    def op_eq(self, a: Value, c: Value) -> Value:
        return self._flag(self.kit.b.icmp_signed("==", a, c))

    def op_sel(self, a: Value, c: Value, d: Value) -> Value:
        return self.kit.b.select(self.kit.b.icmp_signed("!=", a, self.kit.vi(0)), c, d)

    def op_fadd(self, a: Value, c: Value) -> Value:
        return self._bits(self.kit.b.fadd(self._float(a), self._float(c)))

    def op_fsub(self, a: Value, c: Value) -> Value:
        return self._bits(self.kit.b.fsub(self._float(a), self._float(c)))

    def op_fmul(self, a: Value, c: Value) -> Value:
        return self._bits(self.kit.b.fmul(self._float(a), self._float(c)))

    def op_fdiv(self, a: Value, c: Value) -> Value:
        return self._bits(self.kit.b.fdiv(self._float(a), self._float(c)))

    def op_fsqrt(self, a: Value) -> Value:
        return self._bits(self.kit.intrinsic("llvm.sqrt.v16f32", VF, [self._float(a)]))

    def op_fmax(self, a: Value, c: Value) -> Value:
        b = self.kit.b
        x, y = self._float(a), self._float(c)
        second = b.or_(b.fcmp_unordered("uno", y, y), b.fcmp_ordered("<", x, y))
        return self._bits(b.select(second, y, x))

    def op_flt(self, a: Value, c: Value) -> Value:
        return self._flag(self.kit.b.fcmp_ordered("<", self._float(a), self._float(c)))

    def op_fle(self, a: Value, c: Value) -> Value:
        return self._flag(self.kit.b.fcmp_ordered("<=", self._float(a), self._float(c)))

    def _rounded(self, a: Value) -> Value:
        """To a whole number, ties to even, as a float. Adding and taking away 2**23 rounds."""
        kit, b = self.kit, self.kit.b
        sign = b.and_(a, kit.vi(_SIGN))
        size = kit.bits(b.and_(a, kit.vi(~_SIGN)), VF)
        whole = b.fsub(b.fadd(size, kit.vf(_WHOLE)), kit.vf(_WHOLE))
        signed = kit.bits(b.or_(kit.bits(whole, VI), sign), VF)
        small = b.fcmp_ordered("<", size, kit.vf(_WHOLE))
        return b.select(small, signed, self._float(a))

    def op_frint(self, a: Value) -> Value:
        return self._bits(self._rounded(a))

    def op_itof(self, a: Value) -> Value:
        return self.kit.bits(self.kit.b.sitofp(a, VF), VI)

    def op_ftoi(self, a: Value) -> Value:
        kit, b = self.kit, self.kit.b
        whole, edge = self._rounded(a), kit.vf(2.0**31)
        above = b.fcmp_ordered(">=", whole, edge)
        below = b.fcmp_ordered("<", whole, b.fneg(edge))
        nan = b.fcmp_unordered("uno", whole, whole)
        outside = b.or_(b.or_(above, below), nan)
        inside = b.fptosi(b.select(outside, kit.vf(0.0), whole), VI)
        cut = b.select(above, kit.vi(~_SIGN), inside)
        return b.select(below, kit.vi(_SIGN), cut)

    def op_htof(self, a: Value) -> Value:
        """The half's bits, moved into a float's places, are the value / 2**112: exactly so, also
        where the half is subnormal."""
        kit, b = self.kit, self.kit.b
        size = b.shl(b.and_(a, kit.vi(0x7FFF)), kit.vi(13))
        scaled = kit.bits(b.fmul(kit.bits(size, VF), kit.vf(2.0**112)), VI)
        special = b.icmp_signed("==", b.and_(a, kit.vi(0x7C00)), kit.vi(0x7C00))
        infinite = b.or_(size, kit.vi(0x7F800000))
        size = b.select(special, infinite, scaled)
        sign = b.shl(b.and_(a, kit.vi(0x8000)), kit.vi(16))
        return self._bits(kit.bits(b.or_(size, sign), VF))


def joined(kit: Kit, parts: list[Value]) -> Value:
    """16 int32 of the low to high bytes of each lane; sign-extended where there are fewer than 4.
    parts: addresses."""
    b = kit.b
    last = len(parts) - 1
    word = b.sext(kit.load(parts[last], VB), VI)
    if last:
        word = b.shl(word, kit.vi(8 * last))
    for i, part in enumerate(parts[:last]):
        byte = b.zext(kit.load(part, VB), VI)
        word = b.or_(word, b.shl(byte, kit.vi(8 * i)) if i else byte)
    return word


def define_vxm(kit: Kit, shape: Shape) -> None:
    """The operations; UNPACK and SPLIT between words and streams; OUT, which makes words."""
    for name, code in ALU_CODES.items():
        with handler(kit, shape, code) as each:
            each(lambda r, name=name: _operation(r, name))
    for code, width in ((Code.UNPACK1, 1), (Code.UNPACK2, 2), (Code.UNPACK4, 4)):
        with handler(kit, shape, code) as each:
            each(lambda r, width=width: _unpack(r, width))
    with handler(kit, shape, Code.SPLIT) as each:
        each(_split)
    with handler(kit, shape, Code.OUT) as each:
        each(_out)


def _groups(r: Record, body: Callable[[Value], None]) -> None:
    """body(lane) for each 16 lanes of a word vector."""
    kit = r.kit

    def group(first: Value) -> None:
        for i in range(_GROUP):
            body(kit.b.add(first, kit.i64(i * LANES)))

    kit.each(kit.i64(0), kit.i64(r.shape.padded), group, step=_GROUP * LANES)


def _operation(r: Record, name: str) -> None:
    kit = r.kit
    lanes = Lanes(kit)
    operands = []
    for i in range(ALU[name].operands):
        index = r.field(1 + i)
        constant = kit.b.icmp_signed("<", index, kit.i64(0))
        fixed = r.part(Context.CONSTANTS, kit.b.not_(index), CHUNK)
        at = kit.select(constant, fixed, r.word(1 + i))
        operands.append((at, kit.select(constant, kit.i64(0), kit.i64(-1))))
    target = r.word(0)

    def group(lane: Value) -> None:
        values = []
        for at, moving in operands:
            values.append(kit.load(kit.item(at, kit.b.and_(lane, moving), I32), VI))
        kit.store(lanes.apply(name, values), kit.item(target, lane, I32))

    _groups(r, group)


def _unpack(r: Record, width: int) -> None:
    kit = r.kit
    target = r.word(0)
    sources = [r.vector(1 + i) for i in range(width)]

    def group(lane: Value) -> None:
        word = joined(kit, [kit.at(source, lane) for source in sources])
        kit.store(word, kit.item(target, lane, I32))

    _groups(r, group)


def _split(r: Record) -> None:
    kit = r.kit
    source = r.word(0)
    for i in range(4):
        wanted = kit.b.icmp_signed(">=", r.field(1 + i), kit.i64(0))
        with kit.b.if_then(wanted):
            target = r.vector(1 + i)

            def group(lane: Value, i: int = i, target: Value = target) -> None:
                word = kit.load(kit.item(source, lane, I32), VI)
                moved = kit.b.lshr(word, kit.vi(8 * i)) if i else word
                kit.store(kit.b.trunc(moved, VB), kit.at(target, lane))

            _groups(r, group)


def _out(r: Record) -> None:
    accumulator = r.part(Context.ACCUMULATORS, r.field(1), r.shape.word_bytes)
    copy(r.kit, r.word(0), accumulator, r.shape.word_bytes)
