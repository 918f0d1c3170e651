"""In: small models with blocks of 32. Out: their programs give the bits of the w4 reference."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import numpy as np
import pytest
from chip_models import differing
from tiny_models import (
    in_blocks,
    random_model,
    random_tokens,
    reference,
    settings,
    stages,
    step,
)

from openlpu import knobs
from openlpu.check import check
from openlpu.chip import Chip, load_chip, parse_chip
from openlpu.compiler import compile_graph
from openlpu.errors import DoesNotFit, RequestError, UnsupportedModel
from openlpu.graph import Graph, Param, Tensor
from openlpu.load.config import ModelConfig, from_hf
from openlpu.load.weights import Weights
from openlpu.passes.recipe import Materializer
from openlpu.program import Program
from openlpu.reference import Reference
from openlpu.schedule.build import Sizes, build_program
from openlpu.schedule.demand import param_bytes
from openlpu.sim.drive import Driver
from openlpu.sim.fast import Fast
from openlpu.sim.step import Step

KINDS = ("q4_0", "q4_1", "q8_0")
MATRICES = ("embed", "head", "q", "k", "v", "o", "gate", "up", "down")
CONTEXT = 64


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all: the simulator's code is compiled once."""
    with knobs.override(CACHE=str(tmp_path_factory.getbasetemp() / "cache")):
        yield


def tiny(*, superlanes: int = 2, far: bool = False) -> Chip:
    """The chip `tiny`, or a wider one, or one whose upper bank is a region of its own."""
    text = (resources.files("openlpu") / "chips" / "tiny.toml").read_text()
    text = text.replace("superlanes = { value = 2", f"superlanes = {{ value = {superlanes}")
    if far:
        text = text.replace("words = 2048", "words = 1024")
        text += '\n[[region]]\nname = "far"\nholds = []\nfirst_word = 1024\nwords = 1024\n'
    return parse_chip(text, "tiny")


def blocks(
    family: str, kinds: tuple[str, ...], **options: int
) -> tuple[ModelConfig, Weights, Graph]:
    """A random model whose matrices are stored in the kinds by turns, alike in all layers."""
    config, weights = random_model(family, **options)
    kind = {name: kinds[i % len(kinds)] for i, name in enumerate(MATRICES)}
    names = [name.split(".")[-1] for name in weights.names()]
    stored = in_blocks(weights, [kind.get(name, "q8_0") for name in names])
    return config, stored, stages(config, stored, "w4")["fuse_residual"]


def compiled(graph: Graph, weights: Weights, chip: Chip, *, rows: int, region: str = "") -> Program:
    return build_program(graph, Materializer(weights), chip, Sizes(rows, 1, CONTEXT, region))


@pytest.mark.parametrize(
    ("family", "kinds", "superlanes", "rows"),
    [
        ("llama", ("q4_1",), 2, 1),
        ("llama", KINDS, 4, 3),
        ("mistral", ("q4_0",), 4, 1),
        ("qwen3", ("q4_0", "q4_1"), 4, 1),
        ("qwen2", KINDS[::-1], 2, 1),
        ("smollm2", ("q4_1", "q8_0"), 4, 2),
    ],
)
def test_bits_of_the_reference(
    family: str, kinds: tuple[str, ...], superlanes: int, rows: int
) -> None:
    config, weights, graph = blocks(family, kinds)
    chip = tiny(superlanes=superlanes)
    program = compiled(graph, weights, chip, rows=rows)
    check(program, chip)
    driver = Driver(program, chip, Fast(program, chip))
    slow = reference(config, weights, "w4")
    tokens = random_tokens(6)
    for first in range(0, len(tokens), rows):
        batch = step([(0, p, tokens[p]) for p in range(first, first + rows)])
        assert differing(driver.step(batch), slow.step(batch)) == 0, f"position {first}"
    assert all(r.predicted_cycles == r.result.cycles for r in driver.reports)


def test_on_the_exact_machine_too() -> None:
    config, weights, graph = blocks("smollm2", ("q4_1", "q4_0"))
    chip = tiny(superlanes=4)
    program = compiled(graph, weights, chip, rows=1)
    driver = Driver(program, chip, Step(program, chip))
    slow = reference(config, weights, "w4")
    for position, token in enumerate(random_tokens(2)):
        batch = step([(0, position, token)])
        assert differing(driver.step(batch), slow.step(batch)) == 0


class Extreme(Materializer):
    """Scales of the table that are tiny for one token, infinite in one group of another."""

    def whole(self, param: Param) -> Tensor:
        tensor = super().whole(param)
        if param.source == "embed":
            scale = tensor.scale.copy()  # type: ignore[union-attr]
            scale[1] = 0.0
            scale[2, 1] = np.inf
            object.__setattr__(tensor, "scale", scale)
        return tensor


def test_zeros_and_poison_stay_in_their_group_and_row() -> None:
    _, weights, graph = blocks("llama", ("q8_0", "q4_1"))
    chip = tiny(superlanes=4)
    program = build_program(graph, Extreme(weights), chip, Sizes(3, 3, CONTEXT))
    driver, slow = Driver(program, chip, Fast(program, chip)), Reference(graph, Extreme(weights))
    batch = step([(0, 0, 1), (1, 0, 2), (2, 0, 3)])
    found = driver.step(batch)
    assert differing(found, slow.step(batch)) == 0
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all() and np.isfinite(found[2]).all()


def test_nibbles_halve_the_weights_and_cost_no_load() -> None:
    """Each stored word is read once for its low and once for its high nibbles: as many reads and
    loads as with bytes, from half the memory."""
    found = {}
    for kind in ("q8_0", "q4_0"):
        _, weights, graph = blocks("llama", (kind,))
        chip = tiny(superlanes=4)
        program = compiled(graph, weights, chip, rows=1)
        size = sum(segment.data.size for segment in program.image if segment.what == "weights")
        driver = Driver(program, chip, Fast(program, chip))
        driver.step(step([(0, 0, 5)]))
        found[kind] = size, driver.reports[-1].result.counters["issue.load"]
    assert found["q4_0"][1] == found["q8_0"][1]
    assert 0.5 <= found["q4_0"][0] / found["q8_0"][0] < 0.56  # odd counts of groups round up


def test_the_table_lies_in_the_region_that_is_named() -> None:
    config, weights, graph = blocks("smollm2", ("q8_0", "q4_1"))
    chip = tiny(far=True)
    program = compiled(graph, weights, chip, rows=1, region="far")
    words = [s.word for s in program.image if s.what == "table"]
    assert words and min(words) >= 1024
    at_home = compiled(graph, weights, chip, rows=1)
    assert max(s.word + len(s.data) for s in at_home.image) <= 1024
    driver = Driver(program, chip, Fast(program, chip))
    batch = step([(0, 0, 7)])
    assert differing(driver.step(batch), reference(config, weights, "w4").step(batch)) == 0
    with pytest.raises(RequestError, match="has no region 'L9'; it has sram, far"):
        compiled(graph, weights, chip, rows=1, region="L9")


def test_groups_that_heads_tear_apart_are_refused() -> None:
    _, weights, graph = blocks("llama", ("q8_0",), head_dim=16)
    with pytest.raises(UnsupportedModel, match="heads must be multiples of 32 wide"):
        compiled(graph, weights, tiny(), rows=1)


# -- what fits on lpu_217


def smollm2(precision: str, *, table: str = "q8_0") -> Graph:
    """A graph as large as SmolLM2-135M, its blocks q4_1 but for the table; it has no tensors."""
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
    config = from_hf(settings("smollm2", **sizes))
    _, small = random_model("smollm2", num_hidden_layers=30)
    stored = {name: table if name == "embed" else "q4_1" for name in small.names()}
    return compile_graph(config, stored, precision)[-1][1]


class NoTensors:
    """Fails when a tensor is read."""

    def whole(self, param: Param) -> Tensor:
        raise AssertionError(param)

    blocks = whole


@pytest.mark.parametrize(
    ("precision", "region", "demand", "lever"),
    [
        ("w8", "", 163_806_720, "--precision w4 --table-region L1"),
        ("w8", "L1", 106_790_400, "--precision w4"),
        ("w4", "", 126_657_792, "--table-region L1"),
    ],
)
def test_what_does_not_fit_is_said_before_a_tensor_is_read(
    precision: str, region: str, demand: int, lever: str
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        build_program(
            smollm2(precision), NoTensors(), load_chip("lpu_217"), Sizes(1, 1, 1024, region)
        )
    error = caught.value
    assert (error.demand, error.bound, error.unit) == (demand, 85_015_040, "bytes")
    assert "in region L2 of lpu_217" in error.resource
    assert error.levers[0] == lever


def test_w4_with_one_table_is_96_megabytes() -> None:
    graph = smollm2("w4")
    params = {param.source: param for param in graph.params()}
    assert sum(map(param_bytes, params.values())) == 96_576_768
