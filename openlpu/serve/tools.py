"""In: the tools of a request, messages, an answer's text. Out: prompt, constraint, tool calls.

One form of calls is spoken, that of Hermes and Qwen: <tool_call>, a JSON object with name and
arguments, </tool_call>. A model whose template writes calls so is told of the tools by its
template, any other by a system text of ours. A constraint lets no other calls through: their
arguments are valid for the function's schema.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Final

from openlpu.errors import LpuError
from openlpu.load.fields import one_line
from openlpu.load.template import ChatTemplate
from openlpu.serve.structured import (
    GrammarConstraint,
    Grammars,
    StructureError,
    schema_of,
    schema_text,
)

MAX_TOOLS: Final = 128
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAIL = re.compile(r"\s*\}\s*</tool_call>")
_ANY_HEAD = '{"name": "x", "arguments": {'
_HEAD_CHARS, _TAIL_CHARS = 256, 64  # where neither has come after so many, none will
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}
_SYSTEM: Final = """\
You may call functions to help the user. Their signatures, one JSON object a line:
<tools>
{tools}
</tools>
To call a function, answer with its name and its arguments as a JSON object, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
The results come between <tool_response> and </tool_response>."""

Message = dict[str, Any]
Messages = Items[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False
    """Whether all that the schema says must hold, or only what can be enforced."""

    def declared(self) -> dict[str, Any]:
        """As templates want it."""
        about = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **about, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which functions an answer may call, and whether it must."""

    tools: tuple[Tool, ...]
    """Those that the model is told of."""
    callable: tuple[Tool, ...]
    """Those of them that it may call."""
    must_call: bool
    parallel: bool
    """Whether it may call more than one."""

    def constraint(
        self, grammars: Grammars, response_format: Mapping[str, Any] | None = None
    ) -> GrammarConstraint:
        """Calls, or an answer, which is free or in the response format. Raises StructureError."""
        schema = schema_of(response_format)
        calls = f'"{_OPEN}" call'
        more = f' ("\\n{_OPEN}" call)*' if self.parallel else ""
        reply = []
        if self.must_call:
            start = f"start: {calls}{more}"
        elif schema is not None:
            start = f"start: reply | {calls}{more}"
            reply = [f"reply: %json {schema_text(schema, 'response_format')}"]
        else:
            start = f"start: TEXT | opening call{more}"
            reply = [r"TEXT: /(.|\n)*/", rf"opening[lazy]: /(.|\n)*{_OPEN}/"]
        rules = [f"call: {' | '.join(f'call{i}' for i in range(len(self.callable)))}"]
        for i, tool in enumerate(self.callable):
            where = f"tools[{self.tools.index(tool)}].function.parameters"
            schema = {"type": "object", **tool.parameters}
            head = rf'"\n{{\"name\": \"{tool.name}\", \"arguments\": "'
            rules += [
                rf'call{i}: {head} given{i} "}}\n{_CLOSE}"',
                f"given{i}: %json {schema_text(schema, where, strict=tool.strict)}",
            ]
        return grammars.of_lark("\n".join([start, *reply, *rules, ""]), "tools")


def read_tools(
    tools: Items[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
) -> ToolUse | None:
    """What a request says of tools, checked; None where no function may be called.

    Raises StructureError.
    """
    if not isinstance(tools, (list, tuple, type(None))) or len(tools or ()) > MAX_TOOLS:
        raise StructureError(f"tools must be a list of at most {MAX_TOOLS} functions", "tools")
    if not tools:
        if tool_choice not in (None, "none", "auto"):
            raise StructureError("tool_choice needs tools", "tool_choice")
        return None
    known = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    if len({tool.name for tool in known}) < len(known):
        raise StructureError("two of the tools have the same name", "tools")
    callable_, must_call = known, tool_choice == "required"
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        callable_, must_call = tuple(tool for tool in known if tool.name == name), True
        if tool_choice.get("type") != "function" or not callable_:
            raise StructureError("tool_choice names none of the tools", "tool_choice")
    elif tool_choice not in (None, "none", "auto", "required"):
        raise StructureError(
            "tool_choice must be none, auto, required or a function", "tool_choice"
        )
    if tool_choice == "none":
        return None
    # Who names a function wants one call of it.
    parallel = parallel_tool_calls is not False and not isinstance(tool_choice, Mapping)
    return ToolUse(known, callable_, must_call, parallel)


def _tool(tool: Any, where: str) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise StructureError(f'{where} must be {{"type": "function", "function": ...}}', where)
    if unknown := set(function) - {"name", "description", "parameters", "strict"}:
        part = one_line(min(unknown), 40)
        raise StructureError(f"{where}.function has an unknown part {part!r}", f"{where}.function")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StructureError(
            f"{where}.function.name must be 1 to 64 letters, digits, _ or -",
            f"{where}.function.name",
        )
    if description is not None and not isinstance(description, str):
        part = f"{where}.function.description"
        raise StructureError(f"{part} must be a text", part)
    parameters = function.get("parameters")
    part = f"{where}.function.parameters"
    if parameters is not None and not isinstance(parameters, Mapping):
        raise StructureError(f"{part} must be a JSON schema", part)
    if parameters and parameters.get("type", "object") != "object":
        raise StructureError(f"{part} must describe an object", part)
    return Tool(name, description, parameters or _NO_PARAMETERS, function.get("strict") is True)


class ToolPrompts:
    """Renders conversations that may hold tools, calls and results."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def render(self, messages: Messages, use: ToolUse | None = None, **variables: Any) -> str:
        """The prompt text. Raises RequestError, StructureError, TemplateError."""
        shown = [] if use is None else [tool.declared() for tool in use.tools]
        told = [_with_objects(message, i) for i, message in enumerate(messages)]
        if not shown and not any(m.get("tool_calls") or m.get("role") == "tool" for m in told):
            return self._template.render(told, **variables)
        if self._speaks_our_form:
            return self._template.render(told, tools=shown or None, **variables)
        plain = _as_text(told)
        if shown:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in shown)
            plain = self._declared(plain, _SYSTEM.format(tools=lines))
        return self._template.render(plain, **variables)

    @functools.cached_property
    def _speaks_our_form(self) -> bool:
        """Whether the template knows tools, and writes a call as we read and force it."""
        if "tools" not in self._template.variables:
            return False
        call = {"name": "sample_name", "arguments": {"sample": "value"}}
        spoken: Messages = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [_call_of(call, "call_1")]},
            {"role": "tool", "content": "sample_result", "tool_call_id": "call_1"},
        ]
        tool = Tool("sample_name", "sample_description", _NO_PARAMETERS).declared()
        try:
            text = self._template.render(spoken, tools=[tool])
        except LpuError:
            return False
        said = f"{_OPEN}\n{json.dumps(call)}\n{_CLOSE}"
        return said in text and "sample_description" in text and "sample_result" in text

    @functools.cached_property
    def _has_system(self) -> bool:
        """Whether the template takes a system message; some refuse it, some drop it."""
        first = {"role": "system", "content": "sample_system"}
        try:
            text = self._template.render([first, {"role": "user", "content": "q"}])
        except LpuError:
            return False
        return "sample_system" in text

    def _declared(self, messages: list[Message], text: str) -> list[Message]:
        """With `text` in the system message, or at the beginning of the first one without such."""
        first = messages[0] if messages else {"role": "user", "content": ""}
        if self._has_system and first.get("role") not in ("system", "developer"):
            return [{"role": "system", "content": text}, *messages]
        said = _text_of(first.get("content"))
        order = (said, text) if self._has_system else (text, said)
        return [{**first, "content": "\n\n".join(filter(None, order))}, *messages[1:]]


def _call_of(function: Mapping[str, Any], call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": dict(function)}


def _with_objects(message: Mapping[str, Any], index: int) -> Message:
    """A message whose calls hold arguments as objects, as templates want them; API has text."""
    calls = message.get("tool_calls")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    changed = []
    for at, call in enumerate(calls):
        where = f"messages[{index}].tool_calls[{at}].function"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise StructureError(f"{where}.name is missing", where)
        arguments = function.get("arguments") or "{}"
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, Mapping):
            raise StructureError(f"{where}.arguments is no JSON object", f"{where}.arguments")
        changed.append(_call_of({**function, "arguments": value}, str(call.get("id", ""))))
    # Templates print what a missing content is called.
    return {**message, "content": message.get("content") or "", "tool_calls": changed}


def _as_text(messages: list[Message]) -> list[Message]:
    """Calls and results as text, for templates that do not know them."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        said = _text_of(message.get("content"))
        if message.get("role") == "tool":
            result = f"<tool_response>\n{said}\n</tool_response>"
            if after_result:
                plain[-1]["content"] += "\n" + result
            else:
                plain.append({"role": "user", "content": result})
            after_result = True
            continue
        after_result = False
        if calls := message.get("tool_calls"):
            texts = [
                json.dumps(
                    {key: call["function"][key] for key in ("name", "arguments")},
                    ensure_ascii=False,
                )
                for call in calls
            ]
            lines = [said] * bool(said) + [f"{_OPEN}\n{text}\n{_CLOSE}" for text in texts]
            message = {"role": message["role"], "content": "\n".join(lines)}
        plain.append(message)
    return plain


def _text_of(content: Any) -> str:
    """The text of a content, which may come in parts."""
    if isinstance(content, (list, tuple)):
        parts = [part for part in content if isinstance(part, Mapping)]
        return "".join(str(part["text"]) for part in parts if "text" in part)
    return content if isinstance(content, str) else ""


@dataclass(slots=True)
class ToolCall:
    """A call that the answer makes, as far as it has come."""

    id: str
    name: str
    arguments: str = ""
    """JSON text."""
    whole: bool = False
    """Whether the arguments have come to their end."""

    def as_json(self) -> dict[str, Any]:
        """As chat completions have it."""
        return _call_of({"name": self.name, "arguments": self.arguments}, self.id)


class CallParser:
    """Divides an answer's text, which may come in pieces, into content and calls.

    `push` and `flush` return deltas as chat completions stream them. What is no call is content.
    """

    def __init__(self, new_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}") -> None:
        self.calls: list[ToolCall] = []
        self.content = ""
        self._new_id = new_id
        self._held = ""
        self._read: Callable[[], list[dict[str, Any]] | None] = self._read_text
        self._depth, self._quoted, self._escaped = 0, False, False

    @property
    def in_call(self) -> bool:
        """Whether what comes next is a call's."""
        return self._read in (self._read_arguments, self._read_tail)

    def push(self, text: str) -> list[dict[str, Any]]:
        """What has become certain."""
        self._held += text
        deltas: list[dict[str, Any]] = []
        while (found := self._read()) is not None:
            deltas += found
        return deltas

    def flush(self) -> list[dict[str, Any]]:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        if self._read == self._read_head:
            is_cut_call = any(_HEAD.match(held + _ANY_HEAD[i:]) for i in range(len(_ANY_HEAD) + 1))
            return [] if is_cut_call else self._said(_OPEN + held)
        if self._read == self._read_tail or (self.calls and not held.strip()):
            return []
        return self._said(held)

    # Each reads from the held text; None: nothing more can be read before more text comes.

    def _read_text(self) -> list[dict[str, Any]] | None:
        at = self._held.find(_OPEN)
        if at >= 0:
            said, self._held = self._held[:at].rstrip(), self._held[at + len(_OPEN) :]
            self._read = self._read_head
            return self._said(said)
        lengths = range(min(len(_OPEN) - 1, len(self._held)), 0, -1)
        partial = next((n for n in lengths if self._held.endswith(_OPEN[:n])), 0)
        certain = self._held[: len(self._held) - partial].rstrip()
        self._held = self._held[len(certain) :]
        return self._said(certain) or None

    def _read_head(self) -> list[dict[str, Any]] | None:
        match = _HEAD.match(self._held)
        if match is None:
            if len(self._held) < _HEAD_CHARS:
                return None
            self._read = self._read_text
            return self._said(_OPEN)
        self._held = self._held[match.end() :]
        self._read = self._read_arguments
        call = ToolCall(self._new_id(), match[1])
        self.calls.append(call)
        return [self._delta(call.as_json())]

    def _read_arguments(self) -> list[dict[str, Any]] | None:
        end = self._end_of_value()
        piece, self._held = self._held[:end], self._held[end:]
        if self._depth == 0 and piece:
            self._read = self._read_tail
            self.calls[-1].whole = True
        self.calls[-1].arguments += piece
        return [self._delta({"function": {"arguments": piece}})] if piece else None

    def _end_of_value(self) -> int:
        """Where the object in the held text ends, which may be beyond it."""
        for at, letter in enumerate(self._held):
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return len(self._held)

    def _read_tail(self) -> list[dict[str, Any]] | None:
        match = _TAIL.match(self._held)
        if match is None and len(self._held) < _TAIL_CHARS:
            return None
        self._held = self._held[match.end() if match else 0 :]
        self._read = self._read_text
        return []

    def _said(self, text: str) -> list[dict[str, Any]]:
        self.content += text
        return [{"content": text}] if text else []

    def _delta(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": len(self.calls) - 1, **part}]}


def parse_answer(text: str) -> tuple[str | None, list[ToolCall]]:
    """Content, None if there is none beside calls, and the calls of a whole answer."""
    parser = CallParser()
    parser.push(text)
    parser.flush()
    return (parser.content or None) if parser.calls else parser.content, parser.calls
