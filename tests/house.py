"""In: the folder of a package. Out: its files, who imports whom, broken rules, docs/map.md.

`python tests/house.py` writes the generated pages docs/map.md, docs/knobs.md and docs/isa.md.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "openlpu"

# A later name may import an earlier one, never the reverse. "openlpu" is the package's own door.
FLOORS = (
    ("0 leaves", "errors knobs numerics chip system isa store jit"),
    ("1 data", "graph reference program"),
    ("2 readers", "asm check cost bounds host sim"),
    ("3 makers", "load models passes schedule"),
    ("4 compiler", "compiler calibrate"),
    ("5 engine", "engine"),
    ("6 top", "serve plan explore viz openlpu cli __main__"),
)
ORDER = tuple(name for _, names in FLOORS for name in names.split())


@dataclass(frozen=True, slots=True)
class Module:
    """One file. name is dotted and absolute; a folder's name stands for its __init__.py."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_folder(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def place(self) -> str:
        """The name in ORDER that this file belongs to."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    @property
    def purpose(self) -> str:
        """The first paragraph of the docstring, on one line; "" without a docstring."""
        return " ".join((ast.get_docstring(self.tree) or "").split("\n\n")[0].split())


@dataclass(frozen=True, slots=True)
class Import:
    """Line `line` of module `importer` reaches for module `target` of the same package."""

    importer: Module
    target: Module
    line: int


def modules(package: Path) -> dict[str, Module]:
    """Every Python file below `package`, by dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, ast.parse(path.read_bytes(), str(path)))
    return found


def imports(package: Path) -> list[Import]:
    """Every import between files of `package`, wherever it stands in its file."""
    known = modules(package)
    found = []
    for module in known.values():
        for node in ast.walk(module.tree):
            targets = {_file_of(name, known) for name in _names_reached(node, module)}
            found += [Import(module, target, node.lineno) for target in targets - {None, module}]
    return found


def _names_reached(node: ast.AST, module: Module) -> Iterator[str]:
    """Absolute dotted names that one syntax node imports; the last part may be no module."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=stem, names=names, level=level):
            if level:
                parts = module.name.split(".")
                base = parts[: len(parts) - level + module.is_folder]
                stem = ".".join([*base, *([stem] if stem else [])])
            yield from (f"{stem}.{alias.name}" for alias in names)
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            called = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
            if called in ("import_module", "__import__"):
                yield name


def _file_of(name: str, known: dict[str, Module]) -> Module | None:
    """The module that holds `name`; None when it is foreign, or a constant such as __version__."""
    parts = name.split(".")
    if parts[0] not in known or parts[-1].startswith("__"):
        return None
    while ".".join(parts) not in known:
        parts.pop()
    return known[".".join(parts)]


def order_violations(package: Path, order: tuple[str, ...] = ORDER) -> list[str]:
    """Imports that go up the house, and files that have no place in it."""
    rank = {name: position for position, name in enumerate(order)}
    broken = [
        f"{module.name} has no place in the order of imports"
        for module in modules(package).values()
        if module.place not in rank
    ]
    for edge in imports(package):
        low, high = edge.importer.place, edge.target.place
        if low in rank and high in rank and rank[low] < rank[high]:
            broken.append(f"{edge.importer.name}:{edge.line} imports {edge.target.name}, above it")
    return sorted(broken)


def cycles(package: Path) -> list[tuple[str, ...]]:
    """Rings of files that import each other; each ring once, by its sorted names."""
    reach: dict[str, set[str]] = {name: set() for name in modules(package)}
    for edge in imports(package):
        reach[edge.importer.name].add(edge.target.name)
    # The trees are small: closing the relation by repeated union is plain and fast enough.
    grown = True
    while grown:
        grown = False
        for targets in reach.values():
            further = set().union(*(reach[target] for target in targets)) - targets
            targets |= further
            grown |= bool(further)
    rings = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in reach
        if name in reach[name]
    }
    return sorted(rings)


def environment_readers(package: Path) -> list[str]:
    """Lines that touch the process environment outside knobs.py."""
    words = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    return [
        f"{module.name}:{node.lineno} touches the environment; declare a knob in knobs.py"
        for module in modules(package).values()
        if module.place != "knobs"
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and node.attr in words)
        or (isinstance(node, ast.ImportFrom) and words & {alias.name for alias in node.names})
    ]


def printers(package: Path) -> list[str]:
    """Lines that call print() outside cli."""
    return [
        f"{module.name}:{node.lineno} prints; only cli talks to the user"
        for module in modules(package).values()
        if module.place != "cli"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]


def in_flow(found: Iterable[Module], order: tuple[str, ...] = ORDER) -> list[Module]:
    """Files in the order of the data: by floor, a folder's own file first."""
    rank = {name: position for position, name in enumerate(order)}
    return sorted(found, key=lambda module: (rank.get(module.place, len(rank)), module.name))


def map_page(package: Path = PACKAGE) -> str:
    """docs/map.md: one line a file, taken from the file's own first lines."""
    flow = in_flow(modules(package).values())
    page = ["# Map of the house", ""]
    page += ["Generated by `python tests/house.py` from the first lines of the files; a test"]
    page += ["compares the two. A file may import what stands above it, never what stands below."]
    for title, names in FLOORS:
        lines = [
            f"| `{module.path.relative_to(package).as_posix()}` | {_cell(module.purpose)} |"
            for module in flow
            if module.place in names.split()
        ]
        if lines:
            page += ["", f"## {title}", "", "| file | what comes in, what goes out |", "|---|---|"]
            page += lines
    return "\n".join(page) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the generated pages."""
    sys.path.insert(0, str(REPOSITORY))
    from openlpu import knobs
    from openlpu.asm import manual

    (REPOSITORY / "docs" / "map.md").write_text(map_page(), encoding="utf-8")
    (REPOSITORY / "docs" / "knobs.md").write_text(knobs.table(), encoding="utf-8")
    (REPOSITORY / "docs" / "isa.md").write_text(manual.page(), encoding="utf-8")


if __name__ == "__main__":
    main()
