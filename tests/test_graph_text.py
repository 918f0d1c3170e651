"""In: graphs of models, random legal graphs, damaged texts. Out: text reads back as it was."""

from __future__ import annotations

import random
import re

import pytest
import tiny_models as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from openlpu.compiler import PASSES, compile_graph
from openlpu.errors import GraphError
from openlpu.graph import Attr, Graph, Op, Param, RopeTable, Step, attrs
from openlpu.graph.text import dumps, loads

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,20}", fullmatch=True)
values: st.SearchStrategy[Attr] = st.integers(-(2**70), 2**70) | finite | st.text(max_size=20)
steps = st.builds(
    Step, names, st.lists(st.integers(-(2**33), 2**33) | names, max_size=3).map(tuple)
)
rope_tables = st.builds(
    RopeTable, st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple), finite
)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Chains of norms, linears and sums over one width, with names and recipes of any kind."""
    width = draw(st.integers(1, 70))
    fresh = draw(
        st.lists(names.filter(lambda n: n != "tokens"), min_size=2, max_size=8, unique=True)
    )
    recipe = st.lists(steps, max_size=3).map(tuple)
    table = Param(draw(names), (9, width), draw(st.sampled_from(["f32", "w8"])), draw(names))
    ops = [Op("embed", fresh[0], ("tokens",), (table,))]
    for out in fresh[1:]:
        last = ops[-1].out
        kind = draw(st.sampled_from(["rmsnorm", "linear", "add"]))
        if kind == "rmsnorm":
            gains = draw(st.sampled_from([(), (Param(draw(names), (width,), "f32", "g"),)]))
            options = attrs(eps=draw(st.floats(0, 1)), bits=draw(st.sampled_from([16, 64])))
            ops.append(Op(kind, out, (last,), gains, options))
        elif kind == "linear":
            weight = Param(draw(names), (width, width), "f32", draw(names), draw(recipe))
            ops.append(Op(kind, out, (last,), (weight,), attrs(epilogue="none")))
        else:
            ops.append(Op(kind, out, (last, ops[0].out)))
    meta = tuple(draw(st.dictionaries(names, values, max_size=3)).items())
    context = draw(st.integers(0, 2**40))
    return Graph(draw(st.text(max_size=9)), context, draw(rope_tables), tuple(ops), fresh[-1], meta)


@given(graphs())
@settings(max_examples=40)
def test_any_graph_reads_back(graph: Graph) -> None:
    text = dumps(graph)
    again = loads(text)
    assert again == graph
    assert dumps(again) == text  # tells 1 from 1.0, and 0.0 from -0.0


@pytest.mark.parametrize("precision", PASSES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_stage_of_every_family_reads_back(family: str, precision: str) -> None:
    config, weights = tiny.random_model(family)
    known = {**tiny.encodings(weights), "embed": "q4_1", "layers.0.q": "q4_0"}
    for _, graph in compile_graph(config, known, precision):
        assert loads(dumps(graph)) == graph


def text_of(family: str) -> str:
    config, weights = tiny.random_model(family)
    return dumps(tiny.stages(config, weights)["fuse_residual"])


def test_the_text_can_be_read() -> None:
    lines = text_of("smollm2").splitlines()
    assert lines[0] == 'graph "llama" context=1024 output=%logits'
    assert lines[3] == "%embed : f32[R,96] = embed %tokens (embed:w8[113,96] = embed | rotate_in 1)"
    assert lines[4] == (
        "%l0.attn_in.q8 : q8[R,96] = rmsnorm_quant %embed {eps=1e-05, group=0, heads=1}"
    )
    assert lines[5].startswith(
        "%l0.qkv : f32[R,192] = linear %l0.attn_in.q8 {weights=3} "
        "(layers.0.q:w8[128,96] = layers.0.q | gain @layers.0.attn_norm | rotate_in 1, "
    )


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("graph ", "grape ", "line 1: 'graph' is missing"),
        ("context=1024", "context=x", "line 1: a whole number is missing at column"),
        ("magnitude=1.0", "magnitude=1", "line 3: the magnitude is not a float"),
        ("magnitude=1.0", "magnitude=1e999", "line 3: 1e999 is beyond float64"),
        ("f32[R,96] = embed", "f32[R,97] = embed", r"line 4: %embed is f32\[R,96\]"),
        ("eps=1e-05, group=0", "group=0, eps=1e-05", "line 5: the attributes are not in order"),
        ("eps=1e-05, group=0", "eps=1e-05, eps=0", "line 5: an attribute stands twice"),
        ("heads=1}", "heads=1} extra", "line 5: unexpected text at column"),
        (
            "= linear %l0.attn_in.q8 {",
            "= linear %nobody {",
            "line 6: linear %l0.qkv uses %nobody before",
        ),
        ("kv_heads=1", "kv_heads=0", "line 7: attention %l0.attn: has no heads"),
        ("= linear %l0.attn_in.q8 {weights=3}", "= linear", "line 6: linear %l0.qkv: takes a so"),
        ("output=%logits", "output=%x", "the output %x is not a defined"),
        (" = attention ", " = magic ", "line 7: unknown op 'magic'"),
    ],
)
def test_a_fault_is_named_with_its_line(old: str, new: str, named: str) -> None:
    text = text_of("smollm2")
    assert old in text
    with pytest.raises(GraphError, match=named):
        loads(text.replace(old, new, 1))


def test_a_damaged_text_is_a_graph_error_or_a_graph() -> None:
    """600 random cuts, swaps and repeats; nothing but GraphError may come out."""
    text, rng = text_of("qwen3"), random.Random(7)
    pieces = re.findall(r"\w+|.", text, re.DOTALL)
    for _ in range(600):
        damaged = pieces.copy()
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged))
            action = rng.randrange(4)
            if action == 0:
                del damaged[at : at + rng.choice([1, 1, 1, 50])]
            elif action == 1:
                damaged[at] = rng.choice(pieces)
            elif action == 2:
                damaged[at] = rng.choice(
                    ["\x00", "é", "0", "-1", "9" * 50, '"', "-1", "1e9", "%", "\\"]
                )
            else:
                damaged[at:at] = damaged[at : at + 9]
        try:
            loads("".join(damaged))
        except GraphError as error:
            assert "\n" not in str(error)


@given(st.text(max_size=300))
def test_any_text_is_a_graph_error(text: str) -> None:
    with pytest.raises(GraphError):
        loads(text)


@pytest.mark.parametrize("bad", ["two words", "", "a\nb", "x" * 300, "é"])
def test_names_that_cannot_be_written_are_refused(bad: str) -> None:
    ops = (Op("embed", bad, ("tokens",), (Param("w", (2, 2), "f32", "w"),)),)
    with pytest.raises(GraphError, match="cannot be a name"):
        dumps(Graph("g", 1, RopeTable(()), ops, bad))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), True])
def test_values_that_cannot_be_written_are_refused(bad: Attr) -> None:
    ops = (Op("embed", "e", ("tokens",), (Param("w", (2, 2), "f32", "w"),)),)
    with pytest.raises(GraphError, match="cannot be a value"):
        dumps(Graph("g", 1, RopeTable(()), ops, "e", (("k", bad),)))
