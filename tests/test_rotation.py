"""In: orders of matrices, random matrices. Out: the turns are orthogonal and bit-reproducible."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_models as tiny

from openlpu.errors import CheckpointError, GraphError
from openlpu.graph import F32Tensor, GroupedTensor, Param, RowTensor, Step
from openlpu.load.weights import ENCODINGS, ArrayWeights, Tensor, Weights
from openlpu.numerics import rotation
from openlpu.passes import recipe
from openlpu.passes.recipe import Materializer

ORDERS = (1, 2, 12, 16, 20, 28, 64, 96, 112, 128, 336, 576, 960)


@pytest.mark.parametrize("order", sorted(rotation.PALEY))
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = np.array(rotation.PALEY[order])
    assert set(np.unique(matrix)) == {-1, 1}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))


def dense(order: int, seed: int) -> np.ndarray:
    """D H^T / sqrt(n), from the definition: Kronecker products of small matrices."""
    matrix = np.ones((1, 1))
    for factor in rotation.factors(order):
        part = rotation.PALEY.get(factor) or [
            [(-1) ** (i & j).bit_count() for j in range(factor)] for i in range(factor)
        ]
        matrix = np.kron(matrix, np.array(part, float))
    return rotation.signs(order, seed=seed)[:, None] * matrix.T / np.sqrt(order)


@pytest.mark.parametrize("order", ORDERS)
def test_rotation_is_the_matrix(order: int) -> None:
    matrix = dense(order, 7)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)
    x = np.random.default_rng(order).standard_normal((5, order))
    np.testing.assert_allclose(rotation.rotate_last(x, seed=7), x @ matrix, atol=1e-12)
    first = rotation.rotate_first(np.ascontiguousarray(x.T), seed=7)
    assert np.array_equal(first, rotation.rotate_last(x, seed=7).T)


def test_other_orders_turn_in_blocks() -> None:
    assert rotation.block_order(7 * 16) == 112  # 28 x 4
    assert rotation.block_order(11 * 16) == 16
    x = np.random.default_rng(0).standard_normal((3, 11 * 16))
    y = rotation.rotate_last(x)
    np.testing.assert_allclose((y * y).sum(axis=1), (x * x).sum(axis=1))
    assert not np.allclose(y, x)


def test_the_bits_are_pinned() -> None:
    """Exact on any machine, as long as the order of additions stays; a change is a new contract."""
    x = (np.arange(4 * 576).reshape(4, 576) * 7919 % 1009 - 504.0) / 3.0
    turned = [
        rotation.rotate_last(x),
        rotation.rotate_heads_last(x, 9),
        rotation.hadamard16_last(x),
    ]
    digest = hashlib.sha256(b"".join(y.tobytes() for y in turned)).hexdigest()
    assert digest == "d140517445151a90d4873ee510db2936d57a957f49a37eeb17ac8e22ca373dce"


@pytest.mark.parametrize("cached", [1 << 6, 1 << 10, 1 << 20])
def test_cache_blocks_change_nothing(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((37, 576))
    expected = rotation.rotate_last(x), rotation.rotate_first(x), rotation.hadamard16_last(x)
    monkeypatch.setattr(rotation, "_CACHED_VALUES", cached)
    got = rotation.rotate_last(x), rotation.rotate_first(x), rotation.hadamard16_last(x)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 30])
def test_blocks_of_rows_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = tiny.random_model("llama")
    graph = tiny.stages(config, weights)["fuse_residual"]
    source = Materializer(weights)
    expected = {param: source.whole(param) for param in graph.params()}
    monkeypatch.setattr(recipe, "_VALUES_AT_ONCE", at_once)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(source.whole, expected))
    for (param, first), second in zip(expected.items(), found, strict=True):
        assert type(first) is type(second)
        if isinstance(first, RowTensor) and isinstance(second, RowTensor):
            assert first.q.shape == param.shape
            assert np.array_equal(first.q, second.q)
            assert np.array_equal(first.scale, second.scale)
        elif isinstance(first, F32Tensor) and isinstance(second, F32Tensor):
            assert np.array_equal(first.value, second.value)


def test_every_step_is_its_matrix() -> None:
    rng = np.random.default_rng(3)
    w, gain, bias = rng.standard_normal((64, 96)), rng.standard_normal(96), rng.standard_normal(64)
    w, gain, bias = (a.astype(np.float32) for a in (w, gain, bias))
    source = Materializer(ArrayWeights({"w": w, "g": gain, "b": bias}))
    hadamard = np.kron(np.eye(6), np.array(dense(16, 0) * rotation.signs(16, seed=0)[:, None]))
    steps = {
        Step("gain", ("g",)): w * gain,
        Step("rotate_in", (5,)): w @ dense(96, 5),
        Step("rotate_out", (5,)): dense(64, 5).T @ w,
        Step("heads_in", (3, 5)): w @ np.kron(np.eye(3), dense(32, 5)),
        Step("heads_out", (4, 5)): np.kron(np.eye(4), dense(16, 5)).T @ w,
        Step("hadamard_in"): w @ hadamard,
    }
    for step, expected in steps.items():
        got = source.whole(Param("w", (64, 96), "f32", "w", (step,)))
        assert isinstance(got, F32Tensor)
        np.testing.assert_allclose(got.value, expected, atol=2e-6)
    turned = source.whole(Param("b", (64,), "f32", "b", (Step("rotate_out", (5,)),)))
    assert isinstance(turned, F32Tensor)
    np.testing.assert_allclose(turned.value, dense(64, 5).T @ bias, atol=1e-6)


def test_what_is_wrong_is_named() -> None:
    source = Materializer(ArrayWeights({"w": np.full((4, 32), 3e38), "g": np.full(32, 3.0)}))
    with pytest.raises(CheckpointError, match=r"w has shape \[4, 32\], the configuration says"):
        source.whole(Param("w", (4, 16), "w8", "w"))
    with pytest.raises(GraphError, match="recipe step polish"):
        source.whole(Param("w", (4, 32), "w8", "w", (Step("polish"),)))
    with pytest.raises(CheckpointError, match="w: a row leaves the range of float32"):
        source.whole(Param("w", (4, 32), "f32", "w", (Step("gain", ("g",)),)))
    with pytest.raises(CheckpointError, match="beyond q8_0 blocks"):
        source.whole(Param("w", (4, 32), "q8_0", "w"))
    with pytest.raises(GraphError, match="w is not stored as q4_0"):
        source.whole(Param("w", (4, 32), "q4_0", "w"))


def stored(kind: str, data: np.ndarray) -> Weights:
    form = ENCODINGS[kind]
    width = data.shape[1] // form.block_bytes * form.block_elements
    return Weights({"w": Tensor((data.shape[0], width), kind, data)}, fingerprint="none")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_blocks_import_to_the_bit(kind: str) -> None:
    """q * scale (+ minimum) in float32 is what the gguf package dequantizes, for any bytes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (7, 5 * ENCODINGS[kind].block_bytes), dtype=np.uint8)
    halves = data.reshape(7, 5, -1)[..., : 4 if kind == "q4_1" else 2].view(np.float16)
    halves[...] = rng.standard_normal(halves.shape)
    tensor = Materializer(stored(kind, data)).whole(Param("w", (7, 160), kind, "w"))
    assert isinstance(tensor, GroupedTensor)
    blocks = tensor.q.reshape(7, 5, 32).astype(np.float32) * tensor.scale[..., None]
    if tensor.minimum is not None:
        blocks = blocks + tensor.minimum[..., None]
    assert np.array_equal(
        blocks.reshape(7, 160), dequantize(data, GGMLQuantizationType[kind.upper()])
    )


def test_other_encodings_become_q8_0() -> None:
    w = np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32)
    w[2] = 0.0
    tensor = Materializer(ArrayWeights({"w": w})).whole(Param("w", (6, 64), "q8_0", "w"))
    assert isinstance(tensor, GroupedTensor)
    assert np.array_equal(tensor.scale, tensor.scale.astype(np.float16))  # half precision holds it
    back = tensor.q.reshape(6, 2, 32) * tensor.scale[..., None].astype(np.float64)
    amax = np.abs(w.reshape(6, 2, 32)).max(axis=2, keepdims=True)
    assert (np.abs(back - w.reshape(6, 2, 32)) <= amax / 127 * 0.56).all()
