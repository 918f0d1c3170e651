"""In: random models, another processor's kernels, qemu. Out: the bits are this processor's bits."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from cross import AARCH64, RISCV64, Machine, emulated

from openlpu.engine.compiled import Compiled, Precision
from openlpu.engine.families import random_model
from openlpu.graph import Batch
from openlpu.host import HostModel
from openlpu.store import Store

PAGES = 24
# Every fused multiply-add of floating point, scalar and vector, of both instruction sets.
FUSED = re.compile(r"\t(f(?:n?m(?:add|sub)|ml[as])\S*|vfw?n?m(?:acc|sac|add|sub)\S*)\t")
DOT = {"neon": "sdot", "rvv": "vwmacc.vx"}
KERNELS = ((AARCH64, "neon"), (RISCV64, "rvv"), (AARCH64, "plain"), (RISCV64, "plain"))
NATIVE = KERNELS[:2]
MODELS: tuple[tuple[str, Precision], ...] = (
    ("mistral", "w8"),
    ("qwen3", "w8"),
    ("llama", "w4"),
    ("qwen2", "w4"),
    ("qwen3", "w4"),
)


def case(machine: Machine, kernels: str, *more: object) -> object:
    tools = f"qemu-user binutils-{machine.name}-linux-gnu"
    reason = f"no {', '.join(machine.missing)} for {machine.name}: apt-get install {tools}"
    name = "-".join([machine.name, kernels, *map(str, more)])
    skip = pytest.mark.skipif(bool(machine.missing), reason=reason)
    return pytest.param(machine, kernels, *more, id=name, marks=skip)


def batch(rows: list[tuple[int, int, int]]) -> Batch:
    """rows of (token, position, slot); 6 pages for each of 4 slots."""
    tokens, positions, slots = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    pages = np.arange(PAGES, dtype=np.int32)[::-1].reshape(4, 6)
    return Batch(tokens, positions, slots, np.arange(len(rows), dtype=np.int32), pages)


PROMPT = [(token * token % 271, token, 0) for token in range(5, 36)]
STEPS = [
    batch([(token, position - 5, slot) for token, position, slot in PROMPT]),
    batch([(77, 31, 0)]),
    batch([(78, 32, 0), (12, 0, 1)]),
    batch([(79, 33, 0), (13, 1, 1), (14, 2, 1), (80, 34, 0), (15, 0, 2)]),
    batch([(81, 330, 0)]),  # over an empty page to the second chunk of positions
]


def answers(
    model: HostModel, compiled: Compiled, place: Callable[[Batch], Batch]
) -> list[np.ndarray]:
    """Logits of every step, then all of K and V; in w8 also the logits of a row with a NaN."""
    found = [model.step(place(step)) for step in STEPS]
    found.append(model.kv.copy())
    if compiled.precision == "w8":
        embed = next(op for op in compiled.graph.ops if op.kind == "embed")
        at = model._packed.pieces[embed.out].scales
        model._packed.data.flags.writeable = True
        model._packed.data[at + 4 * 3 : at + 4 * 4].view(np.float32)[0] = 3e38
        found.append(model.step(place(batch([(3, 0, 3), (82, 331, 0)]))))
        assert np.isnan(found[-1][0]).all()
    return found


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    """The same bits; which NaN a NaN is, IEEE 754 leaves to the processor."""
    if got.dtype == np.uint8:
        return np.array_equal(got, expected)
    nan = np.isnan(expected)
    words = (np.ascontiguousarray(a).view(np.uint32)[~nan] for a in (got, expected))
    return np.array_equal(np.isnan(got), nan) and np.array_equal(*words)


@functools.cache
def here(family: str, precision: Precision, folder: Path) -> list[np.ndarray]:
    """What this processor's best kernels answer."""
    compiled = random_model(family, precision=precision)
    with closing(compiled.host(store=Store(folder), threads=1, pages=PAGES)) as host:
        return answers(host, compiled, lambda step: step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("here")


@pytest.mark.parametrize(
    ("machine", "kernels", "family", "precision"),
    [
        *(case(*kernels, *model) for kernels in NATIVE for model in MODELS),
        *(case(*kernels, *MODELS[-1]) for kernels in KERNELS[2:]),
    ],
)
def test_another_processor_gives_the_same_bits(
    machine: Machine,
    kernels: str,
    family: str,
    precision: Precision,
    folder: Path,
    tmp_path: Path,
) -> None:
    """A prompt, decoding, mixed sequences; and no instruction rounds once where we round twice."""
    compiled = random_model(family, precision=precision)
    expected = here(family, precision, folder)
    with emulated(machine, kernels, compiled, tmp_path, pages=PAGES) as (model, place):
        got = answers(model, compiled, place)
        assert [same(*pair) for pair in zip(got, expected, strict=True)] == [True] * len(expected)
    code = machine.output("objdump", "-d", "--no-show-raw-insn", tmp_path / "kernels.o")
    assert FUSED.findall(code) == []
    assert DOT.get(kernels, "") in code


@pytest.mark.parametrize(("machine", "kernels"), [case(*kernels) for kernels in NATIVE])
def test_one_rounding_less_would_be_seen(
    machine: Machine, kernels: str, folder: Path, tmp_path: Path
) -> None:
    """The same kernels, but with fused multiply-adds allowed: the tests above must fail."""
    compiled = random_model("qwen3", precision="w4")

    def fused(text: str) -> str:
        return re.sub(r" = (fadd|fmul|fsub) ", r" = \1 contract ", text)

    with emulated(machine, kernels, compiled, tmp_path, pages=PAGES, change=fused) as (
        model,
        place,
    ):
        got = answers(model, compiled, place)
    expected = here("qwen3", "w4", folder)
    assert not any(same(*pair) for pair in zip(got, expected, strict=True))
    code = machine.output("objdump", "-d", "--no-show-raw-insn", tmp_path / "kernels.o")
    assert FUSED.findall(code) != []
