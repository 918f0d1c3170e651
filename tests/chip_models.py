"""In: a seed. Out: a small random model for the chip `tiny`, and steps to drive it through."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import FAMILIES, SCALINGS, in_blocks, random_model, stages

from openlpu.asm.container import program_sha256
from openlpu.chip import load_chip
from openlpu.graph import Batch, Graph, Param, RowTensor, Tensor, TensorSource
from openlpu.load.weights import Weights
from openlpu.passes.recipe import Materializer
from openlpu.passes.rewrite import with_attrs, with_ops
from openlpu.schedule.build import Sizes, build_program

TINY = load_chip("tiny")
STAGES = {
    "w8": ("quantize_w8", "fuse_qkv", "fuse_attention", "fuse_gate_up", "fuse_norm_quant"),
    "w4": ("quantize_blocks", "fuse_qkv", "fuse_attention", "fuse_gate_up", "fuse_norm_quant"),
}
LAST_STAGE = "fuse_residual"
_MOST_STEPS = 16  # to the first position that is compared
_FAR_STEPS = 130  # the same, for the few cases that go far
_LARGE = 0.1  # of the cases have more heads and wider rows
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """All that a run depends on; printed when it fails. start: the position to reach before rows
    are drawn at random."""

    seed: int
    family: str
    precision: str
    stage: str
    chunk: int
    sizes: Sizes
    start: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per(self) -> int:
        """Rows of one sequence."""
        return self.sizes.rows // self.sizes.sequences

    @property
    def vocabulary(self) -> int:
        return int(self.options["vocab_size"])


def random_case(seed: int) -> Case:
    """Every family in turn; sizes, stage, chunk and rows at random."""
    rng = random.Random(f"case {seed}")
    family = sorted(FAMILIES)[seed % len(FAMILIES)]
    precision = "w4" if rng.random() < 0.1 else "w8"
    rows = rng.choice((1, 1, 1, 2, 3, 4))
    sequences = rng.choice([n for n in range(1, rows + 1) if rows % n == 0])
    chunk = rng.choice((64, 64, 64, 128, 192, 256, 320))
    context, start = _reach(rng, chunk, rows // sequences)
    return Case(
        seed,
        family,
        precision,
        rng.choice((*STAGES[precision], LAST_STAGE, LAST_STAGE)),
        chunk,
        Sizes(rows, sequences, context),
        start,
        _options(rng, family, context, multiple=32 if precision == "w4" else 16),
    )


def reach_of(chunk: int, context: int) -> int:
    """Positions of a group of chunks: a tile of as many positions as there are lanes in each plane,
    or one chunk if that has more tiles."""
    tiles = -(-chunk // TINY.lanes)
    return chunk * max(1, min(TINY.planes // tiles, -(-context // chunk)))


def _reach(rng: random.Random, chunk: int, per: int) -> tuple[int, int]:
    """A context, and a position in it, mostly short of where a tile, chunk or group ends."""
    far = rng.random() < 0.15
    most = per * (_FAR_STEPS if far else _MOST_STEPS)
    group = reach_of(chunk, 1 << 20)
    edges = sorted({0, TINY.lanes, 3 * TINY.lanes, chunk, 2 * chunk, group, 2 * group, 3 * group})
    edges = [edge for edge in edges if edge <= most]
    edge = rng.choice(edges[-2:] if far else [*edges, *edges[-2:]])
    start = max(0, edge - rng.randint(0, 2 * per))
    context = start + rng.choice((2, 8, 40, 200)) + rng.randint(0, 30)
    return max(context, rng.choice((1, 1, chunk + 1))), start


def _options(rng: random.Random, family: str, context: int, *, multiple: int) -> dict[str, Any]:
    """Sizes of a model, and the options that its family has."""
    large = rng.random() < _LARGE
    kv_heads = rng.choice((1, 2, 3) if large else (1, 1, 2))
    share = rng.choice((1, 2, 3) if large else (1, 1, 2))
    head_dim = rng.choice((multiple, 32))
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
    config, weights = random_model(case.family, seed=case.seed, **case.options)
    if case.precision == "w4":
        weights = _in_blocks(case, weights)
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
    return program_sha256(build_program(model.graph, model.source, TINY, case.sizes))


def differing(a: F32, b: F32) -> int:
    """How many numbers differ in their bits, NaNs being equal."""
    both_nan = np.isnan(a) & np.isnan(b)
    return int(((a.view(np.int32) != b.view(np.int32)) & ~both_nan).sum())
