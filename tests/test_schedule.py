"""In: small random models. Out: their programs on a simulated chip give the reference's bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chip_models import (
    CHIPS,
    TINY,
    Case,
    Model,
    PoisonedToken,
    batch_of,
    batches,
    differing,
    digest,
    model_of,
    random_case,
    reach_of,
)
from numpy.typing import NDArray
from tiny_models import in_blocks, random_model, stages

from openlpu import cost, knobs
from openlpu import program as programs
from openlpu.asm.container import save
from openlpu.chip import load_chip
from openlpu.errors import DoesNotFit, LpuError, RequestError, UnsupportedModel
from openlpu.graph import Batch, Graph
from openlpu.passes.recipe import Materializer
from openlpu.passes.rewrite import with_attrs, with_ops
from openlpu.program import Program
from openlpu.reference import Reference
from openlpu.schedule.build import MAX_ROWS, Sizes, _levers, build_program
from openlpu.schedule.normal import parts, plain
from openlpu.sim.drive import Driver
from openlpu.sim.fast import Fast
from openlpu.sim.step import Step

GROUPS, CASES_PER_GROUP = 10, 20
STEPPED = 10  # one of so many cases runs on Step too
SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all: the simulator's code is compiled once."""
    with knobs.override(CACHE=str(tmp_path_factory.getbasetemp() / "cache")):
        yield


# -- at random


def groups_of(case: Case, batch: Batch) -> tuple[int, ...]:
    """How many groups of chunks each sequence runs through: as many as its last row sees."""
    reach = reach_of(case.chip, case.chunk, case.sizes.context)
    highest = [0] * case.sizes.sequences
    for slot, position in zip(batch.slots, batch.positions, strict=True):
        highest[slot] = max(highest[slot], int(position))
    return tuple(position // reach + 1 for position in highest)


class Beside:
    """A case's program on the simulated chip, beside the reference."""

    def __init__(self, case: Case, model: Model) -> None:
        self.case = case
        self.program = build_program(model.graph, model.source, case.chip, case.sizes)
        self.fast = Fast(self.program, case.chip)  # which checks the program
        self.driver = Driver(self.program, case.chip, self.fast)
        self.reference = Reference(model.graph, model.source)
        self._counted: dict[tuple[int, ...], dict[str, int]] = {}

    def step(self, batch: Batch, *, stepped: bool = False) -> NDArray[np.float32]:
        """One step: logits, cycles and counters are what they must be. stepped: Step, from the
        same memory, does the same."""
        before = self.fast.memory.copy() if stepped else None
        found, wanted = self.driver.step(batch), self.reference.step(batch)
        assert found.shape == wanted.shape
        assert differing(found, wanted) == 0, batch
        report, groups = self.driver.reports[-1], groups_of(self.case, batch)
        if groups not in self._counted:
            self._counted[groups] = cost.count(self.program, self.case.chip, {"groups": groups})
        assert report.result.counters == self._counted[groups]
        cycles = programs.cycles(self.program, {"groups": groups})
        assert cycles == report.predicted_cycles == report.result.cycles
        if before is not None:
            slow = Step(self.program, self.case.chip)
            slow.memory[:] = before
            driver = Driver(self.program, self.case.chip, slow)
            assert differing(driver.step(batch), found) == 0
            assert driver.reports[-1] == report
            assert np.array_equal(slow.memory, self.fast.memory)
        return found


def run(case: Case, *, stepped: bool) -> None:
    """Compile the case and drive it beside the reference."""
    beside, todo = Beside(case, model_of(case)), list(batches(case))
    at = random.Random(f"stepped {case.seed}").randrange(len(todo)) if stepped else -1
    for number, batch in enumerate(todo):
        beside.step(batch, stepped=number == at)


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_models(group: int) -> None:
    """Families, sizes, stages of the passes, chunks, rows and sequences at random."""
    for i in range(CASES_PER_GROUP):
        case = random_case(group * CASES_PER_GROUP + i)
        try:
            run(case, stepped=i % STEPPED == group % STEPPED)
        except BaseException:
            print(case)
            raise


def test_the_cases_are_of_all_kinds() -> None:
    """What the random cases go through, taken together."""
    cases = [random_case(seed) for seed in range(GROUPS * CASES_PER_GROUP)]
    assert {case.sizes.rows for case in cases} == {1, 2, 3, 4}
    assert {case.sizes.sequences for case in cases} == {1, 2, 3, 4}
    assert {case.chip_name for case in cases} == set(CHIPS)
    assert len({(case.precision, case.stage) for case in cases}) > 10
    ways = Counter[str]()
    for case in cases:
        window = case.options.get("sliding_window") or case.sizes.context
        for batch in batches(case):
            ways["with unused rows"] += len(batch.tokens) < case.sizes.rows
            ways["with nothing wanted"] += not len(batch.wanted)
            ways[f"through {min(3, max(groups_of(case, batch)))} groups"] += 1
            for what, edge in zip(("tile", "chunk", "group"), _edges(case), strict=True):
                begun = (batch.positions > 0) & (batch.positions % edge == 0)
                ways[f"at the first row of a later {what}"] += bool(begun.any())
            ways["beyond a window"] += bool((batch.positions >= window).any())
        ways[f"chunk {case.chunk}"] += 1
    print(dict(ways))
    assert {"through 2 groups", "through 3 groups", "chunk 64", "chunk 320"} < set(ways)
    assert min(ways.values()) > 5, ways


def _edges(case: Case) -> tuple[int, ...]:
    """Positions at whose multiples a tile, a chunk and a group begin."""
    return case.chip.lanes, case.chunk, reach_of(case.chip, case.chunk, 1 << 20)


# -- rows that leave the finite numbers


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_poisoned_row_spares_the_other_sequences(family: str) -> None:
    """The embedding of token 3 is infinite: its row and the later ones of its sequence are NaN."""
    config, weights = random_model(family, **{**SMALL, "tie_word_embeddings": False})
    graph = stages(config, weights)["fuse_residual"]
    case = Case(0, "tiny", family, "w8", "fuse_residual", 320, Sizes(4, 2, 40), 0, SMALL)
    beside = Beside(case, Model(graph, PoisonedToken(weights, 3)))
    steps = [
        [(0, 0, 1), (1, 0, 2), (1, 1, 4)],
        [(0, 1, 3), (1, 2, 5)],
        [(0, 2, 6), (1, 3, 7), (0, 3, 8)],
        [(1, 4, 9)],
        [(0, 1, 2), (1, 5, 3), (0, 2, 4), (1, 6, 4)],  # sequence 0 goes back: it is clean again
        [(0, 0, 3)],
        [(0, 0, 4), (1, 7, 5)],
    ]
    poisoned = {0: -1, 1: -1}
    for number, rows in enumerate(steps):
        logits = beside.step(batch_of(rows, list(range(len(rows))), 2), stepped=number == 2)
        for row, (slot, position, token) in zip(logits, rows, strict=True):
            if token == 3:
                poisoned[slot] = position
            elif position <= poisoned[slot]:
                poisoned[slot] = -1
            hurt = token == 3 or 0 <= poisoned[slot] < position
            if family != "mistral" or position - poisoned[slot] < 7:  # its window
                assert np.isnan(row).all() == hurt, (slot, position)


# -- the same bytes again


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    """Here, and in a process whose sets and dictionaries of strings are in another order."""
    seeds = [0, 1, 2, 3, 5]
    here = [digest(seed) for seed in seeds]
    assert len(set(here)) == len(seeds)
    assert digest(seeds[0]) == here[0]
    code = f"from chip_models import digest; print(*(digest(seed) for seed in {seeds}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "4321"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == here, done.stderr
    case = random_case(seeds[0])
    model = model_of(case)
    program = build_program(model.graph, model.source, TINY, case.sizes)
    assert save(program, tmp_path / "a.lpu") == here[0]


# -- what cannot be compiled


def small(
    family: str = "llama", precision: str = "w8", stage: str = "fuse_residual", **options: Any
) -> tuple[Graph, Materializer]:
    """A graph of a small model, and its tensors."""
    config, floats = random_model(family, **{**SMALL, **options})
    weights = in_blocks(floats) if precision == "w4" else floats
    return stages(config, weights, precision)[stage], Materializer(weights)


def refused(kind: type[LpuError], sizes: Sizes, graph: Graph, source: Materializer) -> LpuError:
    """The error of a build, which is one line."""
    with pytest.raises(kind) as caught:
        build_program(graph, source, TINY, sizes)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


def lacking(sizes: Sizes, graph: Graph, source: Materializer) -> DoesNotFit:
    error = refused(DoesNotFit, sizes, graph, source)
    assert isinstance(error, DoesNotFit)
    assert error.demand > error.bound > 0
    assert error.levers
    assert f"{error.demand:,} {error.unit} needed, {error.bound:,} available" in str(error)
    return error


def test_weights_that_are_too_large() -> None:
    """Told from the sizes alone, to the byte, before any tensor is made."""
    vocabulary, dim, width = 30_000, 96, 32
    graph, _ = small(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=width, attention_bias=False,
        mlp_bias=False,
    )  # fmt: skip

    class NoTensors(Materializer):
        def __init__(self) -> None:
            pass

    error = lacking(Sizes(1, 1, 10), graph, NoTensors())
    attention = (3 * 16) * (dim + 4) + dim * (16 + 4)
    layer = attention + 2 * width * (dim + 4) + dim * (width + 4)
    table = vocabulary * (dim + 4)
    assert error.demand == 2 * table + layer
    assert error.bound == TINY.memory_bytes
    assert error.unit == "bytes"
    assert error.resource.startswith("weights")
    assert f"table {table:,}, layers {layer:,}, head {table:,}" in error.resource


def test_weights_that_are_too_large_for_what_lies_beside_them() -> None:
    """The bytes alone would fit; the lanes that stay empty do not."""
    error = lacking(Sizes(1, 1, 10), *small(vocab_size=9_000, hidden_size=96))
    assert "region sram of tiny" in error.resource


def test_a_context_that_is_too_long() -> None:
    error = lacking(Sizes(1, 1, 1_000_000), *small())
    assert error.resource.startswith("context in region sram of tiny")
    assert error.levers == ("a shorter --context", "a larger chip")
    error = lacking(Sizes(2, 2, 1_000_000), *small())
    assert error.levers == ("fewer --sequences", "a shorter --context", "a larger chip")


def test_a_lever_that_cannot_be_moved_is_not_named() -> None:
    model, one, many = parts(plain(small()[0])), Sizes(1, 1, 8), Sizes(8, 1, 8)
    scratch, table = ("fewer --rows",), ("--table-region", "--precision w4", "a larger chip")
    assert _levers(scratch, model, TINY, one) == ("a larger chip",)
    assert _levers(scratch, model, TINY, many) == scratch
    assert _levers(scratch, model, TINY, Sizes(4, 4, 8)) == ("fewer --sequences",)
    assert _levers(table, model, TINY, one) == table[1:]
    assert _levers(table, model, load_chip("lpu_217"), one) == table


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(0, 1, 8), f"rows is 0; give 1 to {MAX_ROWS}"),
        (Sizes(-4, 1, 8), f"rows is -4; give 1 to {MAX_ROWS}"),
        (Sizes(MAX_ROWS + 1, 1, 8), f"rows is {MAX_ROWS + 1}; give 1 to {MAX_ROWS}"),
        (Sizes(3, 2, 8), "3 rows are no multiple of 2 sequences"),
        (Sizes(2, 4, 8), "2 rows are no multiple of 4 sequences"),
        (Sizes(2, 0, 8), "2 rows are no multiple of 0 sequences"),
        (Sizes(2, -1, 8), "2 rows are no multiple of -1 sequences"),
        (Sizes(1, 1, 0), "context is 0; give at least 1"),
        (Sizes(1, 1, -9), "context is -9; give at least 1"),
        (Sizes(1, 1, 8, "attic"), "tiny has no region 'attic'; it has sram"),
    ],
)
def test_sizes_that_make_no_sense(sizes: Sizes, message: str) -> None:
    assert str(refused(RequestError, sizes, *small())) == message


def test_layers_must_be_alike() -> None:
    graph, source = small(num_hidden_layers=3)
    ops = list(graph.ops)
    norms = [i for i, op in enumerate(ops) if op.kind == "rmsnorm_quant"]
    ops[norms[2]] = with_attrs(ops[norms[2]], eps=0.5)  # in layer 1
    changed = with_ops(graph, ops)
    error = refused(UnsupportedModel, Sizes(1, 1, 8), changed, source)
    assert str(error) == "layer 1 is not built like layer 0; the chip needs equal ones"
    odd = small("qwen3", "w4", num_hidden_layers=2, head_dim=32)  # kinds of blocks by turns
    assert "is not built like layer 0" in str(refused(UnsupportedModel, Sizes(1, 1, 8), *odd))


@pytest.mark.parametrize("head_dim", [48, 64])
def test_heads_wider_than_a_vector(head_dim: int) -> None:
    error = refused(UnsupportedModel, Sizes(1, 1, 8), *small(head_dim=head_dim))
    assert str(error) == f"a head of {head_dim} is wider than the 32 lanes of tiny"


def test_groups_that_do_not_stand_together() -> None:
    model = small("qwen2", "w4", num_attention_heads=2, head_dim=16)
    error = refused(UnsupportedModel, Sizes(1, 1, 8), *model)
    assert "do not stand together on tiny" in str(error)


# -- batches that a program was not compiled for


@pytest.fixture(scope="module")
def driven(cache: None) -> tuple[Program, Driver]:
    graph, source = small()
    program = build_program(graph, source, TINY, Sizes(4, 2, 50))
    return program, Driver(program, TINY, Fast(program, TINY))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 1), (0, 1, 1), (0, 2, 1)], "takes 2 rows of each of 2 sequences"),
        ([(2, 0, 1)], "takes 2 rows of each of 2 sequences"),
        ([(-1, 0, 1)], "takes 2 rows of each of 2 sequences"),
        ([(0, 50, 1)], "position 50 is outside the program's context of 50"),
        ([(1, -1, 1)], "position -1 is outside the program's context of 50"),
        ([(1, 0, 1), (0, 0, 20)], "token 20 is outside the vocabulary"),
        ([(1, 0, -1)], "token -1 is outside the vocabulary"),
    ],
)
def test_batches_that_do_not_fit(
    rows: list[tuple[int, int, int]], message: str, driven: tuple[Program, Driver]
) -> None:
    program, driver = driven
    fast = driver.machine
    assert isinstance(fast, Fast)
    before = fast.memory.copy()
    with pytest.raises(RequestError, match=message) as caught:
        driver.step(batch_of(rows, [0], 2))
    assert "\n" not in str(caught.value)
    assert np.array_equal(fast.memory, before), "a refused batch leaves no trace"
    assert program.params[0].highest == 1


def test_the_last_position_fits(driven: tuple[Program, Driver]) -> None:
    _, driver = driven
    assert driver.step(batch_of([(1, 49, 19)], [0], 2)).shape == (1, 20)


def test_a_lever_is_worth_what_it_says() -> None:
    """The longest context that fits is one that fits; one position more may not."""
    graph, source = small()
    lowest, highest = 1, 1_000_000
    while highest - lowest > 1_000:
        middle = (lowest + highest) // 2
        try:
            build_program(graph, source, TINY, replace(Sizes(1, 1, 1), context=middle))
            lowest = middle
        except DoesNotFit:
            highest = middle
    assert 10_000 < lowest < 100_000
