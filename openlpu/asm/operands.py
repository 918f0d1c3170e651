"""In: a chip, and instructions. Out: Names: how text writes queues, streams and operands, and back.

    read word=12 step=1 base=0 dst=e5          every field by its name; streams as w0.. and e0..
    load group=0 step=1 src=w16 row=0 mode=s4_low
    add e4:4.take, alu3[-2] -> w0:4 e0:4       ALUs: operands, then the streams of the result
    mul e8:1, #0x00000003                      stream:bytes, .take; alu[-delay]; the constant

An ALU instruction that has no such form (it is illegal) is written by its fields, like the others.
"""

from __future__ import annotations

import re

from openlpu.asm import binary
from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.isa import DELAYS, KINDS, SOURCE_WIDTH, Kind, Mode, Source, queue_name, units

_FIELD = re.compile(r"([a-z_]+)=([0-9a-z_-]+)")
_WHOLE = re.compile(r"-?[0-9]{1,19}")
_STREAM = re.compile(r"([we])([0-9]{1,4})")
_STREAM_OPERAND = re.compile(r"([we][0-9]{1,4}):([124])(\.take)?")
_TAP = re.compile(r"alu([0-9]{1,4})\[-?([0-9]{1,4})\]")
_CONSTANT = re.compile(r"#(0x[0-9a-f]{1,8}|-?[0-9]{1,10})")
_RESULT = re.compile(r"([we][0-9]{1,4}):([124])")
_BY_WIDTH = {width: source for source, width in SOURCE_WIDTH.items()}
_NO_OPERAND = (int(Source.NONE), 0)
_MODES = {mode.name.lower(): int(mode) for mode in Mode}


class Names:
    """The names of one chip."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self._queues = [queue_name(chip, queue) for queue in range(units(chip).count)]
        self._numbers = {name: queue for queue, name in enumerate(self._queues)}
        self._written: dict[tuple[str, tuple[int, ...]], str] = {}
        self._read: dict[tuple[str, str], tuple[int, ...]] = {}

    def queue(self, number: int) -> str:
        if not 0 <= number < len(self._queues):
            raise ProgramError(f"{self.chip.name} has no queue {number}")
        return self._queues[number]

    def slice(self, number: int) -> str:
        """The name of a slice is that of its queue."""
        if not 0 <= number < self.chip.slices:
            raise ProgramError(f"{self.chip.name} has no slice {number}")
        return self._queues[number]

    def queue_number(self, name: str) -> int:
        if name not in self._numbers:
            raise ProgramError(f"{self.chip.name} has no queue {name[:40]!r}")
        return self._numbers[name]

    def slice_number(self, name: str) -> int:
        number = self._numbers.get(name, self.chip.slices)
        if number >= self.chip.slices:
            raise ProgramError(f"{self.chip.name} has no slice {name[:40]!r}")
        return number

    def operands(self, op: str, args: tuple[int, ...]) -> str:
        """The operands of an instruction, as text."""
        key = (op, args)
        if key not in self._written:
            if op not in KINDS or len(args) != len(KINDS[op].fields):
                raise ProgramError(f"{op} with {len(args)} fields is no instruction")
            text = self._alu_text(args) if KINDS[op].unit == "vxm" else None
            self._written[key] = self._fields_text(KINDS[op], args) if text is None else text
        return self._written[key]

    def args(self, op: str, text: str) -> tuple[int, ...]:
        """The fields of an instruction from its operands' text, each in its field's range."""
        key = (op, text)
        if key not in self._read:
            kind = KINDS.get(op)
            if kind is None or kind.unit in ("icu", "c2c"):
                raise ProgramError(f"{op[:40]!r} is no instruction of a section")
            short = kind.unit == "vxm" and "a_from=" not in text
            args = self._alu_args(text) if short else self._fields_args(kind, text)
            binary.pack(op, args)
            self._read[key] = args
        return self._read[key]

    # -- streams ------------------------------------------------------------------------------

    def _stream(self, number: int) -> str:
        side, index = divmod(number, self.chip.streams)
        return f"{'we'[side]}{index}" if side < 2 else str(number)

    def _stream_number(self, text: str) -> int:
        found = _STREAM.fullmatch(text)
        if found is None or int(found[2]) >= self.chip.streams:
            raise ProgramError(f"{self.chip.name} has no stream {text[:40]!r}")
        return int(found[2]) + (self.chip.streams if found[1] == "e" else 0)

    # -- any instruction, by its fields -------------------------------------------------------

    def _fields_text(self, kind: Kind, args: tuple[int, ...]) -> str:
        streams = {port.field for port in (*kind.reads, *kind.writes)}
        words = []
        for field, value in zip(kind.fields, args, strict=True):
            text = str(value)
            if field.name in streams:
                text = self._stream(value)
            elif field.name == "mode" and value < len(Mode):
                text = Mode(value).name.lower()
            words.append(f"{field.name}={text}")
        return " ".join(words)

    def _fields_args(self, kind: Kind, text: str) -> tuple[int, ...]:
        values: dict[str, int] = {}
        names = [field.name for field in kind.fields]
        for word in text.split():
            found = _FIELD.fullmatch(word)
            if found is None or found[1] not in names or found[1] in values:
                raise ProgramError(f"{word[:40]!r} is no field of {kind.name}, or stands twice")
            values[found[1]] = self._value(found[1], found[2])
        missing = [name for name in names if name not in values]
        if missing:
            raise ProgramError(f"{kind.name} lacks {', '.join(missing)}")
        return tuple(values[name] for name in names)

    def _value(self, field: str, text: str) -> int:
        if _WHOLE.fullmatch(text):
            return int(text)
        if field == "mode" and text in _MODES:
            return _MODES[text]
        return self._stream_number(text)

    # -- ALU instructions ---------------------------------------------------------------------

    def _alu_text(self, args: tuple[int, ...]) -> str | None:
        """The short form, or None if it would not read back as the same fields."""
        *pairs, imm, width, west, east = args
        operands = [(pairs[i], pairs[i + 1]) for i in (0, 2, 4)]
        while operands and operands[-1] == _NO_OPERAND:
            operands.pop()
        parts = []
        for source, at in operands:
            if source in SOURCE_WIDTH:
                take = ".take" if at & 1 else ""
                parts.append(f"{self._stream(at >> 1)}:{SOURCE_WIDTH[Source(source)]}{take}")
            elif source == Source.TAP:
                alu, delay = divmod(at, DELAYS)
                parts.append(f"alu{alu}[{-delay}]")
            else:
                parts.append(f"#0x{imm & 0xFFFFFFFF:08x}")
        text = ", ".join(parts)
        if width:
            results = [f"{side}{first - 1}" for side, first in (("w", west), ("e", east)) if first]
            text += " ->" + "".join(f" {stream}:{width}" for stream in results)
        try:
            return text if self._alu_args(text) == args else None
        except ProgramError:
            return None

    def _alu_args(self, text: str) -> tuple[int, ...]:
        left, arrow, right = text.partition("->")
        operands = [self._operand(part.strip()) for part in left.split(",")] if left.strip() else []
        constants = {imm for source, _, imm in operands if source == Source.IMM}
        if len(operands) > 3 or len(constants) > 1:
            raise ProgramError("an ALU takes at most 3 operands, and one constant")
        found: list[int] = []
        for source, at, _ in (*operands, *[(*_NO_OPERAND, 0)] * (3 - len(operands))):
            found += (source, at)
        imm = constants.pop() if constants else 0
        width, first = 0, {"w": 0, "e": 0}
        for word in right.split():
            result = _RESULT.fullmatch(word)
            if result is None or first[word[0]] or width not in (0, int(result[2])):
                raise ProgramError(f"{word[:40]!r} is no result: one w and one e stream, as w0:4")
            width = int(result[2])
            first[word[0]] = 1 + self._stream_number(result[1]) % self.chip.streams
        if arrow and not width:
            raise ProgramError("no result stands after ->")
        return (*found, imm, width, first["w"], first["e"])

    def _operand(self, text: str) -> tuple[int, int, int]:
        """Source, `at`, constant."""
        if found := _STREAM_OPERAND.fullmatch(text):
            at = 2 * self._stream_number(found[1]) + bool(found[3])
            return int(_BY_WIDTH[int(found[2])]), at, 0
        if found := _TAP.fullmatch(text):
            delay = int(found[2])
            if delay >= DELAYS:
                raise ProgramError(f"{text}: a delay is at most {DELAYS - 1} cycles")
            return int(Source.TAP), int(found[1]) * DELAYS + delay, 0
        if found := _CONSTANT.fullmatch(text):
            value = int(found[1], 0) if found[1].startswith("0x") else int(found[1])
            if not -(1 << 31) <= value < 1 << 32:
                raise ProgramError(f"{text}: a constant has 32 bits")
            return int(Source.IMM), 0, value - (1 << 32) if value >= 1 << 31 else value
        raise ProgramError(f"{text[:40]!r} is no operand")
