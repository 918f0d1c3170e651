"""In: random models of every family. Out: the host engine's bits are the reference's bits."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openlpu import jit
from openlpu.engine.compiled import Compiled, compile_weights
from openlpu.engine.families import FAMILIES, random_model, random_weights
from openlpu.errors import GraphError, RequestError, UnsupportedTarget
from openlpu.graph import Batch, Param, Tensor
from openlpu.host import HostModel, build
from openlpu.host.codegen import build_ir
from openlpu.host.layout import APART_ROWS, MAX_ROWS
from openlpu.host.plan import make_plan
from openlpu.load.config import ModelConfig
from openlpu.load.weights import Tensor as StoredTensor
from openlpu.load.weights import Weights
from openlpu.passes.recipe import Materializer
from openlpu.store import Store

VOCABULARY = 272
KERNELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in jit.available(), reason=f"this processor has no {name}"
        ),
    )
    for name in ("amx", "avx512", "avx2", "plain")
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def batch(rows: Sequence[tuple[int, int, int]], *, wanted: Sequence[int] | None = None) -> Batch:
    """rows of (token, position, slot); 16 pages for each of 40 slots."""
    tokens, positions, slots = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    keep = range(len(rows)) if wanted is None else wanted
    pages = np.arange(40 * 16, dtype=np.int32).reshape(40, 16)
    return Batch(tokens, positions, slots, np.array(keep, np.int32), pages)


def prompt(length: int, *, slot: int = 0, seed: int = 0) -> list[tuple[int, int, int]]:
    tokens = np.random.default_rng((seed, slot)).integers(0, VOCABULARY, length)
    return [(int(token), position, slot) for position, token in enumerate(tokens)]


def host_of(compiled: Compiled, store: Store, **options: Any) -> HostModel:
    return compiled.host(store=store, pages=40 * 16, **options)


def same_bits(got: np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(
        np.ascontiguousarray(got).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


def block_model(family: str, encoding: str, config: ModelConfig | None = None) -> Compiled:
    """A random model whose matrices are stored in blocks, as a GGUF file of that type has them."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    # Every K is a multiple of 32.
    config = config or replace(FAMILIES[family], dim=96, head_dim=32)
    plain = random_weights(config)
    tensors: dict[str, StoredTensor] = {}
    for name in plain.names():
        value = plain.rows(name)
        if value.ndim == 1:
            tensors[name] = StoredTensor(value.shape, "f32", value[None].view(np.uint8))
            continue
        # The table is in another type, as llama.cpp's own files have it.
        kept = "q8_0" if name == "embed" else encoding
        data = quantize(value, GGMLQuantizationType[kept.upper()])
        tensors[name] = StoredTensor(value.shape, kept, data)
    weights = Weights(tensors, fingerprint=f"{family}-{encoding}")
    return compile_weights(config, weights, precision="w4")


def tile_model(precision: str) -> Compiled:
    """A random model whose every K is a multiple of 64, a tile's; with biases."""
    config = replace(FAMILIES["qwen2"], dim=192, ffn_dim=320, head_dim=64)
    if precision == "w8":
        return random_model("qwen2", config=config)
    return block_model("qwen2", precision, config)


@pytest.mark.parametrize("precision", ["w8", "q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_host_equals_reference(family: str, precision: str, kernels: str, store: Store) -> None:
    """One row, few rows, register-block tails, several chunks of attention, mixed sequences."""
    compiled = random_model(family) if precision == "w8" else block_model(family, precision)
    reference = compiled.reference()
    rows = prompt(410)
    steps = [batch(rows[:1]), batch(rows[1:6]), batch(rows[6:31]), batch(rows[31:])]
    decode = [
        (token, position, slot)
        for slot in range(1, 14)
        for token, position, _ in prompt(2, slot=slot)
    ]
    steps.append(batch(decode, wanted=[1, 5, 25]))
    steps.append(batch([(7, 410, 0), (9, 2, 3)]))
    with closing(host_of(compiled, store, kernels=kernels, threads=2)) as host:
        for step in steps:
            assert same_bits(host.step(step), reference.step(step))


@pytest.mark.skipif("amx" not in jit.available(), reason="this processor has no amx")
@pytest.mark.parametrize("precision", ["w8", "q4_0", "q4_1", "q8_0"])
def test_tiles_of_any_number_of_rows(precision: str, store: Store) -> None:
    """Tiles that are full, and such that have rows of nobody; gate and up, residuals, biases."""
    compiled = tile_model(precision)
    reference = compiled.reference()
    with closing(host_of(compiled, store, kernels="amx", threads=2)) as host:
        for slot, rows in enumerate((4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 130)):
            step = batch(prompt(rows, slot=slot))
            assert same_bits(host.step(step), reference.step(step)), rows


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_keeps_the_bits_on_the_host(family: str, store: Store) -> None:
    """The unfused graphs run too, and each fusion leaves every bit."""
    compiled = random_model(family)
    names = [name for name, _ in compiled.stages]
    quantized = compiled.stages[names.index("quantize_w8") :]
    step, tail = batch(prompt(37)), batch(prompt(39)[37:])
    expected: list[np.ndarray] = []
    for name, graph in quantized:
        source = Materializer(compiled.weights)
        with closing(
            build(graph, source, store=store, key=f"{family}-{name}", threads=1, pages=640)
        ) as host:
            got = [host.step(step), host.step(tail)]
        expected = expected or got
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), name


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 16), (6, 2, 48), (8, 1, 64), (14, 1, 32)]
)
def test_windows_of_whole_pages_and_edges(
    heads: int, kv_heads: int, head_dim: int, store: Store
) -> None:
    """Windows that begin and end anywhere in a page and a chunk, and every shape of a tile: one
    head to a key, a few, as many as registers hold, and more."""
    known = FAMILIES["mistral"]
    config = replace(known, heads=heads, kv_heads=kv_heads, head_dim=head_dim, windows=(150, 213))
    compiled = random_model("mistral", config=config)
    rows = prompt(700)
    steps = [batch(rows[:512], wanted=range(0, 512, 3)), batch(rows[512:600]), batch(rows[600:601])]
    reference = compiled.reference()
    with closing(host_of(compiled, store, threads=2)) as host:
        for step in steps:
            assert same_bits(host.step(step), reference.step(step))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])  # a window; one K/V head
def test_neighbours_at_any_distance(family: str, threads: int, store: Store) -> None:
    """Rows that stand side by side in a step see different chunks: pieces of several prompts,
    single rows of long contexts among them, in any order."""
    compiled = random_model(family)
    reference = compiled.reference()
    rng = np.random.default_rng(3)
    known = dict.fromkeys(range(4), 0)
    with closing(host_of(compiled, store, threads=threads)) as host:
        for step in range(9):
            rows: list[tuple[int, int, int]] = []
            for slot in rng.permutation(len(known)).tolist():
                room = min(512 - len(rows), 1000 - known[slot])
                count = min(int(rng.choice([0, 1, 2, 40, 250])), room)
                tokens = rng.integers(0, VOCABULARY, count).tolist()
                rows += [(token, known[slot] + i, slot) for i, token in enumerate(tokens)]
                known[slot] += count
            if rows:
                got, expected = (side.step(batch(rows)) for side in (host, reference))
                assert same_bits(got, expected), step
    assert max(known.values()) > 2 * 320  # several chunks


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])  # a window; one K/V head
def test_threads_share_the_chunks_of_a_long_context(family: str, store: Store) -> None:
    """Few rows far from the beginning: one, drafts, several sequences, more threads than chunks."""
    compiled = random_model(family)
    reference = compiled.reference()
    long, short = prompt(1000), prompt(400, slot=2)
    before = [batch(long[:512]), batch(long[512:]), batch(short)]
    steps = [
        batch([(1, 1000, 0)]),
        batch([(2, 1001, 0), (3, 1002, 0), (4, 1003, 0)]),
        batch([(5, 1004, 0), (6, 0, 1), (7, 400, 2)]),
        batch([(8, 1005 + i, 0) for i in range(APART_ROWS)]),
        batch([(9, 401, 2), *((10, 1 + i, 1) for i in range(APART_ROWS))]),  # one row too many
    ]
    expected = [reference.step(step) for step in (*before, *steps)][len(before) :]
    for threads in (1, 2, 3, 7):
        with closing(host_of(compiled, store, threads=threads)) as host:
            for step in before:
                host.step(step)
            for step, logits in zip(steps, expected, strict=True):
                assert same_bits(host.step(step), logits)


def test_threads_batches_and_pieces_do_not_change_a_bit(store: Store) -> None:
    """A row is alone: whatever stands beside it, in any pieces, on any number of threads."""
    compiled = random_model("qwen3")
    rows = prompt(90)
    with closing(host_of(compiled, store, threads=1)) as host:
        expected = host.step(batch(rows))[-1]
    for threads in (1, 2, 3):
        with closing(host_of(compiled, store, threads=threads)) as host:
            for piece in (1, 7, 64):
                for start in range(0, 90, piece):
                    got = host.step(batch(rows[start : start + piece]))
                assert same_bits(got[-1], expected), (threads, piece)
            for others in (1, 6, 31):
                neighbours = [row for slot in range(1, others + 1) for row in prompt(3, slot=slot)]
                host.step(batch(rows[:89]))
                mixed = sorted([*neighbours, rows[89]], key=lambda row: (row[2] * 7 % 41, row[1]))
                got = host.step(batch(mixed))
                assert same_bits(got[mixed.index(rows[89])], expected), (threads, others)


class Untouchable:
    """A TensorSource that must not be read."""

    def blocks(self, param: Param) -> Iterator[Tensor]:
        raise AssertionError(f"{param.name} was read although the cache has it")

    def whole(self, param: Param) -> Tensor:
        raise AssertionError(f"{param.name} was read although the cache has it")


def test_a_warm_start_reads_no_weights_and_gives_the_same_bits(tmp_path: Path) -> None:
    compiled = random_model("llama")
    store = Store(tmp_path)
    step = batch(prompt(20))
    with closing(host_of(compiled, store)) as host:
        expected, identity = host.step(step), host.identity
    with closing(
        build(compiled.graph, Untouchable(), store=store, key=compiled.key, pages=640)
    ) as host:
        assert same_bits(host.step(step), expected)
        assert host.identity == identity


@pytest.mark.parametrize("damage", ["truncate", "empty", "header", "magic", "weight"])
def test_a_damaged_cache_is_packed_anew(damage: str, tmp_path: Path) -> None:
    compiled = random_model("llama")
    store = Store(tmp_path)
    step = batch(prompt(20))
    with closing(host_of(compiled, store)) as host:
        expected = host.step(step)
    path = store.get("pack", compiled.key)
    assert path is not None
    data = bytearray(path.read_bytes())
    if damage in ("truncate", "empty"):
        del data[len(data) // 2 if damage == "truncate" else 0 :]
    else:
        data[{"magic": 3, "header": -9, "weight": len(data) // 3}[damage]] ^= 0x40
    path.write_bytes(data)
    for kernels in store.root.glob("kernels/*"):
        kernels.write_bytes(kernels.read_bytes()[:-1])
    with closing(host_of(compiled, store)) as host:
        assert same_bits(host.step(step), expected)


def test_packing_is_reproducible(tmp_path: Path) -> None:
    files = []
    for run in range(2):
        store = Store(tmp_path / str(run))
        with closing(host_of(random_model("mistral"), store, threads=run + 1)) as host:
            path = store.get("pack", random_model("mistral").key)
            assert path is not None
            files.append((path.read_bytes(), host.identity))
    assert files[0] == files[1]


def test_steps_outside_the_rules_are_refused(store: Store) -> None:
    """Generated code checks nothing, so the step must."""
    with closing(host_of(random_model("llama"), store)) as host:
        for rows, what in (
            ([(VOCABULARY, 0, 0)], "vocabulary"),
            ([(-1, 0, 0)], "vocabulary"),
            ([(1, -1, 0)], "position"),
            ([(1, 0, 40)], "slot"),
            ([(1, 16 * 64, 0)], "page"),
            ([(1, p, 0) for p in range(MAX_ROWS + 1)], "rows"),
        ):
            with pytest.raises(RequestError, match=what):
                host.step(batch(rows))
        with pytest.raises(RequestError, match="wanted"):
            host.step(batch(prompt(3), wanted=[3]))
        step = batch(prompt(3))
        with pytest.raises(RequestError, match="pool"):
            host.step(Batch(step.tokens, step.positions, step.slots, step.wanted, step.pages + 640))


def test_the_pool_grows_and_keeps_what_it_holds(store: Store) -> None:
    compiled = random_model("llama")
    rows = prompt(70)
    with closing(host_of(compiled, store)) as host:
        expected = host.step(batch(rows))[-1]
    with closing(compiled.host(store=store, pages=1)) as host:
        pages = np.array([[0, 3]], np.int32)
        arrays = [np.array(column, np.int32) for column in zip(*rows, strict=True)]
        host.step(Batch(*(a[:60] for a in arrays), np.zeros(0, np.int32), pages))
        host.grow(4)
        got = host.step(Batch(*(a[60:] for a in arrays), np.array([9], np.int32), pages))
        assert same_bits(got[0], expected)


def test_float_graphs_and_unknown_targets_are_refused_by_name() -> None:
    with pytest.raises(GraphError, match="floating point"):
        make_plan(random_model("llama").float_graph, 1)
    with pytest.raises(UnsupportedTarget, match="plain"):
        jit.select("sse9")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM targets this machine alone")
@pytest.mark.parametrize(("precision", "product"), [("w8", "tdpbsud"), ("q4_1", "tdpbssd")])
def test_tile_kernels_compile_where_there_are_no_tiles(precision: str, product: str) -> None:
    compiled = tile_model(precision)
    text = build_ir(make_plan(compiled.graph, 2).specs, jit.TARGETS["amx"])
    assert product in text
    assert jit.compile_ir(text, jit.TARGETS["amx"])


@pytest.mark.skipif("amx" not in jit.available(), reason="this processor has no amx")
def test_tiles_that_the_system_refuses_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_may_use_tiles", lambda: False)
    jit.available.cache_clear()
    try:
        assert jit.select("auto").name == "avx512"
        with pytest.raises(UnsupportedTarget, match="cannot run the amx kernels"):
            jit.select("amx")
    finally:
        monkeypatch.undo()
        jit.available.cache_clear()


def test_an_overflow_is_all_nan_and_spares_the_neighbours(store: Store) -> None:
    """A row that leaves the finite range says so; the step's other rows keep their bits."""
    compiled = random_model("llama")
    with closing(host_of(compiled, store)) as host:
        good = host.step(batch(prompt(5)))
        layer = next(op for op in compiled.graph.ops if op.kind == "embed")
        piece = host._packed.pieces[layer.out]
        weights = host._packed.data
        weights.flags.writeable = True
        weights[piece.scales + 4 * 3 : piece.scales + 4 * 4].view(np.float32)[0] = 3e38
        assert np.isnan(host.step(batch([(3, 0, 0)]))).all()
        got = host.step(batch([(3, 0, 1), *prompt(5)], wanted=range(1, 6)))
        assert same_bits(got, good)


def test_buffers_are_not_reused_before_a_barrier() -> None:
    """No task may write a slot that a task since the last barrier still reads."""
    from openlpu.host.layout import Barrier

    plan = make_plan(random_model("qwen2").graph, 2)
    reading: set[int] = set()
    for task in plan.tasks:
        written = plan.place.get(task.args[0].name)
        sources = {plan.place[a.name] for a in task.args[1:] if a.kind == "value"}
        assert written not in sources, task.op
        assert written is None or written not in reading, task.op
        reading |= sources
        if task.barrier is Barrier.ALWAYS:
            reading.clear()


def test_a_closed_or_forked_model_says_so(store: Store) -> None:
    """Its workers are gone: a step would wait for them forever."""
    host = host_of(random_model("llama"), store, threads=2)
    child = os.fork()
    if child == 0:
        try:
            host.step(batch(prompt(2)))
        except RequestError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    host.close()
    host.close()
    with pytest.raises(RequestError, match="closed"):
        host.step(batch(prompt(2)))


class Interrupted(Exception):
    """What the signal handler of the test below raises."""


def test_an_interrupt_at_any_time_leaves_a_sound_model(store: Store) -> None:
    """Ctrl-C may come between any two instructions of Python; the next step must not notice."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    step = batch(prompt(3))
    saved = signal.signal(signal.SIGPROF, interrupt)
    try:
        with closing(host_of(random_model("llama"), store, threads=3)) as host:
            expected = host.step(step)
            for i in range(200):
                with contextlib.suppress(Interrupted):
                    signal.setitimer(signal.ITIMER_PROF, 1e-4 + i * 1e-5)
                    while True:
                        host.step(step)
                assert same_bits(host.step(step), expected)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, saved)
