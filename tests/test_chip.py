"""In: the shipped chip files, and files with a planted fault. Out: sums that hold; named faults."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path

import house
import pytest

from openlpu.chip import EAST, PURPOSES, WEST, Chip, load_chip, parse_chip, shipped_chips
from openlpu.errors import ChipError
from openlpu.isa import ALU, KINDS, OPCODES, latency, place, queue_name, units

SHIPPED = ("lpu_217", "tiny", "tsp_v1")
TINY = (resources.files("openlpu") / "chips" / "tiny.toml").read_text()


@pytest.fixture(scope="module", params=SHIPPED)
def chip(request: pytest.FixtureRequest) -> Chip:
    return load_chip(request.param)


# -- the shipped chips ------------------------------------------------------------------------


def test_three_chips_ship() -> None:
    assert shipped_chips() == SHIPPED
    assert [load_chip(name).name for name in SHIPPED] == list(SHIPPED)


def test_the_published_chip_has_its_published_sums() -> None:
    chip = load_chip("tsp_v1")
    assert chip.memory_bytes == 230_686_720
    assert units(chip).count == 144
    assert (chip.lanes, chip.slices, chip.planes, chip.words) == (320, 88, 4, 8192)
    assert (chip.streams, chip.alus, chip.clock_hz) == (32, 16, 900_000_000)
    assert chip.planes * chip.lanes**2 == 409_600  # multiply-adds a cycle
    # 45 stream register files are published; ours stand at the MEM and the VXM.
    assert 2 * chip.mem_hops + 1 == 45
    # A hemisphere has 6 queues for MXM, 14 for SXM, 44 for MEM; the VXM has 16.
    names = [queue_name(chip, queue) for queue in range(144)]
    counts = [sum(name.startswith(unit) for name in names) for unit in ("mxm", "sxm", "mem", "alu")]
    assert counts == [12, 28, 88, 16]


def test_the_217_mb_chip_has_three_regions() -> None:
    chip = load_chip("lpu_217")
    sizes = {r.name: r.words * chip.slices * chip.lanes / 1e6 for r in chip.regions}
    assert {name: round(size) for name, size in sizes.items()} == {"L0": 4, "L1": 128, "L2": 85}
    assert chip.memory_bytes // 10**6 == 217
    assert sum(region.words for region in chip.regions) == chip.words
    assert [chip.region(purpose).name for purpose in PURPOSES] == ["L0", "L1", "L2"]


def test_but_for_its_memory_it_is_the_published_chip() -> None:
    ours, theirs = load_chip("lpu_217"), load_chip("tsp_v1")
    different = {
        name for name in Chip.__slots__ if getattr(ours, name) != getattr(theirs, name)
    } - {"sources"}
    assert different == {"name", "words_per_bank", "regions"}


def test_units_stand_mirrored_on_one_line(chip: Chip) -> None:
    last = chip.positions - 1
    assert chip.vxm_position * 2 == last
    for index in range(chip.slices_per_hemisphere):
        west, east = chip.mem_position(index), chip.mem_position(index + chip.slices // 2)
        assert west + east == last
        assert 1 < west < chip.vxm_position
    assert chip.sxm_position(WEST) + chip.sxm_position(EAST) == last
    for plane in range(chip.planes // 2):
        assert (chip.mxm_position(plane), chip.mxm_position(plane + chip.planes // 2)) == (0, last)


def test_every_queue_has_its_own_name_and_place(chip: Chip) -> None:
    count = units(chip).count
    assert len({queue_name(chip, queue) for queue in range(count)}) == count
    assert len({(place(chip, q).unit, place(chip, q).index) for q in range(count)}) == count
    assert queue_name(chip, 0) == "mem.w0"
    assert queue_name(chip, chip.slices // 2) == "mem.e0"
    assert queue_name(chip, units(chip).load + 5) == "mxm1.out"
    assert queue_name(chip, units(chip).vxm + 7) == "alu7"
    assert queue_name(chip, count - 1) == f"sxm.e{chip.sxm_queues - 1}"


def test_every_instruction_that_takes_time_has_a_latency(chip: Chip) -> None:
    for kind in KINDS.values():
        assert kind.latency or kind.unit in ("icu", "c2c")
        assert not kind.latency or latency(chip, kind) > 0
        assert not kind.energy or getattr(chip.energy_pj, kind.energy) > 0
    assert max(OPCODES.values()) < 1 << 8
    assert set(ALU) <= set(KINDS)


def test_every_latency_is_marked_an_assumption(chip: Chip) -> None:
    marked = {key for key, source in chip.sources.items() if "assumption" in source}
    assert {key for key in chip.sources if key.startswith("latency_cycles.")} <= marked


# -- faults -----------------------------------------------------------------------------------


def changed(old: str, new: str) -> str:
    assert TINY.count(old) >= 1
    return TINY.replace(old, new, 1)


def value(key: str, text: str) -> str:
    """tiny with another value for a key."""
    entry = re.compile(rf"^{key} = {{ value = [0-9_.]+,", re.MULTILINE)
    assert len(entry.findall(TINY)) == 1
    return entry.sub(f"{key} = {{ value = {text},", TINY)


FAULTS = {
    "no TOML": ("[chip\n", "not TOML"),
    "nothing": ("", "the file lacks keys: chip, "),
    "a typo": (changed("alus =", "aluss ="), r"\[vxm\] has unknown keys: aluss"),
    "a missing key": (re.sub(r"\nrepeats = .*", "", TINY), r"\[icu\] lacks keys: repeats"),
    "an unknown table": (TINY + "\n[cache]\nways = 8\n", "the file has unknown keys: cache"),
    "a missing table": (
        TINY.replace("[stream]", "[streams]"),
        "the file has unknown keys: streams",
    ),
    "no table": ("vxm = 3\n" + re.sub(r"\[vxm\]\n.*\n.*\n", "", TINY), r"\[vxm\] is no table"),
    "an unknown latency": (
        changed("mxm_dot =", "mxm_dott ="),
        r"\[latency_cycles\] has unknown keys: mxm_dott",
    ),
    "a bare number": (
        changed('banks = { value = 2, source = "assumption" }', "banks = 2"),
        "mem.banks must be",
    ),
    "no source": (
        changed('alus = { value = 16, source = "assumption" }', "alus = { value = 16 }"),
        "vxm.alus lacks keys: source",
    ),
    "an empty source": (
        changed('alus = { value = 16, source = "assumption" }', 'alus = {value=16, source=""}'),
        "vxm.alus has no source",
    ),
    "a negative size": (value("superlanes", "-2"), "chip.superlanes is -2"),
    "a zero": (value("alus", "0"), "vxm.alus is 0"),
    "a truth": (value("alus", "true"), "vxm.alus is True"),
    "a text": (value("alus", '"16"'), "vxm.alus is '16'"),
    "a fraction": (value("mem_read", "2.5"), "latency_cycles.mem_read is 2.5"),
    "a long latency": (value("mem_read", "5000"), "latency_cycles.mem_read is 5000"),
    "a huge size": (value("superlanes", "1000"), "chip.superlanes is 1000; .* 1 to 64"),
    "too many ALUs": (value("alus", "33"), "vxm.alus is 33"),
    "too much history": (value("history_cycles", "65"), "vxm.history_cycles is 65"),
    "negative energy": (value("mac", "-0.1"), "energy_pj.mac is -0.1; give picojoules"),
    "infinite energy": (value("mac", "inf"), "energy_pj.mac is inf"),
    "no energy": (value("mac", "nan"), "energy_pj.mac is nan"),
    "an odd hop": (value("slices_per_hop", "3"), "16 slices are no multiple of 3 slices per hop"),
    "one bank": (value("banks", "1"), "1 banks"),
    "odd streams": (value("per_direction", "30"), "30 streams hold no whole groups of 4"),
    "an odd install": (value("install_streams", "12"), "32 lanes are no multiple of 12"),
    "a wide install": (
        value("slices_per_hemisphere", "8").replace("words = 2048", "words = 2000"),
        "8 slices a hemisphere cannot feed 16 install streams",
    ),
    "large banks": (value("words_per_bank", "32769"), "mem.words_per_bank is 32769"),
    "no name": (changed('name = "tiny"', 'name = ""'), "chip.name is no short text"),
    "a region too far": (changed("words = 2048", "words = 2049"), "the regions end at word 2049"),
    "an empty region": (changed("words = 2048", "words = 0"), "region sram is empty"),
    "half a word": (changed("words = 2048", "words = 2.5"), "region sram: words is 2.5"),
    "an unknown purpose": (changed('"state"', '"stack"'), "region sram: holds must list some of"),
    "a purpose without a region": (changed('"state", ', ""), "0 regions hold state"),
    "two regions at one place": (
        TINY + '\n[[region]]\nname = "b"\nholds = []\nfirst_word = 9\nwords = 9\n',
        "region b begins at word 9, inside the one that ends at 2048",
    ),
    "no list of regions": (TINY.replace("[[region]]", "[region]"), r"region must be \[\[region\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_key(fault: str) -> None:
    text, named = FAULTS[fault]
    with pytest.raises(ChipError, match=f"^here: .*{named}") as caught:
        parse_chip(text, "here")
    assert "\n" not in str(caught.value)


def test_a_chip_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(changed('name = "tiny"', 'name = "mine"'))
    assert load_chip(str(path)).name == "mine"
    path.write_text(value("alus", "0"))
    with pytest.raises(ChipError, match=r"mine\.toml: vxm\.alus is 0"):
        load_chip(str(path))


def test_a_file_that_is_no_chip(tmp_path: Path) -> None:
    with pytest.raises(ChipError, match="no chip 'tyni'; give a file or one of: lpu_217, tiny, ts"):
        load_chip("tyni")
    with pytest.raises(ChipError, match="no chip"):
        load_chip(str(tmp_path))
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ChipError, match="cannot be read"):
        load_chip(str(path))
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ChipError, match="a chip file has at most 1,048,576 bytes"):
        load_chip(str(path))


# -- sources ----------------------------------------------------------------------------------


def test_every_source_is_known() -> None:
    """A source is an assumption, or begins with a key that docs/fidelity.md explains."""
    page = (house.REPOSITORY / "docs" / "fidelity.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| ([A-Z][A-Za-z0-9 ]*) \|", page.partition("## Sources")[2], re.MULTILINE)
    assert {"I20", "I22", "MPR", "WS20", "D"} <= set(keys)
    for name in SHIPPED:
        for key, source in load_chip(name).sources.items():
            known = source.startswith((*keys, "assumption", "the same"))
            assert known, f"{name}: {key} has the source {source!r}"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_holds_nothing_that_is_not_read(name: str) -> None:
    text = (resources.files("openlpu") / "chips" / f"{name}.toml").read_text()
    figures = sum(
        len(table) - ("name" in table)
        for table in tomllib.loads(text).values()
        if isinstance(table, dict)
    )
    assert figures == len(load_chip(name).sources)
