"""In: a chip file (TOML). Out: Chip, a tensor streaming processor as plain data, its sums proved.

Every figure in a file stands with its source: `{ value = 3, source = "I20" }`; the word
"assumption" marks what no public text gives. Unknown keys are refused, missing ones too.

Units stand west to east on one line and are joined by stream registers; a value moves one register
a cycle. With H hops of MEM in a hemisphere the positions are

    0 MXM west | 1 SXM west | 2 .. H+1 MEM west, slice 0 innermost | H+2 VXM | ... mirrored east
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from openlpu.errors import ChipError

WEST, EAST = 0, 1  # hemispheres; a stream's direction has the same numbers
PURPOSES = ("state", "context", "weights")
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Region:
    """A range of words of every slice, and what the placer may keep there."""

    name: str
    holds: tuple[str, ...]
    first_word: int
    words: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Cycles from an instruction's issue to its result; see isa."""

    mem_read: int
    mem_write: int
    base_load: int
    mxm_load: int
    mxm_install: int
    mxm_dot: int
    mxm_out: int
    alu_int: int
    alu_mul: int
    alu_float: int
    alu_convert: int
    alu_divide: int
    sxm_superlane: int
    sxm_across: int
    sxm_transpose: int


@dataclass(frozen=True, slots=True)
class Energy:
    """Picojoules per event: per multiply-add, lane operation, or byte moved."""

    mac: float
    alu_int: float
    alu_mul: float
    alu_float: float
    alu_convert: float
    alu_divide: float
    mem_read_byte: float
    mem_write_byte: float
    stream_hop_byte: float
    load_byte: float
    permute_byte: float
    fetch_byte: float


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip. Counts are per chip unless the name says otherwise."""

    name: str
    clock_hz: int
    superlanes: int
    superlane_lanes: int
    slices_per_hemisphere: int
    slices_per_hop: int
    banks: int
    words_per_bank: int
    base_registers: int
    streams: int  # per direction
    planes_per_hemisphere: int
    install_streams: int  # vectors a plane loads in a cycle
    accumulators: int  # vectors of int32 a plane keeps
    alus: int
    history_cycles: int  # how long the result of an ALU can be read
    sxm_queues: int  # per hemisphere
    sxm_maps: int
    repeats: int  # instructions a queue repeats at the same time
    text_bytes_per_fetch: int
    barrier_cycles: int
    latency: Latency
    energy_pj: Energy
    regions: tuple[Region, ...]
    sources: Mapping[str, str] = field(compare=False, hash=False, repr=False)

    @property
    def lanes(self) -> int:
        """Bytes of a vector; rows and columns of an MXM plane."""
        return self.superlanes * self.superlane_lanes

    @property
    def slices(self) -> int:
        """MEM slices; 0 .. S-1 are west, S .. 2S-1 east, each numbered outwards from the VXM."""
        return 2 * self.slices_per_hemisphere

    @property
    def planes(self) -> int:
        """MXM planes; the west's first."""
        return 2 * self.planes_per_hemisphere

    @property
    def words(self) -> int:
        """Words (vectors) of a slice."""
        return self.banks * self.words_per_bank

    @property
    def memory_bytes(self) -> int:
        return self.slices * self.words * self.lanes

    @property
    def mem_hops(self) -> int:
        """Stream registers across the MEM of one hemisphere."""
        return self.slices_per_hemisphere // self.slices_per_hop

    @property
    def vxm_position(self) -> int:
        return self.mem_hops + 2

    @property
    def positions(self) -> int:
        return 2 * self.vxm_position + 1

    def mem_position(self, slice_index: int) -> int:
        """Where slice 0 .. slices-1 stands."""
        hemisphere, index = divmod(slice_index, self.slices_per_hemisphere)
        distance = 1 + index // self.slices_per_hop
        return self.vxm_position + (distance if hemisphere == EAST else -distance)

    def sxm_position(self, hemisphere: int) -> int:
        return self.positions - 2 if hemisphere == EAST else 1

    def mxm_position(self, plane: int) -> int:
        return self.positions - 1 if plane // self.planes_per_hemisphere == EAST else 0

    def region(self, purpose: str) -> Region:
        """The region that holds `purpose`; every chip has one for each."""
        return next(region for region in self.regions if purpose in region.holds)


# Section of the file -> key there -> field of Chip.
_KEYS: dict[str, dict[str, str]] = {
    "chip": {name: name for name in ("clock_hz", "superlanes", "superlane_lanes")},
    "mem": {
        name: name
        for name in (
            "slices_per_hemisphere",
            "slices_per_hop",
            "banks",
            "words_per_bank",
            "base_registers",
        )
    },
    "stream": {"per_direction": "streams"},
    "mxm": {name: name for name in ("planes_per_hemisphere", "install_streams", "accumulators")},
    "vxm": {"alus": "alus", "history_cycles": "history_cycles"},
    "sxm": {"queues_per_hemisphere": "sxm_queues", "maps": "sxm_maps"},
    "icu": {name: name for name in ("repeats", "text_bytes_per_fetch", "barrier_cycles")},
}
# What instruction fields and the int32 sums of the contract can hold.
_LIMITS = {
    "superlanes": 64,
    "superlane_lanes": 64,
    "slices_per_hemisphere": 128,
    "banks": 2,
    "words_per_bank": 1 << 15,
    "base_registers": 16,
    "streams": 32,
    "planes_per_hemisphere": 8,
    "accumulators": 1 << 12,
    "alus": 32,
    "history_cycles": 64,
    "sxm_queues": 32,
    "sxm_maps": 1 << 12,
    "repeats": 1 << 10,
    "clock_hz": 10**11,
    "text_bytes_per_fetch": 1 << 16,
    "barrier_cycles": 10**6,
}
_LONGEST_LATENCY = 4096


def load_chip(name_or_path: str) -> Chip:
    """A chip that ships with the package, or a file. Raises ChipError."""
    shipped = resources.files("openlpu") / "chips" / f"{name_or_path}.toml"
    path = Path(name_or_path)
    try:
        if "/" not in name_or_path and shipped.is_file():
            return parse_chip(shipped.read_text(), name_or_path)
        if not path.is_file():
            known = ", ".join(shipped_chips())
            raise ChipError(f"no chip {name_or_path!r}; give a file or one of: {known}")
        if path.stat().st_size > _LARGEST_FILE:
            raise ChipError(f"{path}: a chip file has at most {_LARGEST_FILE:,} bytes")
        return parse_chip(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ChipError(f"{name_or_path}: cannot be read: {error}") from None


def shipped_chips() -> tuple[str, ...]:
    """Names of the chips that ship with the package."""
    folder = resources.files("openlpu") / "chips"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml")))


def parse_chip(text: str, where: str) -> Chip:
    """The chip of a TOML text; `where` names it in errors. Raises ChipError."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as error:  # a number of too many digits, too
        raise ChipError(f"{where}: not TOML: {error}") from None
    except RecursionError:
        raise ChipError(f"{where}: not TOML: nested too deeply") from None
    return _Reader(where).chip(data)


class _Reader:
    """Takes a chip file apart; every fault names the file, the key and the number."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.sources: dict[str, str] = {}

    def demand(self, condition: bool, what: str) -> None:
        if not condition:
            raise ChipError(f"{self.where}: {what}")

    def chip(self, data: dict[str, Any]) -> Chip:
        self.keys("the file", data, {*_KEYS, "latency_cycles", "energy_pj", "region"})
        values: dict[str, Any] = {}
        for section, keys in _KEYS.items():
            table = self.table(data, section)
            extra = {"name"} if section == "chip" else set()
            self.keys(f"[{section}]", table, {*keys, *extra})
            for key, target in keys.items():
                values[target] = self.integer(f"{section}.{key}", table[key], _LIMITS.get(target))
        name = data["chip"]["name"]
        self.demand(isinstance(name, str) and 0 < len(name) <= 64, "chip.name is no short text")
        chip = Chip(
            name=name,
            **values,
            latency=Latency(**self.figures(data, "latency_cycles", Latency, whole=True)),
            energy_pj=Energy(**self.figures(data, "energy_pj", Energy, whole=False)),
            regions=self.regions(data["region"]),
            sources=self.sources,
        )
        self.prove(chip)
        return chip

    def table(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        table = data[name]
        self.demand(isinstance(table, dict), f"[{name}] is no table")
        return dict(table)

    def keys(self, what: str, found: Mapping[str, Any], known: set[str]) -> None:
        unknown, missing = sorted(set(found) - known), sorted(known - set(found))
        self.demand(not unknown, f"{what} has unknown keys: {', '.join(unknown)}")
        self.demand(not missing, f"{what} lacks keys: {', '.join(missing)}")

    def figure(self, key: str, entry: Any) -> Any:
        """The value of `{ value, source }`; the source is kept."""
        self.demand(isinstance(entry, dict), f"{key} must be {{ value = ..., source = ... }}")
        self.keys(key, entry, {"value", "source"})
        source = entry["source"]
        self.demand(isinstance(source, str) and bool(source), f"{key} has no source")
        self.sources[key] = source
        return entry["value"]

    def integer(self, key: str, entry: Any, limit: int | None) -> int:
        value = self.figure(key, entry)
        limit = limit or 1 << 31
        fine = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= limit
        self.demand(fine, f"{key} is {value!r}; give a whole number from 1 to {limit:,}")
        return int(value)

    def figures(self, data: dict[str, Any], name: str, of: type, *, whole: bool) -> dict[str, Any]:
        table = self.table(data, name)
        self.keys(f"[{name}]", table, {entry.name for entry in fields(of)})
        if whole:
            return {k: self.integer(f"{name}.{k}", v, _LONGEST_LATENCY) for k, v in table.items()}
        found = {}
        for key, entry in table.items():
            value = self.figure(f"{name}.{key}", entry)
            fine = isinstance(value, int | float) and not isinstance(value, bool)
            self.demand(fine and 0 <= value < 1e9, f"{name}.{key} is {value!r}; give picojoules")
            found[key] = float(value)
        return found

    def regions(self, entries: Any) -> tuple[Region, ...]:
        self.demand(isinstance(entries, list), "region must be [[region]] tables")
        found = []
        for entry in entries:
            self.demand(isinstance(entry, dict), "region must be [[region]] tables")
            self.keys("[[region]]", entry, {"name", "holds", "first_word", "words"})
            name, holds = entry["name"], entry["holds"]
            self.demand(isinstance(name, str) and bool(name), "a region has no name")
            good = isinstance(holds, list) and all(purpose in PURPOSES for purpose in holds)
            self.demand(good, f"region {name}: holds must list some of {', '.join(PURPOSES)}")
            for key in ("first_word", "words"):
                value = entry[key]
                whole = isinstance(value, int) and not isinstance(value, bool)
                self.demand(whole and value >= 0, f"region {name}: {key} is {value!r}")
            found.append(Region(name, tuple(holds), entry["first_word"], entry["words"]))
        return tuple(found)

    def prove(self, chip: Chip) -> None:
        """The sums that the machine's description must satisfy."""
        s, hop = chip.slices_per_hemisphere, chip.slices_per_hop
        self.demand(s % hop == 0, f"{s} slices are no multiple of {hop} slices per hop")
        self.demand(chip.banks == 2, f"{chip.banks} banks: one read and one write need 2")
        lanes, streams = chip.lanes, chip.streams
        width = chip.superlane_lanes
        self.demand(width == 16, f"superlanes of {width} lanes: rotate and transpose take 16")
        self.demand(lanes <= 1024, f"{lanes} lanes are more than instruction fields can name")
        self.demand(streams % 4 == 0, f"{streams} streams hold no whole groups of 4 bytes")
        load = chip.install_streams
        self.demand(lanes % load == 0, f"{lanes} lanes are no multiple of {load} install streams")
        self.demand(lanes >= 2 * load, f"{lanes} lanes hold no 16-bit offset for {load} slices")
        self.demand(streams % load == 0, f"{streams} streams are no multiple of {load} to install")
        widest = 133_000 * 127 * 127
        self.demand(lanes * 128 * 128 <= widest, f"a sum over {lanes} lanes overflows int32")
        self.demand(s >= load, f"{s} slices a hemisphere cannot feed {load} install streams")
        self.demand(chip.words <= 1 << 16, f"{chip.words:,} words need more than 16 address bits")
        end = 0
        for region in sorted(chip.regions, key=lambda region: region.first_word):
            at = f"region {region.name} begins at word {region.first_word}, "
            self.demand(region.first_word >= end, at + f"inside the one that ends at {end}")
            end = region.first_word + region.words
            self.demand(region.words > 0, f"region {region.name} is empty")
        self.demand(end <= chip.words, f"the regions end at word {end} of {chip.words}")
        for purpose in PURPOSES:
            count = sum(purpose in region.holds for region in chip.regions)
            self.demand(count == 1, f"{count} regions hold {purpose}; exactly one must")
