"""In: a seed. Out: a small random model for a chip like `tiny`, and steps to drive it through."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import FAMILIES, SCALINGS, in_blocks, random_model, stages

from openlpu.asm.container import program_sha256
from openlpu.check import check
from openlpu.chip import Chip, Latency, Region, load_chip
from openlpu.graph import Batch, Graph, Param, RowTensor, Tensor, TensorSource
from openlpu.load.weights import Weights
from openlpu.numerics import GROUP, SUPERLANE
from openlpu.passes.recipe import Materializer
from openlpu.passes.rewrite import with_attrs, with_ops
from openlpu.program import Program, Run
from openlpu.schedule.build import Sizes, build_program
from openlpu.schedule.layout import Maps
from openlpu.schedule.memory import Buffer, Memory
from openlpu.schedule.section import SectionBuilder
from openlpu.sim.step import Step

TINY = load_chip("tiny")
# Every part of the compiler that counts lanes, planes, slices or cycles, in other numbers.
CHIPS: dict[str, Chip] = {
    "tiny": TINY,
    "superlanes 4": replace(TINY, superlanes=4),
    "superlanes 3": replace(TINY, superlanes=3),  # offsets fill part of a vector
    "superlanes 6": replace(TINY, superlanes=6),  # a chunk of 64 fills part of a tile
    "planes 2": replace(TINY, planes_per_hemisphere=1),
    "slices 48": replace(  # enough for a quad without weights
        TINY, planes_per_hemisphere=1, slices_per_hemisphere=24
    ),
    "regions": replace(
        TINY,
        regions=(
            Region("hot", ("state",), 0, 500),
            Region("kept", ("context",), 500, 700),  # in both banks
            Region("rest", ("weights",), 1200, 848),
        ),
    ),
    "slow": replace(
        TINY,
        history_cycles=48,
        latency=Latency(
            mem_read=5,
            mem_write=3,
            base_load=2,
            mxm_load=2,
            mxm_install=3,
            mxm_dot=17,
            mxm_out=2,
            alu_int=2,
            alu_mul=4,
            alu_float=5,
            alu_convert=3,
            alu_divide=23,
            sxm_superlane=3,
            sxm_across=7,
            sxm_transpose=20,
        ),
    ),
}
STAGES = {
    "w8": ("quantize_w8", "fuse_qkv", "fuse_attention", "fuse_gate_up", "fuse_norm_quant"),
    "w4": ("quantize_blocks", "fuse_qkv", "fuse_attention", "fuse_gate_up", "fuse_norm_quant"),
}
LAST_STAGE = "fuse_residual"
_MOST_STEPS = 16  # to the first position that is compared
_FAR_STEPS = 130  # the same, for the few cases that go far
_LARGE = 0.05  # of the cases have more heads and wider rows
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Case:
    """All that a run depends on; printed when it fails. start: the position to reach before rows
    are drawn at random."""

    seed: int
    chip_name: str  # in CHIPS
    family: str
    precision: str
    stage: str
    chunk: int
    sizes: Sizes
    start: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def per(self) -> int:
        """Rows of one sequence."""
        return self.sizes.rows // self.sizes.sequences

    @property
    def vocabulary(self) -> int:
        return int(self.options["vocab_size"])


def random_case(seed: int) -> Case:
    """Every family in turn; chip, sizes, stage, chunk and rows at random."""
    rng = random.Random(f"case {seed}")
    family = sorted(FAMILIES)[seed % len(FAMILIES)]
    chip_name = "tiny" if rng.random() < 0.6 else rng.choice(list(CHIPS))
    chip = CHIPS[chip_name]
    precision = "w4" if chip.lanes % GROUP == 0 and rng.random() < 0.1 else "w8"
    rows = rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3, 4))
    sequences = rng.choice([n for n in range(1, rows + 1) if rows % n == 0])
    chunk = rng.choice((64, 64, 64, 64, 64, 64, 128, 128, 192, 256, 320))
    context, start = _reach(rng, chip, chunk, rows // sequences)
    return Case(
        seed,
        chip_name,
        family,
        precision,
        rng.choice((*STAGES[precision], LAST_STAGE, LAST_STAGE)),
        chunk,
        Sizes(rows, sequences, context),
        start,
        _options(rng, family, chip, context, multiple=GROUP if precision == "w4" else SUPERLANE),
    )


def reach_of(chip: Chip, chunk: int, context: int) -> int:
    """Positions of a group of chunks: a tile of as many positions as there are lanes in each plane,
    or one chunk if that has more tiles."""
    tiles = -(-chunk // chip.lanes)
    return chunk * max(1, min(chip.planes // tiles, -(-context // chunk)))


def _reach(rng: random.Random, chip: Chip, chunk: int, per: int) -> tuple[int, int]:
    """A context, and a position in it, mostly short of where a tile, chunk or group ends."""
    far = rng.random() < 0.15
    most = per * (_FAR_STEPS if far else _MOST_STEPS)
    group, lanes = reach_of(chip, chunk, 1 << 20), chip.lanes
    edges = sorted({0, lanes, 3 * lanes, chunk, 2 * chunk, group, 2 * group, 3 * group})
    edges = [edge for edge in edges if edge <= most]
    edge = rng.choice(edges[-2:] if far else [*edges, *edges[-2:]])
    start = max(0, edge - rng.randint(0, 2 * per))
    context = start + rng.choice((2, 8, 40, 200)) + rng.randint(0, 30)
    return max(context, rng.choice((1, 1, chunk + 1))), start


def _options(
    rng: random.Random, family: str, chip: Chip, context: int, *, multiple: int
) -> dict[str, Any]:
    """Sizes of a model, and the options that its family has."""
    large = rng.random() < _LARGE
    kv_heads = rng.choice((1, 2, 3) if large else (1, 1, 1, 2))
    share = rng.choice((1, 2, 3) if large else (1, 1, 2))
    head_dim = rng.choice([dim for dim in (multiple, 32) if dim <= chip.lanes])
    window = rng.choice((1, rng.randint(2, 40), rng.randint(30, 100), 2 * context))
    layers = rng.choice((1, 1, 1, 2, 3))
    given: dict[str, Any] = {
        "vocab_size": rng.randint(3, 70 if large else 40),
        "hidden_size": multiple * rng.randint(1, (96 if large else 48) // multiple),
        "intermediate_size": multiple * rng.randint(1, (128 if large else 64) // multiple),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * share,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": rng.random() < 0.4,
        "rms_norm_eps": rng.choice((1e-5, 1e-6, 0.01)),
    }
    if rng.random() < 0.5:
        given["rope_scaling"] = SCALINGS[rng.choice(sorted(SCALINGS))]
    if family in ("llama", "smollm2"):
        given["attention_bias"] = rng.random() < 0.5
        given["mlp_bias"] = rng.random() < 0.5
    if family == "mistral":
        given["sliding_window"] = rng.choice((None, window, window))
    if family == "qwen2_window":
        given |= {"sliding_window": window, "max_window_layers": rng.randrange(layers)}
    return given


@dataclass(frozen=True)
class Model:
    """What a case is compiled from."""

    graph: Graph
    source: TensorSource


def model_of(case: Case) -> Model:
    """The case's graph, with its chunk in every attention, and its tensors."""
    config, floats = random_model(case.family, seed=case.seed, **case.options)
    weights = _in_blocks(case, floats) if case.precision == "w4" else floats
    graph = stages(config, weights, case.precision)[case.stage]
    return Model(with_chunk(graph, case.chunk), Materializer(weights))


def _in_blocks(case: Case, weights: Weights) -> Weights:
    """Matrices in blocks of one kind, or of a kind for each matrix of a layer."""
    rng = random.Random(f"blocks {case.seed}")
    names = [name.split(".")[-1] for name in weights.names()]
    kinds = rng.sample(("q4_0", "q4_1", "q8_0"), 3)[: rng.randint(1, 3)]
    kind_of = {name: rng.choice(kinds) for name in sorted(set(names))}
    return in_blocks(weights, [kind_of[name] for name in names])


def with_chunk(graph: Graph, chunk: int) -> Graph:
    """The graph with chunks of so many positions."""
    ops = (with_attrs(op, chunk=chunk) if op.kind == "attention" else op for op in graph.ops)
    return with_ops(graph, ops)


class PoisonedToken(Materializer):
    """Tensors in which the embedding of one token is infinite."""

    def __init__(self, weights: Weights, token: int) -> None:
        super().__init__(weights)
        self._token = token

    def whole(self, param: Param) -> Tensor:
        tensor = super().whole(param)
        if param.source != "embed":
            return tensor
        assert isinstance(tensor, RowTensor)
        scale = tensor.scale.copy()
        scale[self._token] = np.inf
        return replace(tensor, scale=scale)


def batch_of(rows: list[tuple[int, int, int]], wanted: list[int], sequences: int) -> Batch:
    """A Batch of rows (slot, position, token)."""
    table = np.array(rows, np.int32).reshape(-1, 3)
    pages = np.zeros((sequences, 1), np.int32)
    slots, positions, tokens = (np.ascontiguousarray(column) for column in table.T)
    return Batch(tokens, positions, slots, np.array(wanted, np.int32), pages)


def batches(case: Case, *, steps: int = 6) -> Iterator[Batch]:
    """Full steps up to the case's start, of which only the last row is wanted; then steps of any
    number of rows of any sequence, a few of which go back."""
    rng = random.Random(f"batches {case.seed}")
    lengths = [0] * case.sizes.sequences
    while min(lengths) < case.start:
        counts = [min(case.per, case.start - length) for length in lengths]
        yield _step(rng, case, lengths, counts, alone=True)
    for _ in range(steps):
        for slot, length in enumerate(lengths):
            if rng.random() < 0.1:
                lengths[slot] = rng.randint(0, length)
        counts = [rng.randint(0, case.per) for _ in lengths]
        if not any(counts):
            counts[rng.randrange(len(counts))] = 1
        counts = [
            min(count, case.sizes.context - length)
            for count, length in zip(counts, lengths, strict=True)
        ]
        if any(counts):
            yield _step(rng, case, lengths, counts, alone=False)


def _step(
    rng: random.Random, case: Case, lengths: list[int], counts: list[int], *, alone: bool
) -> Batch:
    """The next rows of each sequence, sequences mixed; lengths move on."""
    waiting = [
        [(slot, lengths[slot] + i, rng.randrange(case.vocabulary)) for i in range(count)]
        for slot, count in enumerate(counts)
    ]
    rows = []
    while any(waiting):
        rows.append(rng.choice([some for some in waiting if some]).pop(0))
    for slot, count in enumerate(counts):
        lengths[slot] += count
    wanted = [len(rows) - 1] if alone else [i for i in range(len(rows)) if rng.random() < 0.8]
    return batch_of(rows, wanted, case.sizes.sequences)


def digest(seed: int) -> str:
    """The sha256 of a case's program."""
    case = random_case(seed)
    model = model_of(case)
    return program_sha256(build_program(model.graph, model.source, case.chip, case.sizes))


def differing(a: F32, b: F32) -> int:
    """How many numbers differ in their bits, NaNs being equal."""
    both_nan = np.isnan(a) & np.isnan(b)
    return int(((a.view(np.int32) != b.view(np.int32)) & ~both_nan).sum())


class Bench:
    """One section of a chip, and vectors that lie in its scratch when it begins."""

    def __init__(self, chip: Chip, *, scratch_words: int = 256) -> None:
        self.chip = chip
        self.memory = Memory(chip, layers=1, scratch_words=scratch_words)
        self.builder = SectionBuilder(chip, self.memory, Maps(chip), "bench")
        self.builder.tag("bench")
        self._held: list[tuple[Buffer, I32]] = []

    def room(
        self, width: int, count: int, *, side: int | None = None, outer: bool = False
    ) -> Buffer:
        return self.memory.scratch(width, count, hemisphere=side, outer=outer)

    def hold(
        self, values: I32, width: int = 4, *, side: int | None = None, outer: bool = False
    ) -> Buffer:
        """A buffer with the low bytes of int32 [count, lanes]."""
        buffer = self.room(width, len(values), side=side, outer=outer)
        self.hold_at(buffer, values)
        return buffer

    def hold_at(self, buffer: Buffer, values: I32) -> None:
        """The same, in a buffer that has room for them."""
        self._held.append((buffer, values))

    def run(self, *buffers: Buffer) -> list[I32]:
        """Finish the section, check and run it; what then lies in the buffers, sign-extended."""
        program = Program(
            self.chip.name,
            (self.builder.finish(),),
            (Run(0),),
            (),
            self.builder.maps.table(),
            self.memory.image(),
            (),
            tuple(self.memory.used),
        )
        check(program, self.chip)
        step = Step(program, self.chip)
        for buffer, values in self._held:
            split = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 4)
            for b, place in enumerate(_places(buffer)):
                step.memory[place] = split[:, :, b]
        assert step.run({}).cycles == program.sections[0].cycles
        found = []
        for buffer in buffers:
            words = np.zeros((buffer.count, self.chip.lanes), np.uint32)
            for b, place in enumerate(_places(buffer)):
                words |= step.memory[place].astype(np.uint32) << np.uint32(8 * b)
            found.append(cut_to(words.view(np.int32), buffer.width))
        return found


def _places(buffer: Buffer) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for s, word in zip(buffer.slices, buffer.words, strict=True):
        yield s, word + np.arange(buffer.count) * buffer.step


def cut_to(words: I32, width: int) -> I32:
    """The low bytes, sign-extended."""
    unused = np.int32(32 - 8 * width)
    cut: I32 = (words << unused) >> unused
    return cut


def random_words(rng: np.random.Generator, count: int, lanes: int) -> I32:
    """Any bits, floats of all sizes, small integers, and what is easily forgotten."""
    whole = rng.integers(-(2**31), 2**31, (count, lanes)).astype(np.int32)
    floats = (rng.standard_normal((count, lanes)) * 10.0 ** rng.integers(-3, 9)).astype(np.float32)
    special = np.array(
        [0, -1, 1, -(1 << 31), 0x7F800000, 0x7FC00000, -(1 << 23), 1 << 23], np.int32
    )
    kinds = (
        whole,
        floats.view(np.int32),
        whole % np.int32(200),
        special[rng.integers(0, len(special), (count, lanes))],
    )
    return np.choose(rng.integers(0, 4, (count, lanes)), kinds).astype(np.int32)
