"""In: random models, batches of every shape. Out: a row's bits depend on its own sequence only."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny_models as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from openlpu.errors import RequestError
from openlpu.reference import Reference

FAMILIES = ("llama", "mistral", "qwen3", "llama w4")


@functools.cache
def model(family: str) -> Reference:
    """The compiled model; "w4" after its name stores it in blocks."""
    config, weights = tiny.random_model(family.split()[0])
    if family.endswith("w4"):
        return tiny.reference(config, tiny.in_blocks(weights), "w4")
    return tiny.reference(config, weights)


@functools.cache
def alone(family: str, count: int, seed: int) -> np.ndarray:
    """Logits of a random sequence, in one step, by itself."""
    return tiny.feed(model(family), tiny.random_tokens(count, seed=seed))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_single_tokens_change_nothing(family: str) -> None:
    tokens = tiny.random_tokens(40, seed=1)
    expected = alone(family, 40, 1)
    for cuts in ((1,), (7, 14, 21, 28, 35), (39,), tuple(range(1, 40))):
        assert same_bits(tiny.feed(model(family), tokens, cuts=cuts), expected), cuts


def test_a_prompt_over_several_chunks_of_attention() -> None:
    """700 positions: three chunks of 320, and a window that starts inside one."""
    for family in ("llama", "mistral"):
        expected = alone(family, 700, 2)
        tokens = tiny.random_tokens(700, seed=2)
        cut = tiny.feed(model(family), tokens, cuts=(64, 319, 320, 321, 640, 699))
        assert same_bits(cut, expected)


@given(seed=st.integers(0, 2**32), family=st.sampled_from(FAMILIES))
@settings(max_examples=15)
def test_neighbours_change_nothing(seed: int, family: str) -> None:
    """Random interleavings of up to four sequences; every row is the row of its sequence alone."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, rng.integers(2, 5)).tolist()
    sequences = [tiny.random_tokens(n, seed=10 + i) for i, n in enumerate(lengths)]
    expected = [alone(family, n, 10 + i) for i, n in enumerate(lengths)]
    reference, done = model(family), [0] * len(sequences)
    for slot in range(len(sequences)):
        reference.reset(slot)
    while done != lengths:
        rows = []
        for slot, tokens in enumerate(sequences):
            count = int(rng.integers(0, len(tokens) - done[slot] + 1))
            rows += [(slot, done[slot] + i, tokens[done[slot] + i]) for i in range(count)]
            done[slot] += count
        if not rows:
            continue
        rows = in_order_of_position([rows[i] for i in rng.permutation(len(rows))])
        logits = reference.step(tiny.step(rows))
        for row, (slot, position, _) in zip(logits, rows, strict=True):
            assert same_bits(row, expected[slot][position])


def in_order_of_position(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Keep the places of each slot, but fill them in ascending order of position."""
    waiting = {slot: sorted(r for r in rows if r[0] == slot) for slot, _, _ in rows}
    return [waiting[slot].pop(0) for slot, _, _ in rows]


def test_only_wanted_rows_come_back() -> None:
    tokens = tiny.random_tokens(9, seed=3)
    expected = alone("llama", 9, 3)
    reference = model("llama")
    reference.reset(0)
    rows = [(0, p, t) for p, t in enumerate(tokens)]
    assert same_bits(reference.step(tiny.step(rows, [2, 8])), expected[[2, 8]])
    reference.reset(0)
    assert reference.step(tiny.step(rows, [])).shape == (0, expected.shape[1])


def test_a_sequence_goes_back_and_takes_another_way() -> None:
    reference, tokens = model("llama"), tiny.random_tokens(20, seed=4)
    tiny.feed(reference, tokens)
    other = [*tokens[:10], *tiny.random_tokens(5, seed=5)]
    again = reference.step(tiny.step([(0, p, other[p]) for p in range(10, 15)]))
    assert same_bits(again, tiny.feed(reference, other)[10:])


def test_a_gap_is_refused() -> None:
    reference = model("llama")
    reference.reset(0)
    with pytest.raises(RequestError, match="do not continue its 0 positions"):
        reference.step(tiny.step([(0, 3, 1)]))


def test_an_infinite_row_poisons_nobody_else() -> None:
    config, weights = tiny.random_model("llama", vocab_size=4)
    arrays = {name: weights.rows(name) for name in weights.names()}
    arrays["layers.0.gate"] = arrays["layers.0.gate"] * np.float32(1e20)
    arrays["layers.0.up"] = arrays["layers.0.up"] * np.float32(1e19)
    broken = tiny.reference(config, type(weights)(arrays))
    assert np.isnan(broken.step(tiny.step([(0, 0, 1)]))).all()
    # A table row of zeros is the one token that stays finite beside it.
    arrays["embed"] = arrays["embed"].copy()
    arrays["embed"][0] = 0.0
    for name in ("q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias"):
        for layer in range(config.layers):
            arrays[f"layers.{layer}.{name}"] = np.zeros_like(arrays[f"layers.{layer}.{name}"])
    mixed = tiny.reference(config, type(weights)(arrays))
    calm = mixed.step(tiny.step([(0, 0, 0)]))
    both = mixed.step(tiny.step([(1, 0, 0), (2, 0, 1)]))
    assert same_bits(both[0], calm[0])
    assert np.isnan(both[1]).all()
