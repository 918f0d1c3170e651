"""In: the Python files of the repository. Out: none is too long, oddly named, or without a purpose.

`pytest -s tests/test_budget.py` prints the table of files and lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import house
import pytest

HARD_CAP = 600
SHORTEST = 50
FORBIDDEN = re.compile(r"^(utils?|common|helpers?)$|^new_|_old$")

# Files that are short for a reason. A folder's door (__init__.py) only says what the folder offers.
SHORT = {
    "__main__.py": "only makes `python -m openlpu` work",
    "graph/step.py": "what the reference, the host and the engine agree on; none of them owns it",
    "engine/clock.py": "who drives an engine needs it without the engine",
    "engine/speculation.py": "an idea of its own, which nothing but the batcher uses",
    "load/source.py": "what readers and the tokenizer agree on; in either it would make a ring",
}


def python_files() -> list[Path]:
    return [
        path
        for folder in ("openlpu", "tests", "bench")
        for path in sorted((house.REPOSITORY / folder).rglob("*.py"))
    ]


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def too_long(files: Iterable[Path], cap: int = HARD_CAP) -> list[str]:
    return [f"{path} has {line_count(path)} lines" for path in files if line_count(path) > cap]


def ill_named(files: Iterable[Path]) -> list[str]:
    return [str(path) for path in files if any(FORBIDDEN.search(p) for p in stems(path))]


def stems(path: Path) -> Iterable[str]:
    relative = path.relative_to(house.REPOSITORY) if path.is_absolute() else path
    return relative.with_suffix("").parts


def test_no_file_is_too_long() -> None:
    files = python_files()
    for path in files:
        print(f"{line_count(path):5}  {path.relative_to(house.REPOSITORY)}")
    print(f"{sum(map(line_count, files)):5}  altogether")
    assert too_long(files) == []


def test_short_files_have_a_reason() -> None:
    short = {
        path.relative_to(house.PACKAGE).as_posix()
        for path in house.PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and line_count(path) < SHORTEST
    }
    assert short - set(SHORT) == set(), "merge them into a neighbour, or give the reason in SHORT"


def test_names_say_something() -> None:
    assert ill_named(python_files()) == []


def test_every_file_says_what_comes_in_and_what_goes_out() -> None:
    silent = [
        f"{module.name}: {module.purpose!r}"
        for module in house.modules(house.PACKAGE).values()
        if not module.is_folder and not re.match(r"In: .+ Out: .+", module.purpose)
    ]
    assert silent == []


def test_the_map_is_the_tree() -> None:
    page = (house.REPOSITORY / "docs" / "map.md").read_text(encoding="utf-8")
    assert page == house.map_page(), "run `python tests/house.py`"


@pytest.mark.parametrize(
    "name", ["utils.py", "common/x.py", "helpers.py", "new_gemm.py", "x_old.py"]
)
def test_an_empty_name_is_seen(name: str) -> None:
    assert ill_named([Path(name)]) == [name]


@pytest.mark.parametrize("name", ["renew_gemm.py", "uncommon.py", "threshold.py", "renewal.py"])
def test_a_telling_name_is_not(name: str) -> None:
    assert ill_named([Path(name)]) == []


def test_a_long_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * (HARD_CAP + 1))
    (tmp_path / "right.py").write_text("x = 1\n" * HARD_CAP)
    found = too_long(sorted(tmp_path.iterdir()))
    assert found == [f"{tmp_path / 'long.py'} has {HARD_CAP + 1} lines"]
