"""In: a Section. Out: the text of each of its queues, as bits; and the same Section back from it.

An instruction is one number, cut into bytes, lowest first: the opcode in the lowest 8 bits, above
it the fields of isa.KINDS in their order, then zeros up to a whole byte. Signed fields are in two's
complement.

The text of a queue is what its control unit fetches: the first issues in the order of time, those
of one cycle by operation and operands. Time is given by the instructions `nop` and `repeat`:

- A queue's clock stands at -1 when a section begins. An instruction issues one cycle after the one
  before it.
- `nop` of n cycles before an instruction lets n more cycles pass. Longer waits take several: all
  but the last are full (65,535).
- `nop` of 0 cycles: the next instruction issues in the same cycle as the one before it. Only MEM
  queues, which issue a read and a write together, have a use for it.
- `repeat` after an instruction issues it `count` more times, `period` cycles apart. The queue goes
  on meanwhile: what follows counts its cycles from the first issue.

An instruction without repetitions has no `repeat`; its period is 1. So a section has one text, and
a text at most one meaning. The tags of issues are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.isa import KINDS, OPCODES, place, queue_name, units
from openlpu.program import Issue, Section

# Of a section: these bound what a hostile file can make of its bytes.
MOST_ISSUES = 1 << 21
MOST_CYCLES = (1 << 31) - 1
_LONGEST_NOP = (1 << 16) - 1
_MOST_REPEATS = (1 << 16) - 1
_LONGEST_PERIOD = (1 << 16) - 1
_NOT_IN_SECTIONS = ("icu", "c2c")


class _Bits(NamedTuple):
    """One field of a form, and the lowest and highest value that it holds."""

    name: str
    shift: int
    mask: int
    low: int
    high: int


class _Form(NamedTuple):
    """How an instruction lies in bits."""

    op: str
    unit: str
    code: int
    size_bytes: int
    used_bits: int
    fields: tuple[_Bits, ...]


def _form(op: str) -> _Form:
    kind, at, fields = KINDS[op], 8, []
    for field in kind.fields:
        half = 1 << (field.bits - 1)
        low, high = (-half, half - 1) if field.signed else (0, 2 * half - 1)
        fields.append(_Bits(field.name, at, (1 << field.bits) - 1, low, high))
        at += field.bits
    return _Form(op, kind.unit, OPCODES[op], -(-at // 8), at, tuple(fields))


_FORMS = {op: _form(op) for op in KINDS}
_BY_CODE = {form.code: form for form in _FORMS.values()}
_NOP, _REPEAT = _FORMS["nop"], _FORMS["repeat"]
# What a file must agree on with us before its texts mean anything.
FINGERPRINT = hashlib.sha256(repr(sorted(_FORMS.items())).encode()).hexdigest()[:16]


def size_bytes(op: str) -> int:
    """Bytes of an instruction in a queue's text."""
    return _FORMS[op].size_bytes


def pack(op: str, args: Sequence[int]) -> bytes:
    """The bits of one instruction. Raises ProgramError if a field cannot hold its value."""
    form = _FORMS.get(op)
    if form is None:
        raise ProgramError(f"there is no instruction {op!r}")
    if len(args) != len(form.fields):
        raise ProgramError(f"{op} has {len(form.fields)} fields, not {len(args)}")
    word = form.code
    for value, (name, shift, mask, low, high) in zip(args, form.fields, strict=True):
        if not low <= value <= high:
            raise ProgramError(f"{op}: {name} is {value}, not {low} to {high}")
        word |= (index(value) & mask) << shift
    return word.to_bytes(form.size_bytes, "little")


def _unpack(form: _Form, raw: bytes) -> tuple[int, ...]:
    word = int.from_bytes(raw, "little")
    if word >> form.used_bits:
        raise ProgramError(f"{form.op}: the bits above its fields are not zero")
    values = []
    for _, shift, mask, _, high in form.fields:
        value = word >> shift & mask
        values.append(value if value <= high else value - mask - 1)
    return tuple(values)


def encode(section: Section, chip: Chip | None = None) -> dict[int, bytes]:
    """The text of each queue that has issues. With a chip, each instruction must be one of its
    queue's unit. Raises ProgramError."""
    check_form(section)
    texts: dict[int, bytearray] = {}
    known: dict[tuple[str, tuple[int, ...]], bytes] = {}
    clock = -1
    for issue in section.issues:
        text = texts.get(issue.queue)
        if text is None:
            text, clock = bytearray(), -1
            texts[issue.queue] = text
            where = _Where(section.name, issue.queue, chip)
        try:
            raw = known.get((issue.op, issue.args))
            if raw is None:
                raw = known[issue.op, issue.args] = pack(issue.op, issue.args)
            where.admit(_FORMS[issue.op])
            text += _wait(issue.cycle - clock) + raw
            if issue.count > 1:
                text += pack("repeat", (issue.count - 1, issue.period))
        except ProgramError as error:
            raise ProgramError(f"{where} @{issue.cycle}: {error}") from None
        clock = issue.cycle
    return {queue: bytes(text) for queue, text in texts.items()}


def text_bytes(section: Section, chip: Chip | None = None) -> dict[int, int]:
    """Bytes of the text of each queue that has issues."""
    return {queue: len(text) for queue, text in encode(section, chip).items()}


def _wait(gap_cycles: int) -> bytes:
    """What stands between two first issues that are `gap_cycles` apart."""
    if gap_cycles == 1:
        return b""
    if gap_cycles == 0:
        return pack("nop", (0,))
    full, rest = divmod(gap_cycles - 1, _LONGEST_NOP)
    return pack("nop", (_LONGEST_NOP,)) * full + (pack("nop", (rest,)) if rest else b"")


def check_form(section: Section) -> None:
    """Raise ProgramError unless the section can be written: its issues in order, cycles and counts
    in range, tags known."""
    if len(section.issues) > MOST_ISSUES:
        raise ProgramError(f"section {section.name!r} has more than {MOST_ISSUES:,} issues")
    keys = [(issue.queue, issue.cycle, issue.op, issue.args) for issue in section.issues]
    if keys != sorted(keys):
        queue, cycle, *_ = next(two for one, two in pairwise(keys) if one > two)
        raise ProgramError(
            f"section {section.name!r}: the issues are not sorted by queue, cycle, op and args"
            f" at queue {queue} @{cycle}"
        )
    for issue in section.issues:
        if fault := issue_fault(issue, len(section.tags)):
            where = f"section {section.name!r}, queue {issue.queue} @{issue.cycle}"
            raise ProgramError(f"{where}: {fault}")


def issue_fault(issue: Issue, tags: int) -> str:
    """Why an issue of a section with so many tags cannot be written, or ""."""
    if issue.queue < 0 or not 0 <= issue.cycle < MOST_CYCLES:
        return f"the cycle is not 0 to {MOST_CYCLES - 1:,}, or the queue is negative"
    if not 1 <= issue.count <= _MOST_REPEATS + 1:
        return f"count is {issue.count}, not 1 to {_MOST_REPEATS + 1}"
    if not 1 <= issue.period <= _LONGEST_PERIOD:
        return f"period is {issue.period}, not 1 to {_LONGEST_PERIOD}"
    if issue.count == 1 and issue.period != 1:
        return f"period is {issue.period}; it is 1 for an issue without repetitions"
    if not 0 <= issue.tag < tags:
        return f"tag {issue.tag} is none of the section's {tags}"
    return ""


class _Where:
    """A queue of a section, as errors name it."""

    def __init__(self, section: str, queue: int, chip: Chip | None) -> None:
        if chip is not None and not 0 <= queue < units(chip).count:
            raise ProgramError(f"section {section!r}: {chip.name} has no queue {queue}")
        self.section = section
        self.queue = queue_name(chip, queue) if chip else str(queue)
        self.unit = place(chip, queue).unit if chip else ""

    def __str__(self) -> str:
        return f"section {self.section!r}, queue {self.queue}"

    def admit(self, form: _Form) -> None:
        if form.unit in _NOT_IN_SECTIONS:
            raise ProgramError(f"{form.op} is no instruction of a section")
        if self.unit not in ("", form.unit):
            raise ProgramError(f"{form.op} is no instruction of this queue")


def decode(
    texts: Mapping[int, bytes],
    name: str,
    cycles: int,
    tags: tuple[str, ...] = ("",),
    issue_tags: Sequence[int] | None = None,
    chip: Chip | None = None,
) -> Section:
    """The section whose queues have these texts. issue_tags: one tag for each issue, in the order
    of Section.issues; all 0 if None. Raises ProgramError that names the queue and the byte."""
    issues: list[Issue] = []
    for queue in sorted(texts):
        where = _Where(name, queue, chip)
        if not texts[queue]:
            raise ProgramError(f"{where}: the text is empty")
        for found in _issues(texts[queue], queue, where):
            if len(issues) == MOST_ISSUES:
                raise ProgramError(f"section {name!r} has more than {MOST_ISSUES:,} issues")
            tag = 0
            if issue_tags is not None:
                if len(issues) >= len(issue_tags):
                    raise ProgramError(f"section {name!r} has more issues than tags for them")
                tag = issue_tags[len(issues)]
                if not 0 <= tag < len(tags):
                    raise ProgramError(f"section {name!r}: tag {tag} is none of its {len(tags)}")
            issues.append(Issue(*found, tag))
    if issue_tags is not None and len(issue_tags) != len(issues):
        raise ProgramError(f"section {name!r} has tags for more issues than it has")
    return Section(name, cycles, tuple(issues), tags)


_Found = tuple[int, int, str, tuple[int, ...], int, int]


def _issues(text: bytes, queue: int, where: _Where) -> Iterator[_Found]:
    """The issues of one queue: cycle, queue, op, args, count, period."""
    known: dict[bytes, tuple[_Form, tuple[int, ...]]] = {}
    at = start = 0
    cycle = -1
    wait: list[int] = []  # the nops before the next instruction
    last: tuple[str, tuple[int, ...]] | None = None

    def take(form: _Form) -> tuple[int, ...]:
        nonlocal at
        raw = text[at : at + form.size_bytes]
        if len(raw) < form.size_bytes:
            raise ProgramError(f"{form.op} is cut short")
        if raw not in known:
            known[raw] = form, _unpack(form, raw)
        at += form.size_bytes
        return known[raw][1]

    try:
        while at < len(text):
            start = at
            form = _BY_CODE.get(text[at])
            if form is None:
                raise ProgramError(f"opcode {text[at]} is unknown")
            if form is _NOP:
                if wait and wait[-1] != _LONGEST_NOP:
                    raise ProgramError("a nop follows one that is not full")
                wait += take(form)
                if wait[-1] == 0 and (len(wait) > 1 or last is None):
                    raise ProgramError("a nop of 0 stands after a nop or at the beginning")
                continue
            where.admit(form)
            args = take(form)
            now = (form.op, args)
            if wait == [0]:
                if last is not None and now < last:
                    raise ProgramError("the instructions of one cycle are not in order")
            else:
                cycle += 1 + sum(wait)
            if cycle >= MOST_CYCLES:
                raise ProgramError(f"cycle {cycle:,} is beyond {MOST_CYCLES - 1:,}")
            wait, last = [], now
            count, period = 1, 1
            if at < len(text) and text[at] == _REPEAT.code:
                start = at
                more, period = take(_REPEAT)
                if more == 0 or period == 0:
                    raise ProgramError("repeat: count or period is 0")
                count = more + 1
            yield cycle, queue, form.op, args, count, period
        if wait:
            raise ProgramError("the text ends with a nop")
    except ProgramError as error:
        raise ProgramError(f"{where}, byte {start}: {error}") from None
