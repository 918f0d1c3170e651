"""In: a tiny model's program. Out: the simulated chip is a Runner like others, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_chat import write_tiny_chat

from openlpu import knobs
from openlpu.chip import load_chip
from openlpu.engine import onchip
from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import Compiled
from openlpu.engine.model import open_model
from openlpu.engine.onchip import Checked, ChipStep, Facts, OnChip, cut, facts, graph_of, machine
from openlpu.engine.runner import Runner
from openlpu.engine.sampling import Sampling
from openlpu.errors import MachineError, ProgramError, RequestError
from openlpu.graph import Batch
from openlpu.graph.identity import identity
from openlpu.passes.recipe import Materializer
from openlpu.program import Program, cycles
from openlpu.sim.drive import Machine
from openlpu.sim.result import Result

F32 = NDArray[np.float32]
CHIP = load_chip("tiny")
CONTEXT = 96
TOKENS = [256, 72, 105, 33, 10, 257, 0, 255, 65, 65]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return open_model(str(write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")))[1]


@pytest.fixture(scope="module")
def program(compiled: Compiled) -> Program:
    return compiled.program(CHIP, context=CONTEXT, checkpoint="somewhere")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One cache for all: the simulator's code is compiled once."""
    with knobs.override(CACHE=str(tmp_path_factory.getbasetemp() / "cache")):
        yield


def engine_of(runner: Runner, context: int = CONTEXT) -> Engine:
    return Engine(runner, context=context, vocab_size=264)


def scored(runner: Runner, tokens: list[int] = TOKENS) -> F32:
    engine = engine_of(runner)
    sequence = engine.open()
    rows = np.concatenate(list(engine.score(sequence, tokens)))
    engine.close(sequence)
    return rows


def same_bits(got: F32, expected: F32) -> bool:
    return np.array_equal(got.view(np.int32), expected.view(np.int32))


def test_the_program_tells_what_it_is(compiled: Compiled, program: Program) -> None:
    expected = identity(compiled.graph, Materializer(compiled.weights))
    assert facts(program) == Facts("llama", "somewhere", "w8", expected, 1, 1, CONTEXT, 264, 320)
    assert graph_of(program) == compiled.graph
    host = compiled.host()
    assert host.identity == expected
    host.close()


@pytest.mark.parametrize("kind", onchip.MACHINES)
def test_logits_are_the_reference_s(
    compiled: Compiled, program: Program, kind: onchip.MachineName
) -> None:
    told: list[ChipStep] = []
    runner = OnChip(program, CHIP, machine(program, CHIP, kind), told=told.append)
    tokens = TOKENS[:4] if kind == "step" else TOKENS
    expected = scored(compiled.reference(), tokens)
    assert same_bits(scored(runner, tokens), expected)
    assert told == runner.steps
    assert [step.positions for step in told] == [(i,) for i in range(len(tokens))]
    assert {step.slots for step in told} == {(0,)}
    assert {step.cycles for step in told} == {cycles(program, {"groups": (1,)})}
    assert runner.cycles == sum(step.cycles for step in told)
    assert all(step.machine_s > 0 for step in told)
    runner.close()


def test_whoever_begins_anew_writes_over_what_was_there(
    compiled: Compiled, program: Program
) -> None:
    runner = OnChip(program, CHIP, machine(program, CHIP))
    first = scored(runner)
    other = scored(runner, TOKENS[::-1])
    assert not same_bits(first, other)
    assert same_bits(scored(runner), first)
    rows = []
    for engine in (engine_of(runner), engine_of(compiled.reference())):
        sequence = engine.open()
        engine.last_logits(sequence, TOKENS)
        engine.rewind(sequence, 3)  # back by a few tokens, then on with others
        rows.append(engine.last_logits(sequence, [7, 9]))
    assert same_bits(*rows)


def test_a_sequence_or_position_too_many_is_refused(program: Program) -> None:
    engine = engine_of(OnChip(program, CHIP, machine(program, CHIP)))
    first, second = engine.open(), engine.open()
    engine.last_logits(first, [1])
    with pytest.raises(RequestError, match="1 sequences are kept"):
        engine.last_logits(second, [1])
    with pytest.raises(RequestError, match="more --sequences"):
        engine.runner.step(batch([(1, 0, 5)]))
    longer = engine_of(engine.runner, CONTEXT + 1)
    with pytest.raises(RequestError, match="longer --context"):
        longer.runner.step(batch([(0, CONTEXT, 5)]))
    with pytest.raises(RequestError, match=f"context of {CONTEXT}"):
        engine.ask(second, [1] * CONTEXT, Sampling())


def batch(rows: list[tuple[int, int, int]]) -> Batch:
    """Rows of (slot, position, token), the last one wanted."""
    slots, positions, tokens = np.array(rows, np.int32).T.copy()
    wanted = np.array([len(rows) - 1], np.int32)
    return Batch(tokens, positions, slots, wanted, np.zeros((9, 9), np.int32))


# -- rows of several sequences ------------------------------------------------------------------


def sizes(rows: int, sequences: int) -> Facts:
    return Facts("", "", "w8", "", rows, sequences, CONTEXT, 264, 320)


def test_a_batch_is_cut_into_what_the_program_takes() -> None:
    slots = np.array([0, 2, 0, 1, 0, 0, 2, 0], np.int32)
    parts = cut(slots, sizes(6, 3))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 6], [4, 5], [7]]
    assert cut(np.zeros(0, np.int32), sizes(1, 1)) == []
    assert len(cut(np.zeros(5, np.int32), sizes(1, 1))) == 5
    with pytest.raises(RequestError, match="holds 2 sequences"):
        cut(slots, sizes(2, 2))


def with_meta(program: Program, **changes: Any) -> Program:
    """The program with other entries in its meta; None takes one away."""
    meta = {**json.loads(program.meta), **changes}
    kept = {name: value for name, value in meta.items() if value is not None}
    return dataclasses.replace(program, meta=json.dumps(kept))


def test_several_sequences_share_the_steps(compiled: Compiled) -> None:
    many = compiled.program(CHIP, rows=4, sequences=2, context=CONTEXT)
    runner = OnChip(many, CHIP, machine(many, CHIP))
    assert runner.max_rows == 4
    prompts = [[256, *range(40, 49)], [256, 9]]
    told = [answers(each, prompts) for each in (runner, compiled.reference())]
    assert told[0] == told[1]
    rows = [np.bincount(step.slots, minlength=2).tolist() for step in runner.steps]
    assert rows[0] == [2, 2]  # as many of each as a step takes
    assert [2, 1] in rows  # a prompt, and one that decodes beside it
    assert np.sum(rows, axis=0).tolist() == [10 + 4, 2 + 4]
    same = scored(runner, prompts[0])  # four rows a batch: two steps each, and one of two rows
    assert same_bits(same, scored(compiled.reference(), prompts[0]))
    assert [len(step.positions) for step in runner.steps[-5:]] == [2] * 5


def answers(runner: Runner, prompts: list[list[int]]) -> list[list[int]]:
    engine = engine_of(runner)
    asked = [engine.ask(engine.open(), prompt, Sampling(max_tokens=5)) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [answer.generated for answer in asked]


# -- beside another engine ----------------------------------------------------------------------


class Wrong:
    """A runner whose logits have one wrong bit in each step."""

    def __init__(self, right: Runner) -> None:
        self._right = right
        self.max_rows, self.pages, self.grow = right.max_rows, right.pages, right.grow
        self.rows_of_a_sequence, self.slots = right.rows_of_a_sequence, right.slots
        self.shares_pages = right.shares_pages

    def step(self, given: Batch) -> F32:
        logits = self._right.step(given).copy()
        logits.view(np.int32)[0, 5] ^= 8
        return logits

    def close(self) -> None:
        self._right.close()


def test_every_logit_is_compared(compiled: Compiled, program: Program) -> None:
    for second, differing in ((compiled.reference(), 0), (Wrong(compiled.reference()), 10)):
        chip = OnChip(program, CHIP, machine(program, CHIP))
        checked = Checked(chip, second)
        assert checked.max_rows == 1
        expected = scored(compiled.reference())
        assert same_bits(scored(checked), expected)
        assert (checked.logits, checked.differing_bits) == (10 * 264, differing)
        assert checked.second_s > 0
        checked.close()


def test_a_step_that_takes_other_cycles_is_an_error(program: Program) -> None:
    on = machine(program, CHIP)
    true_run: Callable[[Any], Result] = on.run
    on.run = lambda params: dataclasses.replace(true_run(params), cycles=1)  # type: ignore[method-assign]
    with pytest.raises(MachineError, match="1 cycles, and"):
        scored(OnChip(program, CHIP, on))


# -- what a stranger may write ------------------------------------------------------------------


@pytest.fixture(scope="module")
def on(program: Program) -> Machine:
    """A chip whose memory nobody relies on."""
    return machine(program, CHIP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: None}, name) for name in onchip._COUNTS),
        *(({name: None}, name) for name in ("table", "rope", "windows")),
        ({"rows": 0}, "rows"),
        ({"rows": True}, "rows"),
        ({"rows": 1 << 40}, "rows"),
        ({"rows": 5000, "sequences": 1}, "rows"),
        ({"rows": 3, "sequences": 2}, "multiple"),
        ({"rows": 2}, "logits of its rows"),
        ({"vocabulary": 263}, "vocabulary"),
        ({"vocabulary": 1 << 20}, "vocabulary"),
        ({"table": {"rows_per_slice": 1, "slices": 1}}, "table.vectors"),
        ({"windows": [0]}, "windows"),
        ({"windows": [0, -1]}, "window"),
        ({"rope": {"turns": ["xyz"], "magnitude": "0x1.0p+0"}}, "16 hex digits"),
        ({"rope": {"turns": 3, "magnitude": "0x1.0p+0"}}, "turns"),
        ({"rope": {"turns": [], "magnitude": "inf"}}, "magnitude"),
        ({"checkpoint": 5}, "checkpoint"),
        ({"precision": []}, "precision"),
    ],
)
def test_a_meta_that_is_no_model_s_is_named(
    program: Program, on: Machine, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProgramError, match=message):
        OnChip(with_meta(program, **changes), CHIP, on)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_meta_that_is_no_object_is_named(program: Program, text: str) -> None:
    with pytest.raises(ProgramError, match="no JSON object"):
        facts(dataclasses.replace(program, meta=text))


@pytest.mark.parametrize(
    "changes",
    [
        {"table": dict.fromkeys(onchip._TABLE, 1)},
        {"layers": 1, "windows": [0]},
        {"rope": {"turns": ["0" * 16], "magnitude": "0x1.0p+0"}},
    ],
)
def test_a_meta_that_does_not_meet_the_ports_is_one_error(
    program: Program, on: Machine, changes: dict[str, Any]
) -> None:
    with pytest.raises((ProgramError, RequestError)):
        scored(OnChip(with_meta(program, **changes), CHIP, on), [200])


def test_missing_ports_are_named(program: Program, on: Machine) -> None:
    ports = tuple(port for port in program.ports if port.name != "logits")
    with pytest.raises(ProgramError, match="logits"):
        OnChip(dataclasses.replace(program, ports=ports), CHIP, on)
    with pytest.raises(ProgramError, match="groups"):
        OnChip(dataclasses.replace(program, params=()), CHIP, on)


@pytest.mark.parametrize("text", [b"", b"graph", b"\xff", None])
def test_a_graph_that_does_not_read_is_one_error(program: Program, text: bytes | None) -> None:
    tables = {} if text is None else {"graph": np.frombuffer(text, np.uint8)}
    with pytest.raises(ProgramError, match="graph"):
        graph_of(dataclasses.replace(program, tables=tables))
