"""In: the values a chat template makes. Out: Meter, which charges before they grow too big.

One currency, bytes: a text costs its length, a list entry 16, a step 64. The grant is fixed, so the
same template on the same conversation passes or fails alike on every machine; the processor-time
limit only catches what the grant prices too low.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from typing import Any, Final

from openlpu.errors import TemplateError

STEP_BYTES: Final = 64
ENTRY_BYTES: Final = 16
MAX_DEPTH: Final = 64
MAX_WIDTH: Final = 4096
"""Widths, precisions, paddings and counts that a template may ask for."""
MAX_INT_BITS: Final = 4096
TIME_CHECK_BYTES: Final = 1024

_NUMBER = re.compile(r"\d+")
_PERCENT_FIELD = re.compile(r"%([^a-zA-Z%]*)")
_BRACE_FIELD = re.compile(r"\{[^{}]*?:([^{}]*)\}")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")
_CONTAINERS = (list, tuple, dict, set, frozenset, ItemsView, KeysView, ValuesView)


class Meter:
    """Counts what one rendering costs; raises TemplateError once it exceeds its grant."""

    __slots__ = ("_deadline", "_left_bytes", "_seconds", "_unchecked_bytes")

    def __init__(self, grant_bytes: int, seconds: float) -> None:
        """Grant `grant_bytes` of cost and `seconds` of this thread's processor time."""
        self._left_bytes = grant_bytes
        self._unchecked_bytes = 0
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds

    def charge(self, cost_bytes: int) -> None:
        """Take `cost_bytes` from the grant."""
        cost_bytes = max(0, cost_bytes)
        self._left_bytes -= cost_bytes
        if self._left_bytes < 0:
            raise TemplateError("the chat template does too much work or makes too much text")
        self._unchecked_bytes += cost_bytes
        if self._unchecked_bytes >= TIME_CHECK_BYTES:
            self._unchecked_bytes = 0
            if time.thread_time() > self._deadline:
                raise TemplateError(f"the chat template ran longer than {self._seconds:g} s")

    def charge_structure(self, value: Any, depth: int = 0, *, times: int = 1) -> None:
        """Charge for walking a nested value `times` times, as comparing and hashing do.

        [x, x] nested forty times is small in memory but is walked 2**40 times.
        """
        if isinstance(value, str):
            self.charge(times * len(value) >> 4)
        elif isinstance(value, _CONTAINERS):
            _check_depth(depth)
            for entry in _entries(value):
                self.charge(times * STEP_BYTES)
                self.charge_structure(entry, depth + 1, times=times)

    def charge_text(self, value: Any, depth: int = 0, *, indent: int = 0) -> int:
        """Charge for str(value) before it is made; returns its size in bytes, roughly."""
        size = 32
        if isinstance(value, str):
            size = value.__sizeof__()
        elif isinstance(value, int):
            size += value.bit_length() // 3
        inside = 0
        if isinstance(value, _CONTAINERS):
            _check_depth(depth)
            size += indent * depth
            for entry in _entries(value):
                inside += self.charge_text(entry, depth + 1, indent=indent)
                size += ENTRY_BYTES + indent * (depth + 1)
        self.charge(size)
        return size + inside

    def charge_result(self, value: Any) -> Any:
        """Charge for a value just made by a filter, call or operator, and return it."""
        if isinstance(value, str):
            self.charge(STEP_BYTES + value.__sizeof__())
        elif isinstance(value, (list, tuple, dict)):
            self.charge(STEP_BYTES + ENTRY_BYTES * len(value))
        else:
            self.charge(STEP_BYTES)
            if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
                raise TemplateError("the chat template makes an integer that is too large")
        return value

    def drain(self, lazy: Iterable[Any]) -> list[Any]:
        """Collect an iterable, charging for each entry as it comes."""
        entries = []
        for entry in lazy:
            self.charge(ENTRY_BYTES)
            entries.append(entry)
        return entries

    def charge_copies(self, value: str | list[Any] | tuple[Any, ...], count: int) -> None:
        """Charge for `count` copies of a text or list before they are made."""
        size = value.__sizeof__() if isinstance(value, str) else ENTRY_BYTES * len(value)
        self.charge(size * count)

    def charge_format(self, pattern: str, arguments: Any) -> None:
        """Charge for pattern % arguments, or pattern.format(arguments), before it is made."""
        percents = _PERCENT_FIELD.findall(pattern.replace("%%", ""))
        if _NESTED_FIELD.search(pattern.replace("{{", "")) or any(
            set("(*") & set(p) for p in percents
        ):
            raise TemplateError("the chat template computes the fields of a format")
        for spec in percents + _BRACE_FIELD.findall(pattern):
            for number in _NUMBER.findall(spec):
                check_width(int(number[:9]))
        fields = pattern.count("%") + pattern.count("{")
        self.charge(pattern.__sizeof__() + fields * MAX_WIDTH // 8)
        self.charge(self.charge_text(arguments) * fields)


def check_width(*numbers: Any) -> None:
    """Refuse widths, precisions and counts beyond MAX_WIDTH; what is not a number passes."""
    for number in numbers:
        if isinstance(number, (int, float)) and not abs(number) <= MAX_WIDTH:
            raise TemplateError(f"the chat template asks for a width above {MAX_WIDTH}")


def _check_depth(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise TemplateError("the chat template nests lists too deeply")


def _entries(container: Any) -> Iterable[Any]:
    if isinstance(container, dict):
        for pair in container.items():
            yield from pair
    else:
        yield from container
