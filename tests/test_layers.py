"""In: the package, and small packages with a planted fault. Out: the order of imports holds."""

from __future__ import annotations

from pathlib import Path

import house
import pytest


def plant(root: Path, files: dict[str, str]) -> Path:
    """A package `openlpu` below root, with empty __init__.py files where none are given."""
    package = root / "openlpu"
    for name, text in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if not (path.parent / "__init__.py").exists():
            (path.parent / "__init__.py").write_text("")
    return package


def test_imports_go_down() -> None:
    assert house.order_violations(house.PACKAGE) == []


def test_no_file_imports_itself_round_a_corner() -> None:
    assert house.cycles(house.PACKAGE) == []


def test_only_knobs_reads_the_environment() -> None:
    assert house.environment_readers(house.PACKAGE) == []


def test_only_the_command_prints() -> None:
    assert house.printers(house.PACKAGE) == []


@pytest.mark.parametrize(
    "upward",
    [
        "import openlpu.load",
        "import openlpu.load.gguf as g",
        "from openlpu import load",
        "from openlpu.load import gguf",
        "from openlpu.load.gguf import Reader",
        "from ..load import gguf",
        "from .. import load",
        "def late():\n    from openlpu.load.gguf import Reader",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from openlpu.load import gguf",
        "import importlib\nimportlib.import_module('openlpu.load.gguf')",
        "__import__('openlpu.load')",
        "from openlpu import main",
    ],
)
def test_an_upward_import_is_seen(tmp_path: Path, upward: str) -> None:
    package = plant(tmp_path, {"host/gemm.py": upward, "load/gguf.py": ""})
    broken = house.order_violations(package)
    assert len(broken) == 1
    assert broken[0].startswith("openlpu.host.gemm:")
    assert broken[0].endswith(", above it")


@pytest.mark.parametrize(
    "downward",
    [
        "from openlpu.jit import Engine",
        "from .. import jit",
        "from ..jit import Engine",
        "from . import pack",
        "from openlpu import __version__",
        "import numpy.linalg",
        "from loader import gguf",
    ],
)
def test_a_downward_import_is_fine(tmp_path: Path, downward: str) -> None:
    package = plant(tmp_path, {"host/gemm.py": downward, "host/pack.py": "", "jit.py": ""})
    assert house.order_violations(package) == []
    assert house.cycles(package) == []


def test_a_file_without_a_place_is_seen(tmp_path: Path) -> None:
    package = plant(tmp_path, {"extras.py": ""})
    assert house.order_violations(package) == [
        "openlpu.extras has no place in the order of imports"
    ]


def test_a_ring_is_seen_once(tmp_path: Path) -> None:
    ring = {
        "load/a.py": "from openlpu.load import b",
        "load/b.py": "def late():\n    from .c import x",
        "load/c.py": "import openlpu.load.a",
        "load/d.py": "from openlpu.load import a",
    }
    names = ("openlpu.load.a", "openlpu.load.b", "openlpu.load.c")
    assert house.cycles(plant(tmp_path, ring)) == [names]


def test_a_ring_through_the_door_is_seen(tmp_path: Path) -> None:
    ring = {
        "load/__init__.py": "from openlpu.load.a import open",
        "load/a.py": "from . import NAME",
    }
    assert house.cycles(plant(tmp_path, ring)) == [("openlpu.load", "openlpu.load.a")]


@pytest.mark.parametrize(
    "reader",
    [
        "import os\nx = os.environ['HOME']",
        "import os as system\nx = system.getenv('HOME')",
        "from os import environ",
        "from os import getenv as g",
    ],
)
def test_a_reader_of_the_environment_is_seen(tmp_path: Path, reader: str) -> None:
    package = plant(tmp_path, {"store.py": reader, "knobs.py": reader})
    found = house.environment_readers(package)
    assert len(found) == 1
    assert found[0].startswith("openlpu.store:")


def test_a_printing_file_is_seen(tmp_path: Path) -> None:
    package = plant(tmp_path, {"store.py": "print(1)", "cli/run.py": "print(1)"})
    assert house.printers(package) == ["openlpu.store:1 prints; only cli talks to the user"]
