"""In: what must lie in memory. Out: where: slice and word, by region and bank; the image of it.

Each bank of each region is filled from both ends: from the bottom with what every layer has (at the
same offset in each layer's part, so that a base register for each bank moves a section from layer
to layer), from the top with what exists once. How far apart layers lie is known when all is placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip, Region
from openlpu.errors import DoesNotFit, RequestError
from openlpu.program import Segment

QUAD = 4  # slices that hold the bytes of a 32-bit vector
_NEAREST_QUADS = 2  # of a hemisphere, for what is read as soon as it is written


@dataclass(slots=True)
class _Span:
    """The part of a region inside one bank of one slice, and how far it is filled."""

    first: int
    words: int
    layered: int = 0
    fixed: int = 0


@dataclass(frozen=True, slots=True)
class Buffer:
    """Vectors in memory: byte b of element i lies in slices[b] at words[b] + i * step.

    base: the base register to add (0: none). ready, period: element i can be read from cycle
    ready + i * period of its section on."""

    slices: tuple[int, ...]
    words: tuple[int, ...]
    count: int
    step: int = 1
    base: int = 0
    ready: int = 0
    period: int = 0

    @property
    def width(self) -> int:
        return len(self.slices)


def region_of_table(chip: Chip, name: str) -> Region:
    """The region named for the embedding table, or by default that of the weights. Raises
    RequestError for a name that the chip does not have."""
    named = {region.name: region for region in chip.regions}
    if name and name not in named:
        raise RequestError(f"{chip.name} has no region {name!r}; it has {', '.join(named)}")
    return named[name] if name else chip.region("weights")


class Memory:
    """Places buffers and collects the image."""

    def __init__(
        self, chip: Chip, *, layers: int, scratch_words: int, table_region: str = ""
    ) -> None:
        """table_region: the name of the region that keeps what is placed for the purpose "table";
        by default it goes where the weights go."""
        self.chip = chip
        self.layers = layers
        self._table = region_of_table(chip, table_region)
        self._spans: dict[tuple[str, int, int], _Span] = {}
        for region in chip.regions:
            for bank in range(chip.banks):
                low = max(region.first_word, bank * chip.words_per_bank)
                high = min(region.first_word + region.words, (bank + 1) * chip.words_per_bank)
                for s in range(chip.slices):
                    self._spans[region.name, s, bank] = _Span(low, max(0, high - low))
        self._fixed: list[tuple[int, int, NDArray[np.uint8], str]] = []
        self._layered: list[tuple[str, int, int, int, NDArray[np.uint8], str]] = []
        self.used: list[tuple[str, int, int, int]] = []
        self._scratch_words = scratch_words
        self._scratch: dict[tuple[int, int], list[int]] = {}  # [first word, words used]
        self._kept: dict[tuple[int, int], int] = {}  # of scratch, at its end
        self._scratch_is_whole = False
        for s in range(chip.slices):
            for bank in self._banks("state", s):
                word = self.fixed("state", s, scratch_words, bank=bank)
                self.used.append(("scratch", s, word, scratch_words))
                self._scratch[s, bank] = [word, 0]
                self._kept[s, bank] = 0
        self._turn = 0
        self._apart = 0  # the same, of what is read apart
        self._given_back: list[Buffer] = []

    def region(self, purpose: str) -> Region:
        """The region for a purpose of the chip file, or for the "table"."""
        return self._table if purpose == "table" else self.chip.region(purpose)

    # -- lasting places -------------------------------------------------------------------------

    def fixed(self, purpose: str, s: int, words: int, *, bank: int | None = None) -> int:
        """First of `words` words of slice s that exist once."""
        region = self.region(purpose).name
        banks = [bank] if bank is not None else list(range(self.chip.banks))
        spans = [self._spans[region, s, b] for b in banks]
        span = max(spans, key=self._room)
        if self._room(span) < words:
            raise self._full(purpose, span, words)
        span.fixed += words
        return span.first + span.words - span.fixed

    def aligned(self, purpose: str, slices: Sequence[int], words: int) -> int:
        """The same in several slices, at one word in all of them."""
        region = self.region(purpose).name
        choices = [
            [self._spans[region, s, bank] for s in slices]
            for bank in self._banks(purpose, slices[0])
        ]
        spans = max(choices, key=lambda spans: min(self._room(span) for span in spans))
        fixed = max(span.fixed for span in spans) + words
        for span in spans:
            if self._room(span) + span.fixed < fixed:
                raise self._full(purpose, span, fixed - span.fixed)
        for span in spans:
            span.fixed = fixed
        return spans[0].first + spans[0].words - fixed

    def layered(self, purpose: str, s: int, words: int) -> int:
        """First of `words` words of slice s in layer 0."""
        region = self.region(purpose).name
        spans = [self._spans[region, s, b] for b in range(self.chip.banks)]
        span = max(spans, key=self._room)
        if self._room(span) < words * self.layers:
            raise self._full(purpose, span, words * self.layers)
        span.layered += words
        return span.first + span.layered - words

    def _room(self, span: _Span) -> int:
        return span.words - span.layered * self.layers - span.fixed

    def bank_room(self, purpose: str, s: int, bank: int) -> int:
        """Free words of one bank of a slice."""
        return max(0, self._room(self._spans[self.region(purpose).name, s, bank]))

    def room(self, purpose: str, s: int) -> int:
        """Free words of a slice."""
        region = self.region(purpose).name
        return max(self._room(self._spans[region, s, b]) for b in range(self.chip.banks))

    def _total_room(self, purpose: str, s: int) -> int:
        region = self.region(purpose).name
        return sum(self._room(self._spans[region, s, b]) for b in range(self.chip.banks))

    def _banks(self, purpose: str, s: int) -> list[int]:
        region = self.region(purpose).name
        return [b for b in range(self.chip.banks) if self._spans[region, s, b].words]

    def _full(self, purpose: str, span: _Span, words: int) -> DoesNotFit:
        """The error for `words` more words of a slice whose part of the region is too full."""
        shrink = {
            "state": ("fewer --rows",),
            "context": ("a shorter --context",),
        }.get(purpose, ("--table-region", "--precision w4"))
        return DoesNotFit(
            f"{purpose} in region {self.region(purpose).name} of {self.chip.name}",
            span.words - self._room(span) + words,
            span.words,
            "words of a slice's bank",
            (*shrink, "a larger chip"),
        )

    @property
    def quiet_quad(self) -> int | None:
        """The quad of a hemisphere that keeps no weights, if there are enough others: rows wait
        there for the planes, and no load is in their way. Numbered from the VXM."""
        per_side = self.chip.slices_per_hemisphere // QUAD
        at_once = self.chip.install_streams * self.chip.planes_per_hemisphere // QUAD
        return per_side - 1 if per_side > at_once else None

    def quad_for_constants(
        self, purpose: str, hemisphere: int, words: int, *, layered: bool
    ) -> int:
        """The quiet quad of a hemisphere, or the emptiest one where it is full."""
        needed = words * (self.layers if layered else 1)
        if self.quiet_quad is not None:
            quad = hemisphere * self.chip.slices_per_hemisphere + QUAD * self.quiet_quad
            if all(self.room(purpose, quad + b) >= needed for b in range(QUAD)):
                return quad
        return self.emptiest(purpose, hemisphere, 1)[0]

    def emptiest(
        self,
        purpose: str,
        hemisphere: int,
        count: int,
        *,
        loads: bool = False,
        plane: int | None = None,
        one_bank: bool = False,
        avoid: Sequence[int] = (),
    ) -> list[int]:
        """`count` quads of a hemisphere with the most room, in order of their number. loads: for
        what planes load; those of one hemisphere load from different quads, if there are enough.
        avoid: slices whose quads are taken last."""
        quads = self._quads(hemisphere)[: self.quiet_quad if loads else None]
        per_side = len(quads)
        sharing = self.chip.planes_per_hemisphere
        if plane is not None and per_side // sharing >= count:
            quads = quads[plane % sharing :: sharing]
        room = self.room if one_bank else self._total_room
        rooms = {q: min(room(purpose, q + b) for b in range(QUAD)) for q in quads}
        return sorted(sorted(quads, key=lambda q: (q in avoid, -rooms[q], q))[:count])

    def _quads(self, hemisphere: int) -> list[int]:
        """First slices of a hemisphere's quads."""
        half = self.chip.slices_per_hemisphere
        return [hemisphere * half + QUAD * q for q in range(half // QUAD)]

    def most_uneven(self, purpose: str, hemisphere: int, width: int) -> int:
        """First of `width` slices with the most room beyond that of the fullest one of their quad,
        which what takes whole quads cannot use."""

        def excess(quad: int, b: int) -> tuple[int, int]:
            rooms = [self._total_room(purpose, quad + i) for i in range(QUAD)]
            return min(rooms[b : b + width]) - min(rooms), min(rooms)

        parts = [(q, b) for q in self._quads(hemisphere) for b in range(0, QUAD, width)]
        return sum(max(parts, key=lambda part: excess(*part)))

    def quad_rooms(self, purpose: str, hemisphere: int, unit: int) -> list[int]:
        """How many runs of `unit` words each quad has room for."""
        region = self.region(purpose).name
        return [
            min(
                sum(self._room(self._spans[region, q + b, k]) // unit for k in (0, 1))
                for b in range(QUAD)
            )
            for q in self._quads(hemisphere)
        ]

    def spread(self, purpose: str, words: int, what: str) -> None:
        """Reserve words that may lie anywhere, evenly over the slices with room."""
        slices = sorted(range(self.chip.slices), key=lambda s: self.room(purpose, s))
        for i, s in enumerate(slices):
            share = -(-words // (len(slices) - i))
            count = min(share, self.room(purpose, s))
            if count:
                self.used.append((what, s, self.fixed(purpose, s, count), count))
                words -= count
        if words:
            region = self.region(purpose)
            have = region.words * self.chip.slices
            raise DoesNotFit(
                f"{what} in region {region.name} of {self.chip.name}",
                have + words,
                have,
                "words",
                ("--table-region", "--precision w4", "a larger chip"),
            )

    # -- contents -------------------------------------------------------------------------------

    def put(self, s: int, word: int, data: NDArray[np.uint8], what: str) -> None:
        """data [n, lanes] stands at `word` before the first step."""
        self._fixed.append((s, word, data, what))

    def put_layer(
        self, purpose: str, layer: int, s: int, word: int, data: NDArray[np.uint8], what: str
    ) -> None:
        """The same, of one layer."""
        self._layered.append((self.region(purpose).name, layer, s, word, data, what))

    def layer_stride(self, purpose: str, s: int, bank: int) -> int:
        """Words from a layer's part to the next layer's in a bank, once everything is placed."""
        return self._spans[self.region(purpose).name, s, bank].layered

    def image(self) -> tuple[Segment, ...]:
        """Everything that was put, neighbours joined."""
        parts = [(s, w, data, what) for s, w, data, what in self._fixed]
        parts += [
            (
                s,
                w + layer * self._spans[region, s, w // self.chip.words_per_bank].layered,
                data,
                what,
            )
            for region, layer, s, w, data, what in self._layered
        ]
        parts.sort(key=lambda part: part[:2])
        joined: list[tuple[int, int, list[NDArray[np.uint8]], str]] = []
        for s, w, data, what in parts:
            if joined:
                last = joined[-1]
                end = last[1] + sum(len(d) for d in last[2])
                assert last[0] < s or end <= w, "two things in one place"
                if last[0] == s and end == w and last[3] == what:
                    last[2].append(data)
                    continue
            joined.append((s, w, [data], what))
        return tuple(Segment(s, w, np.concatenate(d), what) for s, w, d, what in joined)

    # -- places that live as long as a section --------------------------------------------------

    def kept_scratch(self, width: int, count: int, side: int) -> Buffer:
        """A buffer that sections leave alone, but for those that take the whole scratch: in the
        hemisphere's quad and bank where least is kept, at one word of all its slices."""
        places = [
            (max(self._kept[quad + b + i, bank] for i in range(width)), bank, quad + b)
            for quad in self._quads(side)
            for bank in self._banks("state", quad)
            for b in range(0, QUAD, width)
        ]
        kept, bank, first = min(places)
        kept += count
        if kept > self._scratch_words:
            raise self._no_scratch(kept - self._scratch_words)
        slices = tuple(range(first, first + width))
        for s in slices:
            self._kept[s, bank] = kept
        return Buffer(
            slices, (self._scratch[first, bank][0] + self._scratch_words - kept,) * width, count
        )

    def clear_scratch(self, turn: int = 0, *, whole: bool = False) -> None:
        """Free all of it. turn: where the choice of quads begins. whole: with what is kept."""
        self._scratch_is_whole = whole
        self._turn = self._apart = turn
        self._given_back.clear()
        for entry in self._scratch.values():
            entry[1] = 0

    def scratch(
        self,
        width: int,
        count: int,
        *,
        hemisphere: int | None,
        outer: bool,
        nearest: bool = False,
    ) -> Buffer:
        """A buffer for `count` elements of `width` bytes: neighbouring slices of one quad, taken in
        turn. outer: near SXM and MXM, else near the VXM, or nearest to it."""
        per_side = self.chip.slices_per_hemisphere // QUAD
        half = max(1, per_side // 2)
        choice = range(half, per_side) if outer and per_side > 1 else range(half)
        if nearest:
            choice = range(min(half, _NEAREST_QUADS))
        if outer and width == 1 and self.quiet_quad is not None:
            choice = range(self.quiet_quad, per_side)
        sides = (0, 1) if hemisphere is None else (hemisphere,)
        best: tuple[int, ...] | None = None
        for k in range(len(choice) * len(sides) * (QUAD // width)):
            turn = self._turn + k
            side = sides[turn % len(sides)]
            quad = choice[(turn // len(sides)) % len(choice)]
            part = (turn // (len(sides) * len(choice))) % (QUAD // width)
            first = side * self.chip.slices_per_hemisphere + quad * QUAD + part * width
            slices = tuple(range(first, first + width))
            if self._scratch_room(slices, count) is not None:
                best = slices
                self._turn = turn + 1
                break
        if best is None:
            return self.scratch_anywhere(width, count, sides)
        return self._take_scratch(best, count)

    def scratch_anywhere(self, width: int, count: int, sides: Sequence[int]) -> Buffer:
        """The same in whatever quad of the hemispheres has room left."""
        for side in sides:
            for offset in range(0, self.chip.slices_per_hemisphere - width + 1, width):
                first = side * self.chip.slices_per_hemisphere + offset
                slices = tuple(range(first, first + width))
                if self._scratch_room(slices, count) is not None:
                    return self._take_scratch(slices, count)
        for old in self._given_back:
            side = old.slices[0] // self.chip.slices_per_hemisphere
            if old.width >= width and old.count == count and side in sides:
                self._given_back.remove(old)
                return replace(old, slices=old.slices[:width], words=old.words[:width])
        raise self._no_scratch(count)

    def scratch_evenly(self, width: int, count: int) -> Buffer:
        """A buffer in the emptiest quad of both hemispheres, at one word of all its slices; asked
        for before any other scratch of the section, wherever the choice of quads begins."""
        fills = [
            (self._scratch[quad, bank][1], bank, quad)
            for side in (1, 0)
            for quad in self._quads(side)
            for bank in self._banks("state", quad)
        ]
        fill, bank, quad = min(fills)
        if fill + count > self._scratch_words:
            raise self._no_scratch(count)
        word = self._scratch[quad, bank][0] + fill
        for b in range(width):
            self._scratch[quad + b, bank][1] += count
        return Buffer(tuple(range(quad, quad + width)), (word,) * width, count)

    def _no_scratch(self, count: int) -> DoesNotFit:
        return DoesNotFit(
            f"scratch of a section on {self.chip.name}",
            self._scratch_words + count,
            self._scratch_words,
            "words a bank",
            ("fewer --rows",),
        )

    def scratch_apart(self, n: int, count: int, hemisphere: int) -> list[Buffer]:
        """Up to 16 words, any byte of all of which can be read in one cycle: in four quads, the
        bytes turned by a slice from one vector of a quad to the next. Quads are taken in turn, for
        what is read from one such set is soon written to another."""
        per_side = self.chip.slices_per_hemisphere // QUAD
        among = min(per_side, 2 * QUAD)  # the outer ones
        first = (hemisphere + 1) * per_side - among
        for _ in range(among):
            quads = [first + (self._apart + i) % among for i in range(QUAD)]
            self._apart += QUAD if among > QUAD else 1
            sets = [
                tuple(QUAD * quads[i % QUAD] + (b + i // QUAD) % QUAD for b in range(QUAD))
                for i in range(n)
            ]
            needed = -(-n // QUAD) * count
            if all(self._scratch_room(slices, needed) is not None for slices in sets[:QUAD]):
                return [self._take_scratch(slices, count) for slices in sets]
        raise self._no_scratch(count)

    def give_back(self, buffer: Buffer, free_cycle: int) -> None:
        """The scratch buffer may be written again from that cycle on; it is, once all is full."""
        self._given_back.append(replace(buffer, ready=free_cycle, period=0))

    def _scratch_room(self, slices: Sequence[int], count: int) -> int | None:
        """The bank in which every slice has room, the emptier one."""
        fitting = []
        for bank in self._banks("state", slices[0]):
            fill = max(self._scratch[s, bank][1] for s in slices)
            kept = 0 if self._scratch_is_whole else max(self._kept[s, bank] for s in slices)
            if fill + count + kept <= self._scratch_words:
                fitting.append((fill, bank))
        return min(fitting)[1] if fitting else None

    def _take_scratch(self, slices: tuple[int, ...], count: int) -> Buffer:
        bank = self._scratch_room(slices, count)
        assert bank is not None
        words = []
        for s in slices:
            entry = self._scratch[s, bank]
            words.append(entry[0] + entry[1])
            entry[1] += count
        return Buffer(slices, tuple(words), count)
