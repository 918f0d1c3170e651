"""In: a quantized Graph, its tensors, a Chip and sizes. Out: the Program of one step.

Sections: embed; before, attend and after of a layer, compiled once and run for every layer with
other bases; head. The plan of a step:

    embed, layers x (before, sequences x blocks of rows x groups of chunks x attend, after), head
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.asm.binary import text_bytes as text_bytes_of
from openlpu.chip import Chip
from openlpu.errors import DoesNotFit, RequestError, UnsupportedModel
from openlpu.graph import F32Tensor, Graph, GroupedTensor, Op, RowTensor, TensorSource
from openlpu.graph.ops import BLOCK_FORMATS, weights_and_biases
from openlpu.program import Base, Loop, Param, Program, Run, Section
from openlpu.schedule import layout as layouts
from openlpu.schedule.attention import Attention
from openlpu.schedule.constants import Constants
from openlpu.schedule.context import (
    FIRST_BASE,
    PLACE_BASE,
    ROW_BASE,
    SCALE_BASE,
    Cache,
    geometry,
    place_cache,
    place_state,
    rows_at_once,
)
from openlpu.schedule.demand import refuse_too_large
from openlpu.schedule.embed import EmbeddingTable, embed, place_table
from openlpu.schedule.grouped import Grouped
from openlpu.schedule.grouped_embed import embed_grouped, place_grouped_table
from openlpu.schedule.grouped_weights import GroupedStore
from openlpu.schedule.layout import Maps
from openlpu.schedule.lower import FEW_VECTORS, Lowering
from openlpu.schedule.memory import Memory, region_of_table
from openlpu.schedule.normal import Parts, parts, plain
from openlpu.schedule.ports import Ports
from openlpu.schedule.section import LAYER_BASE, UPPER_LAYER_BASE, SectionBuilder
from openlpu.schedule.weights import WeightStore

Progress = Callable[[str, int, int], None]
_SCRATCH_WORDS = (64, 128, 192, 256, 320, 384, 448, 512, 768, 1024)
MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """rows: of a step, of `sequences` sequences with as many each. context: most positions.
    table_region: of the chip's regions the one for the embedding table, and for the tiles of a head
    tied to it; by default that of the weights."""

    rows: int
    sequences: int
    context: int
    table_region: str = ""


def build_program(
    graph: Graph,
    source: TensorSource,
    chip: Chip,
    sizes: Sizes,
    *,
    effort: int = 1,
    progress: Progress | None = None,
) -> Program:
    """effort: how many placements of scratch are tried; of each section the shortest schedule is
    kept. Raises DoesNotFit, UnsupportedModel, RequestError for sizes that make no
    sense."""
    _check_sizes(sizes, effort)
    model = parts(plain(graph))
    refuse_too_large(model, chip, region_of_table(chip, sizes.table_region))
    tried: dict[int, DoesNotFit] = {}
    at = bisect_left(_SCRATCH_WORDS, _usual_scratch_words(sizes))
    while at not in tried and 0 <= at < len(_SCRATCH_WORDS):
        try:
            builds = [
                _Build(graph, model, source, chip, sizes, _SCRATCH_WORDS[at], progress)
                for _ in range(effort)
            ]
            return builds[0].program(builds[1:])
        except DoesNotFit as error:
            tried[at] = error
            at += 1 if error.resource.startswith("scratch") else -1
    # Where less scratch is too little for a section, what it leaves no room for is the answer.
    least = min(tried.values(), key=lambda error: error.resource.startswith("scratch"))
    least.levers = _levers(least.levers, model, chip, sizes)
    raise least


def _levers(named: tuple[str, ...], model: Parts, chip: Chip, sizes: Sizes) -> tuple[str, ...]:
    """Those of the levers that can be moved."""
    one_each = sizes.rows == sizes.sequences
    idle = {
        "fewer --rows": one_each,
        "--table-region": len(chip.regions) == 1,
        "--precision w4": model.embed.params[0].format in BLOCK_FORMATS,
    }
    found = [name for name in named if not idle.get(name)]
    of_sequences = {"a shorter --context", *(["fewer --rows"] if one_each else [])}
    if sizes.sequences > 1 and of_sequences & set(named):
        found.insert(0, "fewer --sequences")
    return tuple(found) or ("a larger chip",)


def _usual_scratch_words(sizes: Sizes) -> int:
    """Scratch in each bank to begin with: rows that attend together take the most, and logits take
    it of all rows."""
    rows = sizes.rows // sizes.sequences
    return min(_SCRATCH_WORDS[-1], 12 * rows_at_once(rows) + 2 * sizes.rows)


def _check_sizes(sizes: Sizes, effort: int) -> None:
    if effort < 1:
        raise RequestError(f"effort is {effort}; give at least 1")
    if not 1 <= sizes.rows <= MAX_ROWS:
        raise RequestError(f"rows is {sizes.rows}; give 1 to {MAX_ROWS}")
    if sizes.sequences < 1 or sizes.rows % sizes.sequences:
        raise RequestError(f"{sizes.rows} rows are no multiple of {sizes.sequences} sequences")
    if sizes.context < 1:
        raise RequestError(f"context is {sizes.context}; give at least 1")


class _Build:
    """One attempt, with so many words of scratch in each bank."""

    def __init__(
        self,
        graph: Graph,
        model: Parts,
        source: TensorSource,
        chip: Chip,
        sizes: Sizes,
        scratch_words: int,
        progress: Progress | None,
    ) -> None:
        self.graph, self.model, self.source = graph, model, source
        self.chip, self.sizes, self.progress = chip, sizes, progress
        self.memory = Memory(
            chip,
            layers=len(model.layers),
            scratch_words=scratch_words,
            table_region=sizes.table_region,
        )
        self.maps = Maps(chip)
        self.store = WeightStore(self.memory)
        self.constants = Constants(self.memory, self.store)
        self.in_blocks = model.embed.params[0].format in BLOCK_FORMATS
        self.grouped = GroupedStore(self.store)
        windows = [layer.attention.integer("window", 0) for layer in model.layers]
        self.ports = Ports(self.memory, sizes.rows, len(model.layers), any(windows))
        attention = model.layers[0].attention
        self.geometry = geometry(
            attention, chip, context=sizes.context, sequences=sizes.sequences, rows=sizes.rows
        )
        self.ports.units = self.geometry.units
        self.once = (model.embed, *model.head)
        body = model.layers[0]
        self.body = (*body.before, body.attention, *body.after)

    def program(self, others: Sequence[_Build]) -> Program:
        """The program, of the shortest sections that this build and the others find."""
        table, cache, made = self.schedule(0, 1 + len(others))
        for turn, other in enumerate(others, 1):
            _, _, again = other.schedule(turn, 1 + len(others))
            # Lasting places do not depend on the turn, so sections fit each other.
            assert other.memory.used == self.memory.used
            made = {name: min(made[name], again[name], key=lambda s: s.cycles) for name in made}
        sections = [made[name] for name in ("embed", "before", "attend", "after", "head")]
        text_bytes = sum(sum(text_bytes_of(section, self.chip).values()) for section in sections)
        self.memory.spread("weights", -(-text_bytes // self.chip.lanes), "text")
        self._fill()
        return Program(
            chip=self.chip.name,
            sections=tuple(sections),
            plan=self._plan(sections),
            params=(Param("groups", self.sizes.sequences, 1, self.geometry.groups),),
            maps=self.maps.table(),
            image=self.memory.image(),
            ports=self.ports.described(),
            used=tuple(self.memory.used),
            meta=json.dumps(self._meta(table, cache), sort_keys=True),
        )

    def schedule(self, turn: int, turns: int) -> tuple[EmbeddingTable, Cache, dict[str, Section]]:
        """Every section by its name. turn: where the choice of scratch begins."""
        place = place_grouped_table if self.in_blocks else place_table
        table = place(self.model.embed, -1, self.memory, self.store)
        width = self.model.embed.params[0].shape[1]
        self.dense = layouts.dense(width, self.chip)
        self.stream = [self.ports.static(4, self.sizes.rows, None) for _ in self.dense]
        west, east = (self.ports.static(4, self.sizes.rows, side) for side in (0, 1))
        self.stream_top = (west, east)  # magnitudes, the larger ones of its vectors
        cache = place_cache(self.geometry, self.memory, self.chip.planes_per_hemisphere)
        state = place_state(self.geometry, self.ports, self.sizes.rows)
        attention = Attention(self.geometry, cache, state, self.ports)
        for side in (0, 1):  # whichever a turn will need
            self.ports.lane_map(side)
        # The head first: its tiles keep the streams full, and get the quads that suit them best.
        stages: dict[str, Callable[[], Section]] = {
            "head": self._head,
            "before": lambda: self._before(attention),
            "attend": lambda: self._attend(attention),
            "after": lambda: self._after(attention),
            "embed": lambda: self._embed(table),
        }
        made: dict[str, Section] = {}
        for i, (name, stage) in enumerate(stages.items()):
            self._tell("schedule", turn * len(stages) + i, turns * len(stages))
            self.memory.clear_scratch(turn, whole=name in ("embed", "head"))
            made[name] = stage()
        return table, cache, made

    def _tell(self, what: str, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(what, done, of)

    # -- sections -------------------------------------------------------------------------------

    def _lowering(
        self, name: str, ops: dict[str, tuple[int, Op]], rows: int, *, layered: bool
    ) -> Lowering:
        builder = SectionBuilder(self.chip, self.memory, self.maps, name)
        low = Lowering(builder, self.constants, self.store, ops, rows, layered=layered)
        low.rope = self.ports.rope
        if self.in_blocks:
            low.grouped = Grouped(low, self.grouped)
        return low

    def _layer_ops(self) -> dict[str, tuple[int, Op]]:
        return {op.out: (i, op) for i, op in enumerate(self.body) if op.kind != "attention"}

    def _know_stream(self, low: Lowering, value: str) -> None:
        low.know(value, self.dense, self.stream)
        if len(self.dense) <= FEW_VECTORS:
            low.know_top(value, self.dense, self.stream_top)
        low.outside[value] = (int((self.dense >= 0).sum()), self.dense)

    def _embed(self, table: EmbeddingTable) -> Section:
        low = self._lowering("embed", {}, self.sizes.rows, layered=False)
        lower = embed_grouped if self.in_blocks else embed
        lower(low, self.model.embed, table, self.ports, self.stream, self.stream_top)
        return low.b.finish()

    def _before(self, attention: Attention) -> Section:
        low = self._lowering("before", self._layer_ops(), self.sizes.rows, layered=True)
        self._know_stream(low, self.model.layers[0].source)
        attention.prepare(low, self.model.layers[0].attention)
        return low.b.finish()

    def _attend(self, attention: Attention) -> Section:
        low = self._lowering("attend", {}, rows_at_once(self.geometry.rows), layered=True)
        attention.attend(low, self.model.layers[0].attention)
        return low.b.finish()

    def _after(self, attention: Attention) -> Section:
        layer = self.model.layers[0]
        low = self._lowering("after", self._layer_ops(), self.sizes.rows, layered=True)
        self._know_stream(low, layer.source)
        attention.finish(low, layer.attention)
        low.words_with_top(layer.output, self.dense, self.stream, self.stream_top)
        return low.b.finish()

    def _head(self) -> Section:
        ops = {op.out: (-2 - i, op) for i, op in enumerate(self.model.head)}
        low = self._lowering("head", ops, self.sizes.rows, layered=False)
        self._know_stream(low, self.model.layers[-1].output)
        layout = layouts.dense(low.width_of(self.model.output), self.chip)
        sources = {param.source for op in self.model.head for param in op.params}
        if self.model.embed.params[0].source in sources:
            self.store.purpose = "table"
        low.words(self.model.output, layout, self.ports.logits(layout))
        self.store.purpose = "weights"
        return low.b.finish()

    # -- the plan -------------------------------------------------------------------------------

    def _plan(self, sections: list[Section]) -> tuple[Run | Loop, ...]:
        g, rows = self.geometry, self.sizes.rows
        per_layer = g.sequences * g.groups
        layer_rows = (("layer", rows),)
        block = rows_at_once(g.rows)
        blocks = g.rows // block
        by_row = (("sequence", g.rows), *((("block", block),) if blocks > 1 else ()))
        strides: dict[int, tuple[tuple[str, int], ...]] = {
            **{
                g.key_base(u): (
                    ("layer", per_layer * g.tile_words(u)),
                    ("sequence", g.groups * g.tile_words(u)),
                    ("group", g.tile_words(u)),
                )
                for u in range(g.units)
            },
            SCALE_BASE: (("layer", per_layer), ("sequence", g.groups), ("group", 1)),
            PLACE_BASE: (("group", 1),),
            ROW_BASE: by_row,
            FIRST_BASE: layer_rows,
        }
        in_loop = {**strides, FIRST_BASE: (*layer_rows, *by_row)}
        embed_run = Run(0)
        before, after = (Run(i, self._bases(sections[i], strides)) for i in (1, 3))
        attend = Run(2, self._bases(sections[2], in_loop))
        groups = Loop("group", "groups", (attend,), by="sequence")
        rows_of = Loop("block", blocks, (groups,)) if blocks > 1 else groups
        layer = (before, Loop("sequence", self.sizes.sequences, (rows_of,)), after)
        return (embed_run, Loop("layer", len(self.model.layers), layer), Run(4))

    # -- contents -------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Make the bytes of every weight and constant, op by op."""
        count = len(self.model.layers)
        once = [fill for fill in self.store.fills if fill.place < 0]
        layered = [fill for fill in self.store.fills if fill.place >= 0]
        for i, op in enumerate(self.once):
            mine = [fill for fill in once if fill.place == -1 - i]
            if mine:
                tensors = self._tensors(op)
                for fill in mine:
                    data = fill.build(tensors if fill.what != "weights" else tensors["weight"])
                    for k, (s, word) in enumerate(zip(fill.slices, fill.words, strict=True)):
                        self.memory.put(s, word, data[k], fill.what)
        for number, layer in enumerate(self.model.layers):
            self._tell("pack layers", number, count)
            for i, op in enumerate((*layer.before, layer.attention, *layer.after)):
                mine = [fill for fill in layered if fill.place == i]
                if mine:
                    tensors = self._tensors(op)
                    for fill in mine:
                        data = fill.build(tensors if fill.what != "weights" else tensors["weight"])
                        for k, (s, word) in enumerate(zip(fill.slices, fill.words, strict=True)):
                            self.memory.put_layer("weights", number, s, word, data[k], fill.what)

    def _tensors(self, op: Op) -> dict[str, NDArray[Any]]:
        """weight int8 [N, K] and scale [N] of an op's matrices, bias [N], gain; of weights in
        blocks scale and minimum [N, groups], minima of 0 where some have none."""
        if op.kind == "rmsnorm":
            gain = self.source.whole(op.params[0])
            assert isinstance(gain, F32Tensor)
            return {"gain": gain.value}
        weights, biases = weights_and_biases(op) if op.kind == "linear" else ((0,), ())
        tensors = [self.source.whole(op.params[i]) for i in weights]
        found: dict[str, NDArray[Any]] = {}
        known = [tensor for tensor in tensors if isinstance(tensor, RowTensor | GroupedTensor)]
        if len(known) < len(tensors):
            raise UnsupportedModel("the chip takes integer weights; use precision w8 or w4")
        found["weight"] = np.concatenate([tensor.q for tensor in known])
        found["scale"] = np.concatenate([tensor.scale for tensor in known])
        if self.in_blocks:
            minima = [getattr(tensor, "minimum", None) for tensor in known]
            found["minimum"] = np.concatenate(
                [
                    np.zeros_like(tensor.scale) if minimum is None else minimum
                    for tensor, minimum in zip(known, minima, strict=True)
                ]
            )
        if biases:
            values = [self.source.whole(op.params[i]) for i in biases]
            found["bias"] = np.concatenate([v.value for v in values if isinstance(v, F32Tensor)])
        return found

    def _meta(self, table: EmbeddingTable, cache: Any) -> dict[str, Any]:
        """What the host needs to know to drive the program."""
        g = self.geometry
        keys, scales = self.ports.entries()
        return {
            "model": self.graph.name,
            "rows": self.sizes.rows,
            "sequences": self.sizes.sequences,
            "context": self.sizes.context,
            "layers": len(self.model.layers),
            "vocabulary": table.vocabulary,
            "windows": [layer.attention.integer("window", 0) for layer in self.model.layers],
            "chunk": g.chunk,
            "groups": g.groups,
            "chunks_per_group": g.chunks_per_group,
            "tiles_per_chunk": g.tiles_per_chunk,
            "tile_words": [g.tile_words(u) for u in range(g.units)],
            "key_entries": keys,
            "scale_entries": scales,
            "head_dim": g.head_dim,
            "table": {
                "rows_per_slice": table.rows_per_slice,
                "slices": len(table.slices),
                "vectors": table.vectors,
                "scale_tokens": table.scale_tokens,
                "scale_words": table.scale_words,
                "scale_slices": table.scales[0].width,
            },
            "rope": {
                "turns": [f"{turn:016x}" for turn in self.graph.rope.turns],
                "magnitude": float(self.graph.rope.magnitude).hex(),
            },
        }

    def _bases(
        self, section: Section, strides: Mapping[int, tuple[tuple[str, int], ...]]
    ) -> tuple[Base, ...]:
        """The base registers that a section uses and that a run loads."""
        used = {
            (issue.queue, issue.args[2])
            for issue in section.issues
            if issue.op in ("read", "write", "scatter", "gather")
        }
        found = []
        for s, reg in sorted(used):
            if reg in (LAYER_BASE, UPPER_LAYER_BASE):
                bank = int(reg == UPPER_LAYER_BASE)
                stride = self.memory.layer_stride("weights", s, bank)
                found.append(Base(s, reg, 0, (("layer", stride),)))
            elif reg in strides:
                found.append(Base(s, reg, 0, strides[reg]))
        return tuple(found)
