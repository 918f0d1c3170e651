"""In: numbers, plain and odd. Out: each ALU operation gives what exact arithmetic says, in Step.

The exact side knows no numpy arithmetic: floats are fractions, rounded here; words are integers.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from random_programs import issue, section
from random_sections import TINY

from openlpu import isa
from openlpu.check import check
from openlpu.program import Issue, Port, Program, Run, Vector
from openlpu.sim import Step

NAN = isa.QUIET_NAN
INFINITY = 0x7F800000
SIGN = 1 << 31
LARGEST = Fraction((1 << 24) - 1) * (1 << 104)
ROWS = 40


# -- exact arithmetic on float32 bits


def is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > INFINITY


def is_finite(bits: int) -> bool:
    return bits & 0x7FFFFFFF < INFINITY


def exact(bits: int) -> Fraction:
    """The value of a finite float32."""
    exponent, mantissa = bits >> 23 & 255, bits & 0x7FFFFF
    value = Fraction(mantissa + (0x800000 if exponent else 0)) * Fraction(2) ** (
        max(exponent, 1) - 150
    )
    return -value if bits & SIGN else value


def rounded(value: Fraction, negative_zero: bool = False) -> int:
    """The nearest float32, ties to even; a zero has the sign asked for."""
    if value == 0:
        return SIGN if negative_zero else 0
    sign, size = (SIGN if value < 0 else 0), abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    size = round(size / unit) * unit  # Python's round of a Fraction goes to even
    if size > LARGEST:
        return sign | INFINITY
    whole = int(size / Fraction(2) ** -149)
    if whole < 1 << 23:
        return sign | whole
    exponent = whole.bit_length() - 24
    return sign | (exponent + 1) << 23 | (whole >> exponent) - (1 << 23)


def added(a: int, b: int) -> int:
    if is_nan(a) or is_nan(b):
        return NAN
    if not is_finite(a) or not is_finite(b):
        clash = not is_finite(a) and not is_finite(b) and a != b
        return NAN if clash else (b if is_finite(a) else a)
    return rounded(exact(a) + exact(b), bool(a & b & SIGN))


def multiplied(a: int, b: int) -> int:
    sign = (a ^ b) & SIGN
    if is_nan(a) or is_nan(b):
        return NAN
    if not is_finite(a) or not is_finite(b):
        return NAN if 0 in (a & ~SIGN, b & ~SIGN) else sign | INFINITY
    return rounded(exact(a) * exact(b), bool(sign)) if exact(a) * exact(b) else sign


def divided(a: int, b: int) -> int:
    sign = (a ^ b) & SIGN
    if is_nan(a) or is_nan(b):
        return NAN
    if not is_finite(a):
        return sign | INFINITY if is_finite(b) else NAN
    if not is_finite(b):
        return sign
    if exact(b) == 0:
        return NAN if exact(a) == 0 else sign | INFINITY
    return rounded(exact(a) / exact(b), bool(sign))


def root(a: int) -> int:
    if is_nan(a) or (a & SIGN and a != SIGN):
        return NAN
    if a in (0, SIGN, INFINITY):
        return a
    value = exact(a)
    # The root to 120 binary places, of which the least root has 45 that count, and one more bit
    # that says whether anything follows: enough to round.
    scale = 2 * 120
    scaled = value * (1 << scale)
    whole = math.isqrt(int(scaled))
    inexact = Fraction(whole) ** 2 != scaled
    return rounded(Fraction(2 * whole + inexact, 2 << scale // 2))


def compared(a: int, b: int, holds: Callable[[Fraction, Fraction], bool]) -> int:
    def place(bits: int) -> Fraction:
        if is_finite(bits):
            return exact(bits)
        return Fraction(-1 if bits & SIGN else 1) * (1 << 200)

    return -1 if not is_nan(a) and not is_nan(b) and holds(place(a), place(b)) else 0


def larger(a: int, b: int) -> int:
    if is_nan(a) or is_nan(b):
        return NAN
    return b if compared(a, b, lambda x, y: x < y) else a


def whole_float(a: int) -> int:
    if is_nan(a):
        return NAN
    return rounded(Fraction(round(exact(a))), bool(a & SIGN)) if is_finite(a) else a


def to_int(a: int) -> int:
    if is_nan(a):
        return 0
    if not is_finite(a):
        return -(1 << 31) if a & SIGN else (1 << 31) - 1
    return min(max(round(exact(a)), -(1 << 31)), (1 << 31) - 1)


def of_half(a: int) -> int:
    value = struct.unpack("<e", (a & 0xFFFF).to_bytes(2, "little"))[0]
    if math.isnan(value):
        return NAN
    return int.from_bytes(struct.pack("<f", value), "little")


def signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word & SIGN else word


Meaning = Callable[..., int]
# Integer operations take signed words, those on floats take bits; results are reduced to 32 bits.
INTEGERS: dict[str, Meaning] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b % 32,
    "shr": lambda a, b: a >> b % 32,
    "max": max,
    "min": min,
    "lt": lambda a, b: -(a < b),
    "le": lambda a, b: -(a <= b),
    "eq": lambda a, b: -(a == b),
    "sel": lambda a, b, c: b if a else c,
    "itof": lambda a: rounded(Fraction(a)),
}
FLOATS: dict[str, Meaning] = {
    "fadd": added,
    "fsub": lambda a, b: added(a, b ^ SIGN) if not is_nan(b) else NAN,
    "fmul": multiplied,
    "fdiv": divided,
    "fsqrt": root,
    "fmax": larger,
    "flt": lambda a, b: compared(a, b, lambda x, y: x < y),
    "fle": lambda a, b: compared(a, b, lambda x, y: x <= y),
    "frint": whole_float,
    "ftoi": to_int,
    "htof": of_half,
}

ODD = (
    *(0, SIGN, 1, SIGN | 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF),
    *(INFINITY, SIGN | INFINITY, NAN, 0x7F800001, 0xFFC00001, 0x3F000000, 0x3FC00000, 0x40200000),
    *(0xBF000000, 0x4B000000, 0x4AFFFFFF, 0x4F000000, 0xCF000000, 0x4EFFFFFF, 0x34000000),
    *(0x33800000, 0x7C00, 0x7C01, 0x0001, 0x8001, 0x03FF, 31, 32, 0x7FFFFFFF, 0xFFFFFFFF),
)


def words(seed: int) -> np.ndarray:
    """ROWS vectors: every odd word with every other, near numbers, then anything."""
    rng = random.Random(seed)
    count = ROWS * TINY.lanes
    found = [rng.choice(ODD) for _ in range(count)]
    for i in range(count // 3, count):
        found[i] = rng.getrandbits(32)
    for i in range(2 * count // 3, count):  # floats of like size, so that sums round
        found[i] = rng.getrandbits(1) << 31 | rng.randint(100, 150) << 23 | rng.getrandbits(23)
    if seed % 2:
        rng.shuffle(found)
    return np.array(found, np.uint32).reshape(ROWS, TINY.lanes)


# -- the machine's side


def laid(name: str, direction: str, first: int) -> Port:
    """A port of words whose bytes lie in four neighbouring slices."""
    slices = tuple(range(first, first + 4))
    features = np.arange(TINY.lanes, dtype=np.int32)[None]
    return Port(name, direction, ROWS, (Vector(slices, 0, 1),), features)


def machine(op: isa.AluOp) -> Program:
    """Operands from west slices through ALU 3 into east ones, ROWS vectors in as many cycles."""
    start, east = 10, TINY.streams
    issues: list[Issue] = []
    fields: dict[str, int] = {}
    for number, letter in enumerate("abc"[: op.operands]):
        fields |= {f"{letter}_from": isa.Source.WORD, f"{letter}_at": 2 * (east + 4 * number) + 1}
        for s in range(4 * number, 4 * number + 4):
            away = TINY.vxm_position - TINY.mem_position(s)
            t = start - away - TINY.latency.mem_read
            issues.append(issue(s, "read", t, ROWS, step=1, dst=east + s))
    alu = isa.units(TINY).vxm + 3
    issues.append(issue(alu, op.name, start, ROWS, width=4, east=17, **fields))
    done = start + isa.latency(TINY, isa.KINDS[op.name])
    for j in range(4):
        s = TINY.slices_per_hemisphere + j
        t = done + TINY.mem_position(s) - TINY.vxm_position
        issues.append(issue(s, "write", t, ROWS, step=1, src=east + 16 + j, take=1))
    cycles = done + 2 + ROWS
    ports = (laid("a", "in", 0), laid("b", "in", 4), laid("c", "in", 8), laid("y", "out", 16))
    maps = np.zeros((0, TINY.lanes), np.int16)
    return Program("tiny", (section("alu", cycles, issues),), (Run(0),), (), maps, (), ports)


def computed(op: isa.AluOp, inputs: Sequence[np.ndarray]) -> np.ndarray:
    program = machine(op)
    check(program, TINY)
    step = Step(program, TINY)
    for name, value in zip("abc", inputs, strict=False):
        split = value.view(np.uint8).reshape(ROWS, 1, TINY.lanes, 4)
        step.write(name, np.ascontiguousarray(np.moveaxis(split, 3, 2)))
    step.run({})
    data = np.ascontiguousarray(np.moveaxis(step.read("y"), 2, 3))
    return data.view(np.uint32).reshape(ROWS, TINY.lanes)


def test_every_operation_has_an_exact_meaning() -> None:
    assert {*INTEGERS, *FLOATS} == set(isa.ALU)


@pytest.mark.parametrize("name", isa.ALU)
def test_operation(name: str) -> None:
    op = isa.ALU[name]
    inputs = [words(seed) for seed in range(op.operands)]
    if name == "sel":
        inputs[0][::2] = 0
    found = computed(op, inputs).ravel().tolist()
    for result, *operands in zip(found, *(value.ravel().tolist() for value in inputs), strict=True):
        if name in INTEGERS:
            wanted = INTEGERS[name](*map(signed, operands)) & 0xFFFFFFFF
        else:
            wanted = FLOATS[name](*operands) & 0xFFFFFFFF
        assert result == wanted, f"{name} {[hex(each) for each in operands]}: {result:#x}"


def test_rounding_here_is_rounding() -> None:
    """The exact side itself, where float64 is exact enough to judge it."""
    rng = random.Random(5)
    for _ in range(2000):
        value = rng.choice((1, -1)) * rng.random() * 2.0 ** rng.randint(-160, 130)
        with np.errstate(over="ignore"):
            wanted = int(np.float32(value).view(np.uint32))
        assert rounded(Fraction(value), value < 0) == wanted, value
