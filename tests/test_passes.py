"""In: random models of every family. Out: passes keep the function; fusions keep every bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_models as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from openlpu.compiler import PASSES, compile_graph
from openlpu.errors import GraphError, RequestError, UnsupportedModel
from openlpu.graph import Graph, RowTensor, types
from openlpu.graph.identity import IdentityHasher, identity
from openlpu.load.config import ModelConfig
from openlpu.load.weights import Weights
from openlpu.models import build
from openlpu.passes.fold_gains import fold_gains
from openlpu.passes.fuse import fuse_gate_up, fuse_norm_quant, fuse_qkv, fuse_residual
from openlpu.passes.fuse_attention import fuse_attention
from openlpu.passes.quantize import quantize_w8
from openlpu.passes.recipe import Materializer
from openlpu.passes.rotate import rotate
from openlpu.reference import Reference

TOKENS = tiny.random_tokens(33, seed=1)
FUSIONS = {
    f.__name__: f for f in (fuse_qkv, fuse_attention, fuse_gate_up, fuse_norm_quant, fuse_residual)
}


def logits(graph: Graph, weights: Weights) -> NDArray[np.float32]:
    """Of TOKENS, the prompt cut in three."""
    return tiny.feed(Reference(graph, Materializer(weights)), TOKENS, cuts=(5, 6))


def kinds(graph: Graph) -> dict[str, int]:
    found = [op.kind for op in graph.ops]
    return {kind: found.count(kind) for kind in sorted(set(found))}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fold_and_rotate_keep_the_function(family: str) -> None:
    config, weights = tiny.random_model(family)
    graph = build(config)
    expected = logits(graph, weights)
    for change in (fold_gains, rotate):
        graph = change(graph)
        np.testing.assert_allclose(logits(graph, weights), expected, atol=5e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fusions_keep_every_bit(family: str) -> None:
    config, weights = tiny.random_model(family)
    after = tiny.stages(config, weights)
    expected = logits(after["quantize_w8"], weights)
    for name in FUSIONS:
        assert np.array_equal(logits(after[name], weights), expected), name
    layers = config.layers
    assert kinds(after["fuse_residual"]) == {
        "attention": layers,
        "embed": 1,
        "linear": 4 * layers + 1,
        "quant": 2 * layers,
        "rmsnorm_quant": 2 * layers + 1,
        "rows": 1,
    }


@given(order=st.permutations(sorted(FUSIONS)), family=st.sampled_from(sorted(tiny.FAMILIES)))
@settings(max_examples=12)
def test_fusions_in_any_order_keep_every_bit(order: list[str], family: str) -> None:
    config, weights = tiny.random_model(family, num_hidden_layers=1)
    graph = tiny.stages(config, weights)["quantize_w8"]
    expected = logits(graph, weights)
    for name in order:
        graph = FUSIONS[name](graph)
    assert np.array_equal(logits(graph, weights), expected)


def test_float_graphs_fuse_too() -> None:
    config, weights = tiny.random_model("qwen3")
    graph = build(config)
    expected = logits(graph, weights)
    for fuse in FUSIONS.values():
        graph = fuse(graph)
    np.testing.assert_allclose(logits(graph, weights), expected, atol=1e-5)


def relative_error(config: ModelConfig, weights: Weights, precision: str) -> float:
    expected = logits(build(config), weights)
    got = logits(tiny.stages(config, weights, precision)["fuse_residual"], weights)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_eight_bits_stay_close_to_float(family: str) -> None:
    """A row's step is amax/127, about 3 sigma / 127, so rounding adds about 0.7 % per operand;
    two layers of six products each, partly averaging out, stay within 6 %."""
    config, weights = tiny.random_model(family)
    assert relative_error(config, weights, "w8") < 0.06


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_perplexity_of_eight_bits(family: str) -> None:
    """On text that the float model itself would write, the perplexity rises by exp(KL), with no
    luck of a sample in it; half a percent is the bound."""
    config, weights = tiny.random_model(family)
    stages = tiny.stages(config, weights)
    log_p, log_q = (
        log_softmax(logits(stages[name], weights)) for name in ("build", "fuse_residual")
    )
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    assert np.exp(divergence) < 1.005


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_blocks_stay_close_and_fusions_keep_their_bits(family: str) -> None:
    """The same stored blocks in float and in w4: only rounded rows, 32 to a scale, differ."""
    config, weights = tiny.random_model(family)
    stored = tiny.in_blocks(weights)
    stages = tiny.stages(config, stored, "w4")
    expected = logits(stages["build"], stored)
    quantized = logits(stages["quantize_blocks"], stored)
    assert np.linalg.norm(quantized - expected) / np.linalg.norm(expected) < 0.03
    for name in FUSIONS:
        assert np.array_equal(logits(stages[name], stored), quantized), name


def test_rotation_is_what_outliers_need() -> None:
    """One residual channel a hundred times the others, its gains a hundredth, as trained models
    have it: one scale per row then leaves the other channels few levels, unless rotated."""
    config, weights = tiny.random_model("llama")
    arrays = {name: weights.rows(name) for name in weights.names()}
    for name in ("embed", "layers.0.o", "layers.0.down"):
        channels = arrays[name].T if name == "embed" else arrays[name]
        channels[5] *= 100.0
    for name in ("layers.0.attn_norm", "layers.0.ffn_norm", "layers.1.attn_norm"):
        arrays[name][5] *= 0.01
    for name in ("layers.1.ffn_norm", "final_norm"):
        arrays[name][5] *= 0.01
    loud = type(weights)(arrays)
    graph = fold_gains(build(config))
    expected = logits(build(config), loud)
    errors = [
        np.linalg.norm(logits(quantize_w8(g), loud) - expected) / np.linalg.norm(expected)
        for g in (graph, rotate(graph))
    ]
    assert errors[1] < 0.5 * errors[0], errors


def test_passes_are_pure_and_legal() -> None:
    config, weights = tiny.random_model("qwen3")
    for precision in PASSES:
        known = {**tiny.encodings(weights), "embed": "q8_0"}
        first, second = (compile_graph(config, known, precision) for _ in range(2))
        assert first == second
        assert [name for name, _ in first] == ["build", *PASSES[precision]]
        for _, graph in first:
            assert types(graph)[graph.output].width == config.vocab_size


def test_stop_names_the_last_pass() -> None:
    config, weights = tiny.random_model("llama")
    stages = compile_graph(config, tiny.encodings(weights), stop="rotate")
    assert [name for name, _ in stages] == ["build", "fold_gains", "rotate"]
    assert len(compile_graph(config, {}, stop="build")) == 1
    with pytest.raises(RequestError, match="'polish' is not one of: build, fold_gains"):
        compile_graph(config, {}, stop="polish")
    with pytest.raises(RequestError, match="'w2' is not one of: f32, w8, w4"):
        compile_graph(config, {}, "w2")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hidden_size": 72}, "layers.0.q has 72 inputs"),
        ({"intermediate_size": 100}, "layers.0.down has 100 inputs"),
        ({"head_dim": 24}, "head_dim 24"),
    ],
)
def test_a_size_without_whole_superlanes_is_refused(options: dict[str, int], named: str) -> None:
    config, weights = tiny.random_model("smollm2", **options)
    with pytest.raises(UnsupportedModel, match=named):
        tiny.stages(config, weights)
    assert np.isfinite(logits(build(config), weights)).all()


def test_w4_needs_blocks() -> None:
    config, weights = tiny.random_model("llama")
    with pytest.raises(UnsupportedModel, match="no matrix in q8_0, q4_0, q4_1; use precision w8"):
        tiny.stages(config, weights, "w4")


def test_what_does_not_fit_a_pass_is_named() -> None:
    config, _ = tiny.random_model("llama")
    with pytest.raises(GraphError, match=r"%l0\.attn_in"):
        rotate(build(config))  # gains not folded
    graph = fold_gains(build(config))
    unread = replace(graph, ops=tuple(op for op in graph.ops if op.out != "l0.o"))
    with pytest.raises(GraphError, match=r"%l0\.attn"):
        rotate(unread)


def test_identity_covers_weights_graph_and_nothing_else() -> None:
    config, weights = tiny.random_model("smollm2")
    graph = tiny.stages(config, weights)["fuse_residual"]
    source = Materializer(weights)
    first = identity(graph, source)
    assert first == identity(graph, Materializer(weights))
    _, other = tiny.random_model("smollm2", seed=1)
    assert first != identity(graph, Materializer(other))
    assert first != identity(replace(graph, context=77), source)
    backwards = IdentityHasher(graph)
    for param in reversed(list(graph.params())):
        whole = source.whole(param)
        if isinstance(whole, RowTensor):  # one row at a time, params in another order
            for at in range(param.shape[0]):
                row = slice(at, at + 1)
                backwards.add(param, RowTensor(whole.q[row], whole.scale[row]))
        else:
            backwards.add(param, whole)
    assert backwards.hexdigest() == first
