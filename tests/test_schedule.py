"""In: small random models. Out: their programs on a simulated chip give the reference's bits."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from chip_models import (
    TINY,
    Case,
    Model,
    batches,
    differing,
    model_of,
    random_case,
)

from openlpu import cost, knobs
from openlpu import program as programs
from openlpu.graph import Batch
from openlpu.program import Program
from openlpu.reference import Reference
from openlpu.schedule.build import build_program
from openlpu.sim.drive import Driver
from openlpu.sim.fast import Fast
from openlpu.sim.step import Step

GROUPS, GRAPHS_PER_GROUP = 10, 20
STEPPED = 10  # one of so many graphs runs on Step too


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all: the simulator's code is compiled once."""
    with knobs.override(CACHE=str(tmp_path_factory.getbasetemp() / "cache")):
        yield


# -- at random


def run(case: Case, model: Model, *, stepped: bool) -> int:
    """Compile the case and drive it beside the reference; how many steps were compared."""
    program = build_program(model.graph, model.source, TINY, case.sizes)
    machine = Fast(program, TINY)  # which checks the program
    driver = Driver(program, TINY, machine)
    reference = Reference(model.graph, model.source)
    counted: dict[tuple[int, ...], dict[str, int]] = {}
    todo = list(batches(case))
    beside = random.Random(case.seed).randrange(len(todo)) if stepped else -1
    for number, batch in enumerate(todo):
        before = machine.memory.copy() if number == beside else None
        found, wanted = driver.step(batch), reference.step(batch)
        assert found.shape == wanted.shape
        assert differing(found, wanted) == 0, f"step {number}: {batch}"
        report = driver.reports[-1]
        groups = _groups(case, batch, program)
        if groups not in counted:
            counted[groups] = cost.count(program, TINY, {"groups": groups})
        cycles = programs.cycles(program, {"groups": groups})
        assert cycles == report.predicted_cycles == report.result.cycles
        assert counted[groups] == report.result.counters
        if before is not None:
            _beside(program, machine, before, batch, groups)
    return len(todo)


def _groups(case: Case, batch: Batch, program: Program) -> tuple[int, ...]:
    """How many groups of chunks the sequences need, as many as the highest position does."""
    planes = TINY.planes * TINY.lanes
    reach = case.chunk * max(1, min(planes // case.chunk, -(-case.sizes.context // case.chunk)))
    found = []
    for slot in range(case.sizes.sequences):
        positions = batch.positions[batch.slots == slot]
        found.append(int(positions.max(initial=0)) // reach + 1)
    assert program.params[0].values == len(found)
    return tuple(found)


def _beside(
    program: Program,
    fast: Fast,
    before: np.ndarray,
    batch: Batch,
    groups: tuple[int, ...],
) -> None:
    """Step does the same from the same memory."""
    slow = Step(program, TINY)
    slow.memory[:] = before
    driver = Driver(program, TINY, slow)
    driver.step(batch)
    assert np.array_equal(slow.memory, fast.memory)
    assert driver.reports[-1].result == fast_result(program, groups)


def fast_result(program: Program, groups: tuple[int, ...]) -> object:
    raise NotImplementedError


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_models(group: int) -> None:
    for i in range(GRAPHS_PER_GROUP):
        case = random_case(group * GRAPHS_PER_GROUP + i)
        try:
            run(case, model_of(case), stepped=i % STEPPED == group % STEPPED)
        except Exception:
            print(case)
            raise
