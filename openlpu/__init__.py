"""OpenLPU: an open Language Processing Unit.

import openlpu
model = openlpu.load("smollm2")
print(model.generate("Why is the sky blue?"))
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from openlpu import load as _folder  # its door only, which is empty

__version__ = "0.1.0"

if TYPE_CHECKING:
    from openlpu.engine import Chat, Model, Result, Sampling, Stats, Stream
    from openlpu.engine import load as load
    from openlpu.errors import LpuError

__all__ = ["Chat", "LpuError", "Model", "Result", "Sampling", "Stats", "Stream", "load"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: `lpu --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'openlpu' has no attribute {name!r}")
    place = "openlpu.errors" if name == "LpuError" else "openlpu.engine"
    return getattr(importlib.import_module(place), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Load(ModuleType):
    """openlpu.load is a folder of this package, which Python makes an attribute of it whenever
    something imports from there. So that openlpu.load(...) loads a model nevertheless, the folder
    can be called; openlpu.engine.model.load is what it calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Model:
        return importlib.import_module("openlpu.engine").load(*args, **kwargs)  # type: ignore[no-any-return]


_folder.__class__ = _Load
