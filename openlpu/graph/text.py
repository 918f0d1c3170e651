"""In: a Graph. Out: its text, one op a line with its type; and the same Graph back from the text.

    graph "llama" context=2048 output=%logits
    meta layers=30 vocab_size=49152
    rope magnitude=1.0 turns=0x28be60db9391054a,0x...
    %l0.q : f32[R,576] = linear %l0.attn_in.q8 (layers.0.q:w8[576,576] = layers.0.q | rotate_in 1)

Numbers without a point are integers; floats are printed by repr, which reads back exactly; texts
are JSON strings. The types are derived, and checked when a text is read. Texts come from
strangers: sizes are bounded, and every fault is a GraphError with its line number.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from openlpu.errors import GraphError
from openlpu.graph.ir import Attr, Graph, Op, Param, RopeTable, Step, Value
from openlpu.graph.ops import admit, inputs, types

_LONGEST_TEXT = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,39})(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_TURN = re.compile(r"0x[0-9a-f]{16}")
_SPACE = re.compile(r" *")


def dumps(graph: Graph) -> str:
    """The graph as text, the same for equal graphs. Raises GraphError if it is not legal, or if
    a name or number in it cannot be written."""
    known = types(graph)
    lines = [
        f"graph {json.dumps(graph.name)} context={graph.context} output=%{_name(graph.output)}",
        "meta" + "".join(f" {_name(k)}={_attr(v)}" for k, v in graph.meta),
        f"rope magnitude={_attr(float(graph.rope.magnitude))} turns="
        + ",".join(f"0x{turn:016x}" for turn in graph.rope.turns),
    ]
    lines += [_op(op, known[op.out]) for op in graph.ops]
    return "\n".join(lines) + "\n"


def _op(op: Op, kind: Value) -> str:
    text = f"%{_name(op.out)} : {_value(kind)} = {op.kind}"
    if op.src:
        text += " " + ", ".join(f"%{_name(name)}" for name in op.src)
    if op.attrs:
        text += " {" + ", ".join(f"{_name(k)}={_attr(v)}" for k, v in op.attrs) + "}"
    if op.params:
        text += " (" + ", ".join(_param(param) for param in op.params) + ")"
    return text


def _value(value: Value) -> str:
    return f"{value.kind}[{value.rows},{value.width}]"


def _param(param: Param) -> str:
    sizes = ",".join(map(str, param.shape))
    text = f"{_name(param.name)}:{_name(param.format)}[{sizes}] = {_name(param.source)}"
    for step in param.recipe:
        text += f" | {_name(step.kind)}"
        for arg in step.args:
            text += f" {arg}" if isinstance(arg, int) else f" @{_name(arg)}"
    return text


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise GraphError(f"{name[:80]!r} cannot be a name in a graph's text")
    return name


def _attr(value: Attr) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise GraphError(f"{value!r} cannot be a value in a graph's text")
    return repr(value)


def loads(text: str) -> Graph:
    """The Graph of a text; types are checked. Raises GraphError with the number of the line."""
    if len(text) > _LONGEST_TEXT:
        raise GraphError(f"a graph's text has at most {_LONGEST_TEXT:,} characters")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(lines) < 3:
        raise GraphError(f"line {len(lines)}: a graph begins with the lines graph, meta and rope")
    name, context, output = _on_line(1, lines[0], _Reader.header)
    meta = _on_line(2, lines[1], _Reader.meta)
    rope = _on_line(3, lines[2], _Reader.rope)
    known, ops = inputs(), []
    for number, line in enumerate(lines[3:], 4):
        ops.append(_on_line(number, line, lambda reader: reader.admitted_op(known)))
    graph = Graph(name, context, rope, tuple(ops), output, meta)
    types(graph)
    return graph


def _on_line(number: int, line: str, read: Callable[[_Reader], Any]) -> Any:
    reader = _Reader(line)
    try:
        result = read(reader)
        reader.end()
    except GraphError as error:
        raise GraphError(f"line {number}: {error}") from None
    return result


class _Reader:
    """Reads one line from left to right."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.at = 0

    def header(self) -> tuple[str, int, str]:
        self.word("graph")
        name = self.string()
        self.word("context")
        self.mark("=")
        context = self.integer()
        self.word("output")
        self.mark("=")
        self.mark("%")
        return name, context, self.name()

    def meta(self) -> tuple[tuple[str, Attr], ...]:
        self.word("meta")
        found = []
        while not self.done():
            found.append(self.pair())
        return tuple(found)

    def rope(self) -> RopeTable:
        self.word("rope")
        self.word("magnitude")
        self.mark("=")
        magnitude = self.attr()
        if not isinstance(magnitude, float):
            raise GraphError("the magnitude is not a float")
        self.word("turns")
        self.mark("=")
        turns = []
        if not self.done():
            turns = self.several(lambda: int(self.match(_TURN, "a turn as 0x and 16 digits"), 16))
        return RopeTable(tuple(turns), magnitude)

    def admitted_op(self, known: dict[str, Value]) -> Op:
        op, declared = self.op()
        admit(op, known)
        if known[op.out] != declared:
            raise GraphError(f"%{op.out} is {_value(known[op.out])}, not {_value(declared)}")
        return op

    def op(self) -> tuple[Op, Value]:
        self.mark("%")
        out = self.name()
        self.mark(":")
        value = self.value()
        self.mark("=")
        kind = self.name()
        src, options, params = [], [], []
        if self.sees("%"):
            src = self.several(self.source)
        if self.taken("{"):
            options = self.several(self.pair)
            self.mark("}")
        if self.taken("("):
            params = self.several(self.param)
            self.mark(")")
        if options != sorted(options, key=lambda pair: pair[0]):
            raise GraphError("the attributes are not in order")
        if len({key for key, _ in options}) < len(options):
            raise GraphError("an attribute stands twice")
        return Op(kind, out, tuple(src), tuple(params), tuple(options)), value

    def source(self) -> str:
        self.mark("%")
        return self.name()

    def value(self) -> Value:
        kind = self.name()
        self.mark("[")
        rows = self.name()
        self.mark(",")
        width = self.integer()
        self.mark("]")
        return Value(kind, rows, width)

    def pair(self) -> tuple[str, Attr]:
        key = self.name()
        self.mark("=")
        return key, self.attr()

    def param(self) -> Param:
        name = self.name()
        self.mark(":")
        form = self.name()
        self.mark("[")
        shape = self.several(self.integer)
        self.mark("]")
        self.mark("=")
        source = self.name()
        recipe = []
        while self.taken("|"):
            recipe.append(self.step())
        return Param(name, tuple(shape), form, source, tuple(recipe))

    def step(self) -> Step:
        kind = self.name()
        args: list[int | str] = []
        while not self.done() and not (self.sees(",") or self.sees(")") or self.sees("|")):
            args.append(self.name() if self.taken("@") else self.integer())
        return Step(kind, tuple(args))

    def attr(self) -> Attr:
        if self.sees('"'):
            return self.string()
        text = self.match(_NUMBER, "a number or a text")
        if text.lstrip("-").isdigit():
            return int(text)
        number = float(text)
        if not math.isfinite(number):
            raise GraphError(f"{text[:40]} is beyond float64")
        return number

    def string(self) -> str:
        text = self.match(_STRING, "a text in quotes")
        try:
            return str(json.loads(text))
        except ValueError:
            raise GraphError(f"{text[:40]} is no text") from None

    def integer(self) -> int:
        text = self.match(_NUMBER, "a whole number")
        if not text.lstrip("-").isdigit():
            raise GraphError(f"{text[:40]} is not a whole number")
        return int(text)

    def name(self) -> str:
        return self.match(_NAME, "a name")

    def several(self, read: Callable[[], Any]) -> list[Any]:
        found = [read()]
        while self.taken(","):
            found.append(read())
        return found

    def word(self, word: str) -> None:
        if self.name() != word:
            raise GraphError(f"{word!r} is missing")

    def mark(self, mark: str) -> None:
        if not self.taken(mark):
            raise GraphError(f"{mark!r} is missing at column {self.at + 1}")

    def taken(self, mark: str) -> bool:
        if not self.sees(mark):
            return False
        self.at += len(mark)
        return True

    def sees(self, mark: str) -> bool:
        self.skip()
        return self.line.startswith(mark, self.at)

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip()
        found = pattern.match(self.line, self.at)
        if found is None:
            raise GraphError(f"{what} is missing at column {self.at + 1}")
        self.at = found.end()
        return found.group()

    def skip(self) -> None:
        found = _SPACE.match(self.line, self.at)
        assert found is not None
        self.at = found.end()

    def done(self) -> bool:
        self.skip()
        return self.at == len(self.line)

    def end(self) -> None:
        if not self.done():
            raise GraphError(f"unexpected text at column {self.at + 1}")
