"""In: a chat template (jinja2, by a stranger) and messages. Out: the prompt text.

What is bounded, and how:
- what it may reach: jinja2's immutable sandbox, plus an explicit list of filters, methods and
  globals; messages are rebuilt from plain JSON values, so no object of ours is reachable.
- memory and work: a grant of 16 MiB plus 256 bytes per byte of input, charged for each loop turn,
  call, text and list before it is made; see meter.py for the prices. Deterministic.
- time: one second of processor time, checked at every few charges.
- source: 64 KiB; integers: 4096 bits; widths and counts: 4096; nesting: 64 levels.
Whatever goes wrong in a template ends in TemplateError; bad messages end in RequestError.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

from openlpu.errors import RequestError, TemplateError
from openlpu.load.fields import one_line
from openlpu.load.meter import MAX_DEPTH, Meter

MAX_SOURCE_CHARS: Final = 64 << 10
GRANT_BYTES: Final = 16 << 20
GRANT_PER_INPUT_BYTE: Final = 256
SECONDS: Final = 1.0

T = TypeVar("T")


class ChatTemplate:
    """A compiled chat template. Safe to share between threads: they render one after another."""

    def __init__(
        self, source: str, *, bos: str, eos: str, clock: Callable[[], datetime] = datetime.now
    ) -> None:
        """Compile `source`; `bos` and `eos` are the texts of those tokens ('' if there is none).

        `clock` answers strftime_now. Raises TemplateError.
        """
        # jinja2 takes 30 ms to import, which `lpu --help` should not pay.
        from openlpu.load.sandbox import MeteredEnvironment

        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source):,} characters, more than {MAX_SOURCE_CHARS:,}"
            )
        self.source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._lock = threading.Lock()
        self._environment = MeteredEnvironment(Meter(GRANT_BYTES, SECONDS), clock)
        self._template = _guarded(lambda: self._environment.load_source(source))

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads from outside, such as `tools`. Raises TemplateError."""
        from jinja2.meta import find_undeclared_variables

        with self._lock:
            return _guarded(
                lambda: frozenset(find_undeclared_variables(self._environment.parse(self.source)))
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation; control tokens stand in it as text.

        messages: mappings with `role`, and `content` as text, as a list of parts ({"type": ...}),
        or None beside tool calls. tools: JSON schemas. variables: anything else the template reads,
        such as enable_thinking. Raises RequestError for malformed messages, else TemplateError.
        """
        size = _Size()
        conversation = _check_messages(messages, size)
        schemas = None if tools is None else [_plain(tool, "a tool", size) for tool in tools]
        extra = {name: _plain(value, name, size) for name, value in variables.items()}
        given = {
            **self._tokens,
            **extra,
            "messages": conversation,
            "tools": schemas,
            "documents": extra.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        grant_bytes = GRANT_BYTES + GRANT_PER_INPUT_BYTE * size.input_bytes
        with self._lock:
            self._environment.meter = Meter(grant_bytes, SECONDS)
            return _guarded(lambda: self._template.render(given))


class _Size:
    """Adds up what the caller passes in."""

    __slots__ = ("input_bytes",)

    def __init__(self) -> None:
        self.input_bytes = 0


def _guarded(work: Callable[[], T]) -> T:
    """Run `work`; every failure becomes one line of TemplateError."""
    try:
        return work()
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateError("the chat template calls itself too deeply") from None
    except Exception as error:
        # Anything at all: the source is a stranger's, and jinja2 raises what Python raises.
        line = one_line(error) or type(error).__name__
        raise TemplateError(f"the chat template failed: {line}") from error


def _check_messages(messages: Sequence[Mapping[str, Any]], size: _Size) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)):
        raise RequestError("messages must be a list of {'role': ..., 'content': ...}")
    checked = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} has no role; use {{'role': 'user', 'content': '...'}}")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            if not all(isinstance(p, Mapping) and isinstance(p.get("type"), str) for p in content):
                raise RequestError(f"{where} has a content part without a type")
        elif content is not None and not isinstance(content, str):
            raise RequestError(f"{where} has content that is neither text nor a list of parts")
        checked.append(_plain(message, where, size))
    return checked


def _plain(value: Any, where: str, size: _Size, depth: int = 0) -> Any:
    """A copy made of JSON types only; anything else is refused, for its methods could be called."""
    size.input_bytes += 16
    if depth > MAX_DEPTH // 2:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH // 2} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        size.input_bytes += value.__sizeof__()
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {
            _plain(k, where, size, depth + 1): _plain(v, where, size, depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where, size, depth + 1) for entry in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; only JSON values are allowed")
