"""In: nothing. Out: KINDS, every instruction declared once: bits, unit, latency, operands, meaning.

Encoding, text, timing, energy, docs/isa.md and the simulators' dispatch are derived from these
declarations.

**Time.** An instruction issued at cycle t by a unit at position x reads its stream operands at t,
in the registers of x, and its result stands in the registers of x at t + latency; a value moves
one register per cycle in its stream's direction. Nothing waits: what is not there is an error.

**Streams.** Number 0 .. S-1 run west, S .. 2S-1 run east (S = streams per direction). A value of
several bytes uses neighbouring streams, low byte first; groups of 4 are aligned to 4, of 2 to 2. A
register holds a value until it moves on; a read with `take` removes it at the end of the cycle.
Errors: reading an empty register; putting a value where one stands or arrives in the same cycle.
At either end of the chip values vanish. At the end of a section no stream may hold a value.

**A cycle** is read, execute, commit: all reads see the state before the cycle's commits, takes
come before what is put for the same register in the next cycle.

**State.** MEM lives on through all sections. Everything else (streams, ALU histories, loaded and
installed weights, accumulators, base registers) is empty when a section begins; bases are then
loaded as the section's run says. Reading an empty accumulator, history or base is an error; so is
`act` on a plane on which nothing was installed, and `install` without a `load` since the last one.

**Queues** issue in order, at most one instruction a cycle each; a MEM queue one that reads memory
(read, gather) and one that does not (write, scatter, setbase), and if both reach memory, in
different banks. An instruction with count n and period d issues n times, d cycles apart, the i-th
time with its stepped field moved by i * step; others may issue between. At most `repeats`
repetitions (count above 1) may be under way in a queue, from first to last cycle.

**Addresses.** The word of an access is word + i * step + the value of its base register. Register
0 is always 0. The bank is that of word + i * step alone, and the sum must stay inside this bank. A
base of -1 turns the access off: a read gives zeros, a write nothing. `setbase` takes an int16 from
a stream: negative becomes -1, above `limit` becomes `limit`; so an access is provably in its bank.
The maps of gather and scatter saturate likewise: negative gives 0 or writes nothing. A read sees
writes issued at least mem_write cycles before it.

**MXM.** `install` needs a `load` since the last install, the last one at least mxm_load cycles
before; what was not loaded keeps its old bytes (zeros at first). An `act` sees the last install
that is at least mxm_install cycles old. `out` before mxm_dot cycles have passed since the slot's
last `act` is an error; an `act` that adds to a slot needs one that did not, earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip

I32 = NDArray[np.int32]


class Field(NamedTuple):
    """One field of an instruction. stepped: moves by the field `step` on each repetition."""

    name: str
    bits: int
    signed: bool = False
    stepped: bool = False


class StreamPort(NamedTuple):
    """Streams that an instruction reads or writes: field holds the first stream's number.

    width: how many streams; 0 means 4 if the field `wide` is set, else 1; -1 the install streams.
    take: name of the field that says whether a read removes the value; "" means always.
    """

    field: str
    width: int
    take: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """An instruction. latency and energy name fields of chip.Latency and chip.Energy."""

    name: str
    unit: str  # mem load act out vxm sxm icu c2c
    meaning: str
    fields: tuple[Field, ...] = ()
    latency: str = ""
    energy: str = ""
    reads: tuple[StreamPort, ...] = ()
    writes: tuple[StreamPort, ...] = ()

    def index(self, name: str) -> int:
        """Where a field stands in an instruction's args."""
        return next(i for i, entry in enumerate(self.fields) if entry.name == name)

    @property
    def stepped(self) -> int:
        """Index of the field that repetitions move, or -1."""
        return next((i for i, entry in enumerate(self.fields) if entry.stepped), -1)


class Source(IntEnum):
    """Where an ALU takes an operand from; the operand's field then holds...

    NONE    nothing
    BYTE    stream * 2 + take: one stream, sign-extended
    HALF    stream * 2 + take: two streams, sign-extended
    WORD    stream * 2 + take: four streams
    TAP     alu * 64 + delay: what that ALU's result was `delay` cycles ago, 0 being the newest
    IMM     nothing; the field `imm` is the operand
    """

    NONE = 0
    BYTE = 1
    HALF = 2
    WORD = 3
    TAP = 4
    IMM = 5


SOURCE_WIDTH = {Source.BYTE: 1, Source.HALF: 2, Source.WORD: 4}
DELAYS = 64  # of a TAP operand's field


class Mode(IntEnum):
    """How `load` reads a byte: as it is, or one of its nibbles (unsigned, or minus 8)."""

    I8 = 0
    U4_LOW = 1
    U4_HIGH = 2
    S4_LOW = 3
    S4_HIGH = 4


@dataclass(frozen=True, slots=True)
class AluOp:
    """A lane operation on 32-bit words. floats: the operands and result are float32 bits; a NaN
    result is always 0x7fc00000. compute takes int32 arrays and returns one."""

    name: str
    operands: int
    latency: str
    meaning: str
    compute: Callable[..., I32]


QUIET_NAN = 0x7FC00000


def _bits(value: NDArray[np.float32]) -> I32:
    """float32 -> its bits, every NaN the same."""
    value = np.where(np.isnan(value), np.float32(np.nan), value.astype(np.float32, copy=False))
    return value.view(np.int32)


def _f(x: I32) -> NDArray[np.float32]:
    return np.ascontiguousarray(x).view(np.float32)


def _flag(condition: NDArray[np.bool_]) -> I32:
    return np.where(condition, np.int32(-1), np.int32(0))


def _ftoi(a: I32) -> I32:
    value = _f(a)
    safe = np.where(np.isnan(value), np.float32(0), value).astype(np.float64)
    rounded = np.clip(np.rint(safe), -(2.0**31), 2.0**31 - 1)
    return rounded.astype(np.int64).astype(np.int32)


def _shift(a: I32) -> I32:
    return a & np.int32(31)


_ALU = (
    AluOp("mov", 1, "alu_int", "a", lambda a: a),
    AluOp("add", 2, "alu_int", "a + b, modulo 2^32", lambda a, b: a + b),
    AluOp("sub", 2, "alu_int", "a - b, modulo 2^32", lambda a, b: a - b),
    AluOp("mul", 2, "alu_mul", "a * b, modulo 2^32", lambda a, b: a * b),
    AluOp("and", 2, "alu_int", "a & b", lambda a, b: a & b),
    AluOp("or", 2, "alu_int", "a | b", lambda a, b: a | b),
    AluOp("xor", 2, "alu_int", "a ^ b", lambda a, b: a ^ b),
    AluOp("shl", 2, "alu_int", "a << (b & 31)", lambda a, b: a << _shift(b)),
    AluOp("shr", 2, "alu_int", "a >> (b & 31), signed", lambda a, b: a >> _shift(b)),
    AluOp("max", 2, "alu_int", "the larger, signed", np.maximum),
    AluOp("min", 2, "alu_int", "the smaller, signed", np.minimum),
    AluOp("lt", 2, "alu_int", "-1 if a < b, signed, else 0", lambda a, b: _flag(a < b)),
    AluOp("le", 2, "alu_int", "-1 if a <= b, signed, else 0", lambda a, b: _flag(a <= b)),
    AluOp("eq", 2, "alu_int", "-1 if a == b, else 0", lambda a, b: _flag(a == b)),
    AluOp("sel", 3, "alu_int", "b if a is not 0, else c", lambda a, b, c: np.where(a != 0, b, c)),
    AluOp("fadd", 2, "alu_float", "fl(a + b)", lambda a, b: _bits(_f(a) + _f(b))),
    AluOp("fsub", 2, "alu_float", "fl(a - b)", lambda a, b: _bits(_f(a) - _f(b))),
    AluOp("fmul", 2, "alu_mul", "fl(a * b)", lambda a, b: _bits(_f(a) * _f(b))),
    AluOp("fdiv", 2, "alu_divide", "fl(a / b)", lambda a, b: _bits(_f(a) / _f(b))),
    AluOp("fsqrt", 1, "alu_divide", "fl(sqrt a)", lambda a: _bits(np.sqrt(_f(a)))),
    AluOp(
        "fmax",
        2,
        "alu_int",
        "b if a < b, else a; NaN if either is",
        lambda a, b: _bits(np.where(np.isnan(_f(b)) | (_f(a) < _f(b)), _f(b), _f(a))),
    ),
    AluOp("flt", 2, "alu_int", "-1 if a < b, else 0", lambda a, b: _flag(_f(a) < _f(b))),
    AluOp("fle", 2, "alu_int", "-1 if a <= b, else 0", lambda a, b: _flag(_f(a) <= _f(b))),
    AluOp(
        "frint",
        1,
        "alu_convert",
        "to a whole number, ties to even",
        lambda a: _bits(np.rint(_f(a))),
    ),
    AluOp("itof", 1, "alu_convert", "float of an int32", lambda a: _bits(a.astype(np.float32))),
    AluOp(
        "ftoi", 1, "alu_convert", "int32 nearest to a, ties to even; NaN gives 0; saturates", _ftoi
    ),
    AluOp(
        "htof",
        1,
        "alu_convert",
        "float32 of a half in the low 16 bits",
        lambda a: _bits(a.astype(np.uint16).view(np.float16).astype(np.float32)),
    ),
)
ALU: dict[str, AluOp] = {op.name: op for op in _ALU}

_STEP = Field("step", 17, signed=True)
_TAKE = Field("take", 1)
_VXM_FIELDS = (
    *(
        Field(f"{operand}_{part}", bits)
        for operand in "abc"
        for part, bits in (("from", 3), ("at", 11))
    ),
    Field("imm", 32, signed=True),
    Field("width", 3),  # streams of the result: 0 (none), 1, 2 or 4
    Field("west", 6),  # 1 + number of the first westward stream, or 0
    Field("east", 6),  # 1 + number of the first eastward stream within its direction, or 0
)
_SXM = (Field("src", 6), Field("dst", 6), Field("wide", 1), _TAKE)
_ADDRESS = (Field("word", 16, stepped=True), _STEP, Field("base", 4))

_KINDS = (
    # -- MEM
    Kind(
        "read",
        "mem",
        "a word onto a stream",
        (*_ADDRESS, Field("dst", 6)),
        "mem_read",
        "mem_read_byte",
        writes=(StreamPort("dst", 1),),
    ),
    Kind(
        "write",
        "mem",
        "a stream into a word; reads see it mem_write cycles later",
        (*_ADDRESS, Field("src", 6), _TAKE),
        "mem_write",
        "mem_write_byte",
        reads=(StreamPort("src", 1, "take"),),
    ),
    Kind(
        "gather",
        "mem",
        "lane l of word + map[l] onto a stream; map: int16 on two streams",
        (*_ADDRESS, Field("dst", 6), Field("map", 6), _TAKE, Field("limit", 16)),
        "mem_read",
        "mem_read_byte",
        (StreamPort("map", 2, "take"),),
        (StreamPort("dst", 1),),
    ),
    Kind(
        "scatter",
        "mem",
        "lane l of a stream into word + map[l]; a negative map[l] writes nothing",
        (*_ADDRESS, Field("src", 6), Field("map", 6), _TAKE, Field("limit", 16)),
        "mem_write",
        "mem_write_byte",
        (StreamPort("src", 1, "take"), StreamPort("map", 2, "take")),
    ),
    Kind(
        "setbase",
        "mem",
        "base register = the int16 in lanes lane, lane + 1 of a stream, cut to -1 .. limit",
        (Field("reg", 4), Field("lane", 10), Field("limit", 16), Field("src", 6), _TAKE),
        "base_load",
        "load_byte",
        reads=(StreamPort("src", 1, "take"),),
    ),
    # -- MXM. Each plane has three queues: load (with install), act, out.
    Kind(
        "load",
        "load",
        "install_streams vectors into columns (row = 0) or rows (row = 1) "
        "group * install_streams ... of the plane's buffer",
        (
            Field("group", 8, stepped=True),
            Field("step", 9, signed=True),
            Field("src", 6),
            Field("row", 1),
            Field("mode", 3),
        ),
        "mxm_load",
        "load_byte",
        reads=(StreamPort("src", -1),),
    ),
    Kind(
        "install",
        "load",
        "the buffer becomes the plane's weights",
        (),
        "mxm_install",
        "load_byte",
    ),
    Kind(
        "act",
        "act",
        "slot = (add ? slot : 0) + weights^T x; x int8 per row, the slot int32 per column",
        (
            Field("slot", 12, stepped=True),
            Field("step", 13, signed=True),
            Field("src", 6),
            _TAKE,
            Field("add", 1),
        ),
        "mxm_dot",
        "mac",
        reads=(StreamPort("src", 1, "take"),),
    ),
    Kind(
        "out",
        "out",
        "an accumulator onto four streams",
        (Field("slot", 12, stepped=True), Field("step", 13, signed=True), Field("dst", 6)),
        "mxm_out",
        "load_byte",
        writes=(StreamPort("dst", 4),),
    ),
    # -- SXM
    Kind(
        "shift",
        "sxm",
        "out[l] = in[l - amount], 0 from outside",
        (*_SXM, Field("amount", 11, signed=True)),
        "sxm_across",
        "permute_byte",
        (StreamPort("src", 0, "take"),),
        (StreamPort("dst", 0),),
    ),
    Kind(
        "permute",
        "sxm",
        "out[l] = in[map[l]], 0 where the map is -1; the map uses no lane twice",
        (*_SXM, Field("map", 12)),
        "sxm_across",
        "permute_byte",
        (StreamPort("src", 0, "take"),),
        (StreamPort("dst", 0),),
    ),
    Kind(
        "distribute",
        "sxm",
        "out[l] = in[map[l]] inside each superlane, 0 where the map is -1",
        (*_SXM, Field("map", 12)),
        "sxm_superlane",
        "permute_byte",
        (StreamPort("src", 0, "take"),),
        (StreamPort("dst", 0),),
    ),
    Kind(
        "rotate",
        "sxm",
        "out[l] = in[(l + amount) mod 16] inside each superlane",
        (*_SXM, Field("amount", 11, signed=True)),
        "sxm_superlane",
        "permute_byte",
        (StreamPort("src", 0, "take"),),
        (StreamPort("dst", 0),),
    ),
    Kind(
        "transpose",
        "sxm",
        "lane i of stream j and lane j of stream i change places, per superlane",
        (Field("src", 6), Field("dst", 6)),
        "sxm_transpose",
        "permute_byte",
        (StreamPort("src", 16),),
        (StreamPort("dst", 16),),
    ),
    # -- ICU: the text of a queue. nop and repeat give the cycles of a Program's issues.
    Kind("nop", "icu", "waits `cycles`", (Field("cycles", 16),)),
    Kind(
        "repeat",
        "icu",
        "the instruction before issues `count` more times, `period` cycles apart",
        (Field("count", 16), Field("period", 16)),
    ),
    Kind(
        "ifetch",
        "icu",
        "fetches the text of a section",
        (Field("section", 16),),
        energy="fetch_byte",
    ),
    Kind("sync", "icu", "waits for notify"),
    Kind("notify", "icu", "releases every sync, barrier_cycles later"),
    # -- C2C: declared; one chip has no links.
    Kind("send", "c2c", "a vector to a link", (Field("link", 5), Field("src", 6), _TAKE)),
    Kind("receive", "c2c", "a vector from a link", (Field("link", 5), Field("dst", 6))),
    Kind("deskew", "c2c", "waits for the next epoch of the chip's counter"),
)
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *_KINDS,
        *(Kind(op.name, "vxm", op.meaning, _VXM_FIELDS, op.latency, op.latency) for op in _ALU),
    )
}
OPCODES: dict[str, int] = {name: code for code, name in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Units:
    """Queue numbers of a chip: MEM slices, then load, act, out per plane, then ALUs, then SXM."""

    mem: int
    load: int
    vxm: int
    sxm: int
    count: int


def units(chip: Chip) -> Units:
    """The first queue of each unit, and how many queues there are."""
    load = chip.slices
    vxm = load + 3 * chip.planes
    sxm = vxm + chip.alus
    return Units(0, load, vxm, sxm, sxm + 2 * chip.sxm_queues)


@dataclass(frozen=True, slots=True)
class Place:
    """What a queue drives: unit as in Kind.unit, index (slice, plane, ALU, or hemisphere *
    sxm_queues + queue) and position on the line of stream registers."""

    unit: str
    index: int
    position: int


def place(chip: Chip, queue: int) -> Place:
    """The unit behind a queue."""
    first = units(chip)
    if queue < first.load:
        return Place("mem", queue, chip.mem_position(queue))
    if queue < first.vxm:
        plane, part = divmod(queue - first.load, 3)
        return Place(("load", "act", "out")[part], plane, chip.mxm_position(plane))
    if queue < first.sxm:
        return Place("vxm", queue - first.vxm, chip.vxm_position)
    index = queue - first.sxm
    return Place("sxm", index, chip.sxm_position(index // chip.sxm_queues))


def queue_name(chip: Chip, queue: int) -> str:
    """As text writes it: mem.w3, mxm2.act, alu7, sxm.e0."""
    where = place(chip, queue)
    unit, index = where.unit, where.index
    if unit == "mem":
        side, number = divmod(index, chip.slices_per_hemisphere)
        return f"mem.{'we'[side]}{number}"
    if unit == "vxm":
        return f"alu{index}"
    if unit == "sxm":
        side, number = divmod(index, chip.sxm_queues)
        return f"sxm.{'we'[side]}{number}"
    return f"mxm{index}.{unit}"


def latency(chip: Chip, kind: Kind) -> int:
    """Cycles from issue to result."""
    return int(getattr(chip.latency, kind.latency))
