"""In: the manual's generator. Out: docs/isa.md is its page, and the page leaves nothing out."""

from __future__ import annotations

import re
from dataclasses import fields

import house
import pytest

from openlpu import isa
from openlpu.asm import binary, manual
from openlpu.chip import Latency, load_chip
from openlpu.isa import ALU, KINDS, OPCODES, Kind, Mode, Source

PAGE = (house.REPOSITORY / "docs" / "isa.md").read_text(encoding="utf-8")


def test_the_page_is_the_manual() -> None:
    assert manual.page() == PAGE, "run `python tests/house.py`"


def row(name: str) -> list[str]:
    """The cells of the one row of the page that begins with a name."""
    (line,) = re.findall(rf"^\| `{name}` \|.*\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_instruction_has_its_row(kind: Kind) -> None:
    cells = row(kind.name)
    assert cells[1] == str(OPCODES[kind.name])
    assert cells[-1].replace("\\|", "|") == kind.meaning
    assert not kind.latency or kind.latency in cells
    if kind.name in ALU:
        assert cells[2] == str(ALU[kind.name].operands)
        return
    assert cells[2] == str(binary.size_bytes(kind.name))
    for field in kind.fields:
        assert re.search(rf"\b{field.name}:{field.bits}(?!\d)", cells[3])
    for port in (*kind.reads, *kind.writes):
        assert f"`{port.field}` (" in cells[4]


def test_the_rules_are_those_of_the_code() -> None:
    rules = (isa.__doc__ or "").partition("\n\n")[2].strip()
    assert rules in PAGE
    for name in ("Time", "Streams", "A cycle", "State", "Queues", "Addresses", "MXM"):
        assert f"**{name}" in rules


def test_sources_and_modes_are_explained() -> None:
    for source in Source:
        assert re.search(rf"^    {source.name}  ", PAGE, re.MULTILINE)
    for mode in Mode:
        assert f"`{mode.name.lower()}` {mode.value}" in PAGE


def test_every_latency_has_its_row() -> None:
    chip = load_chip("tsp_v1")
    for entry in fields(Latency):
        cells = row(entry.name)
        assert str(getattr(chip.latency, entry.name)) in cells
        assert cells[-1] == chip.sources[f"latency_cycles.{entry.name}"]
