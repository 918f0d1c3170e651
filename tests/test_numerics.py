"""In: random and extreme values. Out: the contract's functions against wider arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openlpu.numerics import CHUNK, GROUP, functions, quant, rope
from openlpu.numerics.attention import attend, softmax_factor

F32 = np.float32
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=any_float)


def units_apart(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error in units of the last place of float32 at the exact value."""
    return np.abs(got.astype(np.longdouble) - exact) / np.spacing(np.abs(exact).astype(F32))


def test_exp2_is_within_two_units() -> None:
    t = np.linspace(-126, 126, 2_000_001, dtype=np.float64).astype(F32)
    assert units_apart(functions.exp2(t), np.exp2(t.astype(np.longdouble))).max() < 2.0


def test_exp2_every_fourth_float_of_one_octave() -> None:
    t = np.arange(0x3E800000, 0x3F000000 + 1, 4, dtype=np.uint32).view(F32)  # 1/4 to 1/2
    for values in (t, -t):
        exact = np.exp2(values.astype(np.float64))  # ten thousand times finer than the bound
        assert units_apart(functions.exp2(values), exact).max() < 2.0


def test_exp2_ends() -> None:
    t = np.array([-np.inf, -1e30, -126, 126, 1e30, np.inf, np.nan, 0.0, -0.0, 3.0, -7.0], F32)
    expected = [2.0**-126] * 3 + [2.0**126] * 3 + [2.0**-126, 1, 1, 8, 2**-7]
    assert functions.exp2(t).tolist() == expected


def test_silu_against_float64() -> None:
    g = np.linspace(-80, 80, 200_001).astype(F32)
    exact = g.astype(np.float64) / (1 + np.exp(-g.astype(np.float64)))
    np.testing.assert_allclose(functions.silu(g), exact, rtol=1e-5, atol=1e-35)


@given(rows)
def test_quantize_is_nearest_and_bounded(x: np.ndarray) -> None:
    q, scale = quant.quantize(x)
    assert np.abs(q.astype(int)).max(initial=0) <= 127
    amax = np.abs(x).max(axis=1)
    tiny = amax < quant.TINY
    assert (scale[tiny] == 0).all()
    assert (q[tiny] == 0).all()
    error = np.abs(q * scale[:, None].astype(np.float64) - x)
    assert (error[~tiny] <= (amax[~tiny] / 254 * 1.0001)[:, None]).all()


def test_infinities_and_nans_poison_their_row() -> None:
    x = np.ones((3, 8), F32)
    x[0, 3], x[1, 0] = np.inf, np.nan
    q, scale = quant.quantize(x)
    assert np.isnan(scale[:2]).all()
    assert (q[:2] == 0).all()
    assert (q[2] == 127).all()


@given(hnp.arrays(np.float64, (3, 16), elements=st.floats(-1e30, 1e30)))
def test_weights_round_to_the_nearest_step(w: np.ndarray) -> None:
    q, scale = quant.quantize_weight(w)
    used = scale > 0
    error = np.abs(q * scale[:, None].astype(np.float64) - w)
    assert (error[used] <= (scale[used].astype(np.float64) * 0.50001)[:, None]).all()


@pytest.mark.parametrize("width", [16, 1024, 1040, 5000])
def test_integer_products_are_exact(width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.integers(-127, 128, (5, width), dtype=np.int8)
    w = rng.integers(-127, 128, (7, width), dtype=np.int8)
    x[0], w[0] = 127, -127  # the largest sum there is
    assert np.array_equal(quant.exact_dot(x, w), x.astype(np.int64) @ w.T.astype(np.int64))


def test_grouped_linear_against_float64() -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (3, 128), dtype=np.int8)
    w = rng.integers(0, 16, (5, 128), dtype=np.int8)
    scale, w_scale, w_min = (rng.random(s).astype(F32) for s in ((3, 4), (5, 4), (5, 4)))
    wide = w * np.repeat(w_scale.astype(np.float64), GROUP, 1) + np.repeat(w_min, GROUP, 1)
    exact = (q * np.repeat(scale.astype(np.float64), GROUP, 1)) @ wide.T
    got = quant.grouped_linear(q, scale, w, w_scale, w_min, group=GROUP)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-3)


@given(
    hnp.arrays(np.float32, (3, 64), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([1e-5, 1e-6]),
)
def test_norm_is_float64s_to_16_bits(x: np.ndarray, eps: float) -> None:
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps)
    got = functions.rmsnorm(x, None, eps=eps)
    # v carries the row in steps of amax/32512; the root halves the relative error of the sum.
    np.testing.assert_allclose(got, exact, rtol=3e-4, atol=1e-6)


def test_norm_of_heads_is_the_norm_of_each() -> None:
    rng = np.random.default_rng(1)
    x, gain = rng.standard_normal((4, 96)).astype(F32), rng.standard_normal(32).astype(F32)
    whole = functions.rmsnorm(x, gain, eps=1e-6, heads=3)
    parts = [functions.rmsnorm(x[:, i : i + 32], gain, eps=1e-6) for i in (0, 32, 64)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))


def test_hadamard_of_16_against_the_matrix() -> None:
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]) / 4
    x = np.random.default_rng(2).integers(-8, 8, (3, 48)).astype(F32)
    exact = (x.reshape(3, 3, 16) @ matrix).reshape(3, 48)
    assert np.array_equal(functions.hadamard_blocks(x), exact)  # small integers: nothing rounds


@pytest.mark.parametrize("theta", [10000.0, 1e6, 5e8])
def test_rope_tables_at_far_positions(theta: float) -> None:
    """mpmath is not needed: the angle modulo a turn is exact in Python integers and Fractions."""
    from fractions import Fraction
    from math import cos, pi, sin

    base = rope.base_frequencies(theta, 64)
    turns = rope.turns(base)
    for i in (0, 1, 9, 31):
        assert float(base[i]) == pytest.approx(theta ** (-2 * i / 64), rel=1e-13)
    positions = np.array([0, 1, 2, 1000, 131071, 999_999, 1_000_000], np.int64)
    cosine, sine = rope.cos_sin(turns, positions)
    two_pi = Fraction(6283185307179586476925286766559005768394, 10**39)
    for r, position in enumerate(positions.tolist()):
        for i in range(32):
            turn = (Fraction(base[i]) / two_pi * position) % 1
            angle = 2 * pi * float(turn)
            assert cosine[r, i] == pytest.approx(cos(angle), abs=4e-8)
            assert sine[r, i] == pytest.approx(sin(angle), abs=4e-8)


def test_rope_turns_pairs_half_a_head_apart() -> None:
    x = np.zeros((1, 8), F32)
    x[0, 1] = 1.0  # pair (1, 3) of head 0
    cosine, sine = np.full((1, 2), 0.6, F32), np.full((1, 2), 0.8, F32)
    assert rope.rotate(x, cosine, sine, heads=2)[0].tolist() == pytest.approx(
        [0, 0.6, 0, 0.8, 0, 0, 0, 0]
    )


def attention_case(seed: int, length: int, dim: int = 32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((length, dim)).astype(F32) for _ in range(3))
    return (*quant.quantize(2 * q), *quant.quantize(2 * k), *quant.quantize(v))


@pytest.mark.parametrize("window", [0, 5, 400])
@pytest.mark.parametrize("length", [1, 63, 320, 321, 700])
def test_attention_against_float64(length: int, window: int) -> None:
    """Against float64 attention over the same int8 rows: what is left are 7-bit probabilities."""
    q, q_scale, k, k_scale, v, v_scale = case = attention_case(length, length)
    positions = np.arange(length)
    got = attend(*case, positions, factor=softmax_factor(32), window=window)
    wide = [
        a.astype(np.float64) * s[:, None] for a, s in ((q, q_scale), (k, k_scale), (v, v_scale))
    ]
    scores = wide[0] @ wide[1].T / np.sqrt(32)
    hidden = positions[None, :] > positions[:, None]
    if window:
        hidden |= positions[None, :] <= positions[:, None] - window
    scores[hidden] = -np.inf
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = (e / e.sum(axis=1, keepdims=True)) @ wide[2]
    assert np.abs(got - exact).max() < 0.08
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.01


@given(st.integers(0, 1000), st.integers(1, 700))
@settings(max_examples=20)
def test_an_attention_row_is_alone(seed: int, length: int) -> None:
    case = attention_case(seed, length)
    positions = np.arange(length)
    factor = softmax_factor(32)
    whole = attend(*case, positions, factor=factor, window=0)
    r = seed % length
    q, q_scale, *kept = case
    seen = [part[: r + 1] for part in kept]  # later positions are not there yet
    row = attend(
        q[r : r + 1], q_scale[r : r + 1], *seen, positions[r : r + 1], factor=factor, window=0
    )
    assert np.array_equal(row[0], whole[r])


def test_a_chunk_of_ones_is_exact() -> None:
    """Equal scores, equal values: the mean comes out to the last bit, over two chunks too."""
    length = 2 * CHUNK
    q, k = np.zeros((1, 32), np.int8), np.zeros((length, 32), np.int8)
    v = np.full((length, 32), 127, np.int8)
    one, ones = np.ones(1, F32), np.ones(length, F32)
    got = attend(q, one, k, ones, v, ones, np.array([length - 1]), factor=1.0, window=0)
    np.testing.assert_allclose(got, 127.0, rtol=2e-7)
