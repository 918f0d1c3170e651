"""OpenLPU: an open Language Processing Unit.

import openlpu
model = openlpu.load("smollm2")
print(model.generate("Why is the sky blue?"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from openlpu.engine import Chat, Model, Result, Sampling, Stats, Stream, load
    from openlpu.errors import LpuError

__all__ = ["Chat", "LpuError", "Model", "Result", "Sampling", "Stats", "Stream", "load"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: `lpu --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'openlpu' has no attribute {name!r}")
    import importlib

    place = "openlpu.errors" if name == "LpuError" else "openlpu.engine"
    return getattr(importlib.import_module(place), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
