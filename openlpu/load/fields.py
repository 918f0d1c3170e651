"""In: a mapping that a stranger wrote. Out: its values by key, typed and in range, or an error."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from openlpu.errors import CheckpointError, UnsupportedModel


class Fields:
    """Typed access to one mapping. Errors name the file, the key and what was expected."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        """`where` names the file in errors; keys may be given without `prefix`."""
        self.where = where
        self.prefix = prefix
        self.values: dict[str, Any] = {
            (k.removeprefix(prefix) if isinstance(k, str) else k): v for k, v in values.items()
        }

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """A whole number in [low, high]; `default` if the key is missing."""
        value = self._scalar(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        """A finite number in [low, high]; `default` if the key is missing."""
        value = self._scalar(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "a number")
        if not low <= value <= high or math.isnan(value):
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A text; `default` if the key is missing."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` if the key is missing."""
        value = self._scalar(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def refuse_unless(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """UnsupportedModel for the first key that is present with none of its neutral values."""
        for key, allowed in neutral.items():
            if key in self.values and not any(_same(self.values[key], a) for a in allowed):
                raise UnsupportedModel(
                    f"{self.where}: option {self.prefix}{key} = {shown(self.values[key])} "
                    "is not supported"
                )

    def _scalar(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.where}: {self.prefix}{key} is missing; fetch it again")
        if hasattr(value, "tolist"):  # GGUF gives some sizes per layer
            several = sorted(set(value.tolist()))
            if len(several) != 1:
                raise UnsupportedModel(
                    f"{self.where}: {self.prefix}{key} differs between layers, not supported"
                )
            return several[0]
        return value

    def _wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {self.prefix}{key} = {shown(value)} is not {expected}; "
            "the file is damaged"
        )


def shown(value: object) -> str:
    """Any value on one line of printable text, cut to 80 characters, in little time."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return " ".join(brief.repr(value).split())[:80]


def one_line(message: object, longest: int = 300) -> str:
    """A stranger's message as one line without control characters, which terminals would obey."""
    printable = (letter if letter.isprintable() else " " for letter in str(message))
    return " ".join("".join(printable).split())[:longest]


def _same(value: object, allowed: object) -> bool:
    """Equal, with true and 1 kept apart."""
    if isinstance(value, bool) != isinstance(allowed, bool):
        return False
    return type(value).__module__ != "numpy" and value == allowed
