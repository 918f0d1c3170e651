"""In: assembly text, a chip, and contents by their sha256. Out: the Program; the inverse of `text`.

Lines may come in any order as long as what they name stands above them. Issues of a section are
sorted here. Sizes are known from the chip before numbers are spelled out, so a short text cannot
make a large thing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from openlpu.asm import binary
from openlpu.asm.header import DEEPEST_PLAN, MOST, TYPES, Array, possible
from openlpu.asm.operands import Names
from openlpu.asm.text import BARE, LONGEST_TEXT
from openlpu.chip import Chip
from openlpu.errors import ProgramError
from openlpu.program import Base, Issue, Loop, Param, Port, Program, Run, Section, Segment, Vector

_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_HEX = re.compile(r"[0-9a-f]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPE = re.compile(r"[a-z]+[0-9]+")
_SLICE = re.compile(r"mem\.[we][0-9]{1,4}")
_NUMBERS = re.compile(r"(-?[0-9]{1,10})(?:\.\.(-?[0-9]{1,10})|\*([0-9]{1,10}))?")
_ISSUE = re.compile(r"@([0-9]{1,18})(?: x([0-9]{1,18})/([0-9]{1,18}))? ([a-z0-9.]+) ([a-z]+)(.*)")
_TAG = re.compile(r"(.*?) tag=([0-9]{1,9})")
_SPACE = re.compile(r" *")
_BEGIN = "a program's text begins with `program` and a chip"

Contents = Mapping[str, NDArray[np.uint8]]


def loads(text: str, chip: Chip, contents: Contents | None = None) -> Program:
    """The Program of a text. contents: bytes by sha256, for what does not stand in the text.
    Raises ProgramError with the number of the line."""
    reader = _Program(chip, contents or {})
    for number, line in _meaningful(text):
        try:
            reader.line(line)
        except ProgramError as error:
            raise ProgramError(f"line {number}: {error}") from None
    return reader.program()


def chip_name(text: str) -> str:
    """The name of the chip that a text is for."""
    for number, line in _meaningful(text):
        try:
            reader = _Line(line)
            if reader.name() == "program":
                return reader.name()
        except ProgramError as error:
            raise ProgramError(f"line {number}: {error}") from None
        raise ProgramError(f"line {number}: {_BEGIN}")
    raise ProgramError("the text is empty")


def _meaningful(text: str) -> list[tuple[int, str]]:
    if len(text) > LONGEST_TEXT:
        raise ProgramError(f"a program's text has at most {LONGEST_TEXT:,} characters")
    lines = ((number, line.strip(" \r\t")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith(";")]


class _Line:
    """Reads one line from left to right."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.at = 0
        self.skip()

    def skip(self) -> None:
        found = _SPACE.match(self.line, self.at)
        assert found is not None
        self.at = found.end()

    def more(self) -> bool:
        return self.at < len(self.line) and self.line[self.at] != ";"

    def end(self) -> None:
        if self.more():
            raise ProgramError(f"unexpected text at column {self.at + 1}")

    def match(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        found = pattern.match(self.line, self.at)
        if found is None:
            raise ProgramError(f"{what} is missing at column {self.at + 1}")
        self.at = found.end()
        self.skip()
        return found

    def taken(self, mark: str) -> bool:
        if not self.sees(mark):
            return False
        self.at += len(mark)
        self.skip()
        return True

    def sees(self, mark: str) -> bool:
        return self.line.startswith(mark, self.at)

    def mark(self, mark: str) -> None:
        if not self.taken(mark):
            raise ProgramError(f"{mark!r} is missing at column {self.at + 1}")

    def name(self) -> str:
        if not self.line.startswith('"', self.at):
            return self.match(BARE, "a name").group()
        text = self.match(_STRING, "a text in quotes").group()
        try:
            return str(json.loads(text))
        except ValueError:
            raise ProgramError(f"{text[:40]} is no text") from None

    def whole(self, key: str = "") -> int:
        if key:
            self.mark(f"{key}=")
        number = int(self.match(_WHOLE, "a whole number").group())
        if abs(number) > MOST:
            raise ProgramError(f"{number} is beyond {MOST:,}")
        return number

    def numbers(self, length: int) -> list[int]:
        """`length` numbers; shortened runs are spelled out."""
        found: list[int] = []
        while self.more():
            first, last, times = self.match(_NUMBERS, "a whole number").groups()
            low, high = int(first), int(last or first)
            count = int(times) if times else high - low + 1
            if count < 1 or len(found) + count > length:
                raise ProgramError(f"these are not {length} numbers")
            found += [low] * count if times else range(low, high + 1)
        if len(found) != length:
            raise ProgramError(f"these are {len(found)} numbers, not {length}")
        return found


class _Program:
    """What the lines so far have said."""

    def __init__(self, chip: Chip, contents: Contents) -> None:
        self.chip, self.contents = chip, contents
        self.names = Names(chip)
        self.named = False
        self.meta = "{}"
        self.params: list[Param] = []
        self.maps: list[list[int]] = []
        self.tables: dict[str, Array] = {}
        self.image: list[Segment] = []
        self.used: list[tuple[str, int, int, int]] = []
        self.ports: list[tuple[str, str, int, list[Vector], list[list[int]]]] = []
        self.sections: list[tuple[str, int, list[Issue]]] = []
        self.tags: list[tuple[str, ...]] = []
        self.plan: list[Run | Loop] = []
        self.loops: list[tuple[Loop, list[Run | Loop]]] = []
        self.words: dict[str, Callable[[_Line], None]] = {
            word: getattr(self, f"_{word}")
            for word in (
                *("program", "param", "map", "table", "segment", "used", "port", "vector"),
                *("section", "tags", "plan", "run", "loop", "end"),
            )
        }

    def line(self, line: str) -> None:
        if line.startswith("@"):
            self._issue(line)
            return
        reader = _Line(line)
        word = reader.name()
        if word != "program" and not self.named:
            raise ProgramError(_BEGIN)
        if word == "meta":
            rest = line[reader.at :]
            self.meta = reader.name() if rest.startswith('"') else rest
            return
        if word not in self.words:
            raise ProgramError(f"a line cannot begin with {word[:40]!r}")
        self.words[word](reader)
        reader.end()

    def program(self) -> Program:
        if not self.named:
            raise ProgramError("the text is empty")
        if self.loops:
            raise ProgramError(f"the loop {self.loops[-1][0].var!r} has no end")
        lanes = self.chip.lanes
        return Program(
            self.chip.name,
            tuple(
                Section(name, cycles, tuple(sorted(issues, key=_order)), tags)
                for (name, cycles, issues), tags in zip(self.sections, self.tags, strict=True)
            ),
            tuple(self.plan),
            tuple(self.params),
            np.array(self.maps, np.int16).reshape(len(self.maps), lanes),
            tuple(self.image),
            tuple(
                Port(name, direction, rows, tuple(vectors), _features(features, lanes))
                for direction, name, rows, vectors, features in self.ports
            ),
            tuple(self.used),
            self.meta,
            self.tables,
        )

    # -- a line each --------------------------------------------------------------------------

    def _program(self, line: _Line) -> None:
        name = line.name()
        if self.named or name != self.chip.name:
            raise ProgramError(f"the program is for {name!r}, not for {self.chip.name!r}")
        self.named = True

    def _param(self, line: _Line) -> None:
        name, values = line.name(), line.whole("values")
        low = line.whole("range")
        line.mark("..")
        self.params.append(Param(name, values, low, line.whole()))

    def _map(self, line: _Line) -> None:
        row = line.numbers(self.chip.lanes)
        if not all(-(1 << 15) <= number < 1 << 15 for number in row):
            raise ProgramError("a map holds int16 numbers")
        self.maps.append(row)

    def _table(self, line: _Line) -> None:
        name, kind = line.name(), line.match(_TYPE, "a type").group()
        if kind not in TYPES or name in self.tables:
            raise ProgramError(f"{kind} is no type of a table, or {name!r} stands twice")
        shape: list[int] = []
        line.mark("[")
        while not line.taken("]"):
            if shape:
                line.mark(",")
            shape.append(line.whole())
        if not possible(shape):
            raise ProgramError(f"a table cannot have the shape {shape}")
        raw = self._data(line, math.prod(shape) * TYPES[kind].itemsize)
        self.tables[name] = raw.view(TYPES[kind]).reshape(shape)

    def _segment(self, line: _Line) -> None:
        part, word, words = self._slice(line), line.whole("word"), line.whole("words")
        what = line.name()
        raw = self._data(line, words * self.chip.lanes)
        self.image.append(Segment(part, word, raw.reshape(words, self.chip.lanes), what))

    def _data(self, line: _Line, size: int) -> NDArray[np.uint8]:
        """Contents of `size` bytes."""
        if line.taken("hex"):
            digits = line.match(_HEX, "hex digits").group()
            if len(digits) != 2 * size:
                raise ProgramError(f"{size:,} bytes are {2 * size:,} digits, not {len(digits):,}")
            return np.frombuffer(bytes.fromhex(digits), np.uint8)
        line.mark("sha256")
        key = line.match(_SHA256, "a sha256").group()
        if key not in self.contents:
            raise ProgramError(
                f"the contents {key} are not at hand; --contents names a program that has them"
            )
        raw = self.contents[key].reshape(-1).view(np.uint8)
        if raw.size != size or hashlib.sha256(np.ascontiguousarray(raw).data).hexdigest() != key:
            raise ProgramError(f"the contents {key} are not these {size:,} bytes")
        return raw

    def _used(self, line: _Line) -> None:
        what, part = line.name(), self._slice(line)
        self.used.append((what, part, line.whole("word"), line.whole("words")))

    def _port(self, line: _Line) -> None:
        direction, name = line.name(), line.name()
        if direction not in ("in", "out"):
            raise ProgramError(f"a port is in or out, not {direction[:40]!r}")
        self.ports.append((direction, name, line.whole("rows"), [], []))

    def _vector(self, line: _Line) -> None:
        if not self.ports:
            raise ProgramError("a vector stands below its port")
        slices = [self._slice(line)]
        while line.taken(","):
            slices.append(self._slice(line))
        vector = Vector(tuple(slices), line.whole("word"), line.whole("step"))
        line.mark("features")
        features = line.numbers(self.chip.lanes)
        if not all(-(1 << 31) <= number < 1 << 31 for number in features):
            raise ProgramError("features are int32 numbers")
        self.ports[-1][3].append(vector)
        self.ports[-1][4].append(features)

    def _section(self, line: _Line) -> None:
        self.sections.append((line.name(), line.whole("cycles"), []))
        self.tags.append(("",))

    def _tags(self, line: _Line) -> None:
        if not self.sections or self.sections[-1][2]:
            raise ProgramError("tags stand between a section's line and its issues")
        tags = []
        while line.more():
            tags.append(line.name())
        self.tags[-1] = tuple(tags)

    def _issue(self, line: str) -> None:
        if not self.sections:
            raise ProgramError("an issue stands below its section")
        name, _, issues = self.sections[-1]
        found = _ISSUE.fullmatch(" ".join(line.partition(";")[0].split()))
        if found is None:
            raise ProgramError("an issue is `@cycle [xcount/period] queue instruction operands`")
        cycle, count, period, queue, op, rest = found.groups()
        tag = 0
        if tagged := _TAG.fullmatch(rest):
            rest, tag = tagged[1], int(tagged[2])
        if len(issues) == binary.MOST_ISSUES:
            raise ProgramError(f"section {name!r} has more than {binary.MOST_ISSUES:,} issues")
        issue = Issue(
            int(cycle),
            self.names.queue_number(queue),
            op,
            self.names.args(op, rest.strip()),
            int(count or 1),
            int(period or 1),
            tag,
        )
        if fault := binary.issue_fault(issue, len(self.tags[-1])):
            raise ProgramError(fault)
        issues.append(issue)

    def _plan(self, line: _Line) -> None:
        line.end()

    def _run(self, line: _Line) -> None:
        section, bases = self._section_number(line), []
        while line.more():
            part = self._slice(line)
            line.mark(".r")
            reg = line.whole()
            line.mark("=")
            value, strides = line.whole(), []
            while line.taken("+") or line.sees("-"):
                stride = line.whole()
                line.mark("*")
                strides.append((line.name(), stride))
            bases.append(Base(part, reg, value, tuple(strides)))
        self._body().append(Run(section, tuple(bases)))

    def _section_number(self, line: _Line) -> int:
        """A section by its number, or by its name."""
        names = [name for name, _, _ in self.sections]
        if line.at < len(line.line) and line.line[line.at].isdigit():
            found = [number for number in [line.whole()] if number < len(names)]
        else:
            wanted = line.name()
            found = [number for number, name in enumerate(names) if name == wanted]
        if len(found) != 1:
            raise ProgramError("no section above has this name or number, or several have it")
        return found[0]

    def _loop(self, line: _Line) -> None:
        if len(self.loops) == DEEPEST_PLAN:
            raise ProgramError(f"loops are at most {DEEPEST_PLAN} deep")
        var = line.name()
        line.mark("count=")
        digit = line.at < len(line.line) and line.line[line.at].isdigit()
        count = line.whole() if digit else line.name()
        by = line.name() if line.taken("by=") else ""
        self.loops.append((Loop(var, count, (), by), []))

    def _end(self, line: _Line) -> None:
        if not self.loops:
            raise ProgramError("there is no loop to end")
        loop, body = self.loops.pop()
        self._body().append(replace(loop, body=tuple(body)))

    def _body(self) -> list[Run | Loop]:
        """Where the plan goes on."""
        return self.loops[-1][1] if self.loops else self.plan

    def _slice(self, line: _Line) -> int:
        return self.names.slice_number(line.match(_SLICE, "a slice").group())


def _order(issue: Issue) -> tuple[int, int, str, tuple[int, ...]]:
    return issue.queue, issue.cycle, issue.op, issue.args


def _features(rows: list[list[int]], lanes: int) -> NDArray[np.int32]:
    return np.array(rows, np.int32).reshape(len(rows), lanes)
