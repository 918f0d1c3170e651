"""In: graphs and chips. Out: bounds are those counted by hand, and no schedule falls below them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import FAMILIES, random_model, stages

from openlpu.bounds import (
    Shape,
    StepBound,
    chain_bound,
    install_bound,
    port_bound,
    step_bound,
    stream_bound,
    work_bound,
)
from openlpu.bounds.rows import Reader, Tail, Value, row_trips, together, wait, whole
from openlpu.bounds.trips import alone, reach, spread, trips
from openlpu.bounds.work import chunks, lane_operations, largest_chunk, latencies, visible
from openlpu.chip import load_chip
from openlpu.errors import UnsupportedModel
from openlpu.graph import Graph, Op, Param, attrs
from openlpu.graph.ir import RopeTable
from openlpu.passes.recipe import Materializer
from openlpu.program import cycles
from openlpu.schedule.build import Sizes, build_program
from openlpu.schedule.mlp import mlp_ops
from openlpu.schedule.normal import plain

TSP, TINY = load_chip("tsp_v1"), load_chip("tiny")


def linear(out: str, source: str, outputs: int, inputs: int) -> Op:
    return Op("linear", out, (source,), (Param(out, (outputs, inputs), "w8", out),))


def quant(out: str, source: str, hadamard: int = 0) -> Op:
    return Op("quant", out, (source,), (), attrs(group=0, hadamard=hadamard))


def graph_of(*ops: Op) -> Graph:
    return Graph("test", 1, RopeTable(()), ops, ops[-1].out)


def attention(**options: int) -> Op:
    given = {"heads": 2, "kv_heads": 1, "head_dim": 32, "chunk": 64, "window": 0, **options}
    return Op("attention", "a", ("q", "k", "v"), (), attrs(**given))


def smollm2() -> Graph:
    """The matrices of SmolLM2-135M; nothing else of it counts for weight install."""
    ops = []
    for i in range(30):
        shapes = (("qkv", 960, 576), ("o", 576, 576), ("both", 3072, 576), ("down", 576, 1536))
        ops += [linear(f"l{i}.{name}", "x", n, k) for name, n, k in shapes]
    return graph_of(*ops, linear("head", "x", 49152, 576))


# -- what must pass -----------------------------------------------------------------------------


def test_install_of_smollm2() -> None:
    bound = install_bound(smollm2(), TSP)
    assert bound.tiles == 1508
    assert bound.tile_cycles == 7540
    assert bound.weight_bytes == 134_479_872
    assert bound.byte_cycles == 6567  # 134,479,872 / (4 planes * 16 vectors * 320 lanes)


def test_install_of_an_mlp_of_llama_3_8b() -> None:
    graph = graph_of(*mlp_ops(4096, 14336))
    bound = install_bound(graph, TSP)
    assert (bound.tiles, bound.tile_cycles) == (13 * 90 + 45 * 13, 8775)
    assert bound.byte_cycles == -(-3 * 4096 * 14336 // (64 * 320)) == 8602


def test_ports_and_streams_count_keys_and_values() -> None:
    """A matrix of 64 x 32, and 100 positions of one key head of 32: 2,048 + 2 * 3,200 bytes."""
    graph = graph_of(linear("x", "y", 64, 32), attention())
    shape = Shape(1, 1, 100)
    assert stream_bound(graph, TINY, shape) == -(-8448 // (64 * 32))
    assert port_bound(graph, TINY, shape) == -(-(8448 - 64) // (32 * 32))


def test_work_is_what_fills_the_lanes() -> None:
    """4 rows of 160 outputs: 3 operations each make 1,920 of 512 a cycle; products 4 * 160 * 96."""
    op = replace(linear("x", "y", 160, 96), params=linear("x", "y", 160, 96).params)
    bias = Param("b", (160,), "f32", "b")
    op = replace(op, params=(*op.params, bias))
    found = work_bound(graph_of(op), TINY, Shape(4), {"y": 96})
    assert found == max(-(-1920 // 512), -(-4 * 160 * 96 // (4 * 32 * 32))) == 15


@pytest.mark.parametrize(
    ("position", "window", "seen", "count", "largest"),
    [
        (0, 0, 1, 1, 1),
        (63, 0, 64, 1, 64),
        (64, 0, 65, 2, 64),
        (70, 10, 10, 2, 7),
        (200, 5, 5, 1, 5),
    ],
)
def test_visible_chunks(position: int, window: int, seen: int, count: int, largest: int) -> None:
    op = attention(window=window)
    assert visible(op, position) == seen
    assert chunks(op, position) == count
    assert largest_chunk(op, position) == largest


def test_operations_of_attention() -> None:
    """A head and position: 2 + 1 + 1 + 14 + 1 + 1 + 1 + 2; an output: 2 a chunk, 3 a merge, 1."""
    op = attention()
    assert lane_operations(op, 64, Shape(1, 1, 65)) == 2 * 65 * 23 + 64 * (4 + 3 + 1)


# -- trips ---------------------------------------------------------------------------------------


def test_trips_of_tsp_v1() -> None:
    ways = trips(TSP)
    assert ways.inside == 23 + 2 + 23
    assert ways.across == 23 + 22 + 23
    assert ways.product == 24 + 24 + 1 + 24
    assert ways.as_weights == ways.product + 2


def test_trips_of_tiny() -> None:
    ways = trips(TINY)
    assert (ways.inside, ways.across, ways.product) == (9 + 2 + 9, 9 + 4 + 9, 10 + 6 + 1 + 10)


def test_reach_takes_the_cheaper_way() -> None:
    assert reach(TSP, 1, 4, 8) == 0
    assert reach(TSP, 320, 4, 8) == 49  # a trip and a maximum; alone it would be 80 - 8
    assert reach(TSP, 64, 6, 11) == alone(TSP, 64, 6, 11) == 24 - 11
    assert reach(TSP, 2, 1, 8) == 1  # never less than the operation that joins


def test_dense_rows_take_copies_or_trips() -> None:
    assert spread(TSP, 1, 1) == 0
    assert spread(TSP, 16, 1) == 48 + 0 + 1  # 15 copies of 4 bytes in a cycle of 64 streams
    assert spread(TSP, 320, 1) == 68 + 19 + 1  # 319 copies, 16 a cycle
    assert spread(TSP, 320, 36) == 68 + 48 + 2  # too many copies for one trip
    assert spread(TSP, 320, 1, direct=True) == 68 + 19 + 1 - 46


# -- products ------------------------------------------------------------------------------------


def test_the_last_tile() -> None:
    tile = 320 * 320
    assert wait(TSP, 320, 320) == 0
    assert wait(TSP, 320, 576) == 1  # two vectors of the row: two acts, or a sum
    assert wait(TSP, 320 * 8, 320) == 1  # eight tiles wait in the planes
    assert wait(TSP, 320 * 9, 320) == max(2, tile // (64 * 320) - 1) == 4
    assert wait(TSP, 49152, 576) == -(-(49152 * 576 - 8 * tile) // (64 * 320)) - 1 == 1342


def test_columns_of_one_linear_wait_together() -> None:
    """Gate and up: the last product may be up's, with less to follow."""
    gate = Value(100, 2, 5, (Tail("both", 2880, 320, 95, 66),))
    up = Value(100, 2, 5, (Tail("both", 2880, 320, 95, 5),))
    assert whole(TSP, gate) == 95 + 4 + 66
    both = together(gate, up)
    assert whole(TSP, both) == max(95 + 4 + 66, 95 + (18 - 8) * 5 - 1 + 5)
    assert whole(TSP, together(up, up)) == 95 + 49 + 5


def test_a_row_crosses_superlanes_or_pays_for_it() -> None:
    lying = Value(4, 0, 0)
    assert row_trips(TSP, lying, 576, (), 1) == 48  # it may lie in one superlane, or in each
    # The product comes out in one superlane, and goes where the row is needed on its way.
    made = Value(100, 3, 8, (Tail("o", 576, 576, 92, 8),))
    reader = (Reader(3072, 0),)
    assert row_trips(TSP, made, 576, reader, 1) == 68
    assert 96 < row_trips(TSP, made, 576, reader, 2) < 136
    narrow = replace(TSP, superlanes=1)
    assert row_trips(narrow, made, 16, reader, 2) == 2 * trips(narrow).inside


# -- the chain -----------------------------------------------------------------------------------


def test_a_quantized_product_by_hand() -> None:
    """x is fetched, its largest found, then quotient, product, to int8; a plane; float, scale."""
    graph = graph_of(quant("q", "x"), linear("y", "q", 32, 320))
    bound = chain_bound(graph, TSP, Shape(), inputs={"x": 320})
    largest = 320 // 16 - 1 + 1  # each lane may look at all of it by itself
    assert bound.of("q").end_cycle == 3 + 1 + largest + 10 + 3 + 2
    assert bound.of("y").latency_cycles == 73 + 2 + 3
    assert bound.cycles == bound.of("y").end_cycle + 1 + 1
    assert bound.path == ("x", "q", "y")


def test_functions_by_hand() -> None:
    l = latencies(TSP)
    assert l.exp2 == 2 + 3 + 6 * (3 + 3)
    assert l.silu == 3 + l.exp2 + 1 + 3 + 10
    assert l.root(576) == 2 + 3 + 3 + 10 + 3 + 3 + 10 + 10
    assert l.root(4096) == l.root(576) - 10


def test_an_mlp_by_hand() -> None:
    """Gate and up once past the planes; from their last product to down's first; down but for the
    two tiles that each plane holds."""
    dim, ffn = 4096, 14336
    graph = graph_of(*mlp_ops(dim, ffn))
    bound = step_bound(graph, TSP, Shape(), inputs={"x": dim})
    x = 3 + 1 + 49 + 10 + 3 + 2
    rate = 64 * 320
    held = 8 * 320 * 320
    both = -(-(2 * dim * ffn - held) // rate) - 1
    between = 73 + 2 + 3 + 3 + 12 + 69 + 10 + 3 + 2
    down = -(-(dim * ffn - held) // rate) - 1
    assert bound.chain.cycles == x + both + between + down + 73 + 2 + 3 + 2 == 8846
    assert bound.cycles == bound.chain.cycles > bound.install.byte_cycles


def test_a_longer_context_takes_longer() -> None:
    config, weights = random_model("llama")
    graph = plain(stages(config, weights)["fuse_residual"])
    found = [chain_bound(graph, TINY, Shape(1, 1, n)).cycles for n in (1, 64, 321, 1000)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_fused_ops_and_other_formats_are_refused() -> None:
    config, weights = random_model("llama")
    fused = stages(config, weights)["fuse_residual"]
    with pytest.raises(UnsupportedModel, match="plain ops"):
        chain_bound(fused, TINY, Shape())
    with pytest.raises(UnsupportedModel, match="8-bit"):
        install_bound(stages(config, weights)["build"], TINY)


# -- no schedule is faster -----------------------------------------------------------------------


def least_and_taken(
    family: str, sizes: Sizes, stage: str = "fuse_residual", **options: int
) -> tuple[StepBound, StepBound, int]:
    """Bounds, those of dense rows, and the cycles of a schedule of a random model on tiny."""
    small = {"vocab_size": 40, "num_hidden_layers": 1, "intermediate_size": 80, **options}
    config, weights = random_model(family, **small)
    graph = stages(config, weights)[stage]
    program = build_program(graph, Materializer(weights), TINY, sizes)
    highest = {p.name: (p.highest,) * p.values for p in program.params}
    shape = Shape(sizes.rows, sizes.sequences, sizes.context)
    weak, dense = (step_bound(plain(graph), TINY, shape, dense=d) for d in (False, True))
    return weak, dense, cycles(program, highest)


CASES = [(family, 1) for family in sorted(FAMILIES)]
CASES += [("llama", 2), ("smollm2", 3), ("mistral", 4), ("qwen2", 2), ("qwen3", 3)]


@pytest.mark.parametrize(("family", "rows"), CASES)
def test_no_schedule_is_faster(family: str, rows: int) -> None:
    """Sequences of a row each, or one of all rows; stages of fusion by turns; contexts of several
    chunks of 320 positions with one row."""
    sequences = rows if len(family) % 2 else 1
    context = 700 if rows == 1 and family in ("llama", "mistral") else 40
    stage = ("fuse_residual", "fuse_qkv", "fuse_attention", "quantize_w8")[rows - 1]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1 + rows % 2}
    weak, dense, took = least_and_taken(family, Sizes(rows, sequences, context), stage, **heads)
    assert weak.cycles <= weak.chain.cycles <= dense.chain.cycles <= took
    assert took < 12 * weak.cycles  # nor is the bound idle


def test_no_schedule_of_a_narrow_model_is_faster() -> None:
    """Rows of one superlane, heads of 16, a head as wide as it: few trips are needed."""
    narrow = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 5}
    weak, dense, took = least_and_taken("llama", Sizes(1, 1, 8), **narrow, **heads)
    assert weak.cycles <= dense.cycles <= took


def test_no_schedule_of_a_wide_head_is_faster() -> None:
    """3,000 outputs on tiny: its tiles pass the planes after the row is there."""
    weak, _, took = least_and_taken("smollm2", Sizes(1, 1, 8), vocab_size=3000)
    waited = wait(TINY, 3000, 96)
    assert waited == -(-(3000 * 96 - 8 * 1024) // (64 * 32)) - 1
    assert weak.chain.bounds[-1].latency_cycles > waited
    assert weak.cycles <= took
