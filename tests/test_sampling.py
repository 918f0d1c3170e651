"""In: logits and requests. Out: the sampler draws what the exact distribution says."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from openlpu.engine.sampler import (
    WEIGHT_BITS,
    candidates,
    choose,
    penalize,
    philox,
    random_bits,
    weigh,
)
from openlpu.engine.sampling import FIELDS, Sampling, sampling_from
from openlpu.errors import NumericOverflow, RequestError
from openlpu.numerics.functions import exp2

F32 = NDArray[np.float32]


def row(*values: float) -> F32:
    return np.array(values, np.float32)


def random_row(seed: int, size: int, *, spread: float = 3.0) -> F32:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter: Any, key: Any, expected: Any) -> None:
    """The known-answer vectors that come with Random123."""
    assert philox(counter, key) == expected


def test_each_seed_and_position_has_its_own_bits() -> None:
    seeds = (0, 1, 2**32, 2**64 - 1)
    found = {random_bits(seed, position) for seed in seeds for position in range(500)}
    assert len(found) == 2000
    assert max(found) < 2**64


def test_weights_are_the_contract_s_exp2() -> None:
    t = -np.abs(random_row(1, 20_000, spread=20.0))
    expected = np.rint(exp2(t) * np.float32(2.0**WEIGHT_BITS))
    assert np.array_equal(weigh(t.copy()), expected)
    assert expected.max() <= 2**WEIGHT_BITS


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_weights_are_softmax(temperature: float) -> None:
    logits = random_row(2, 1000)
    _, weights = candidates(logits, Sampling(temperature=temperature))
    wide = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    assert np.allclose(share, wide / wide.sum(), rtol=1e-5, atol=1e-7)


def test_draws_follow_the_exact_distribution() -> None:
    """Chi-squared over 4,000 positions; the seed is fixed, so the test cannot flicker."""
    logits = random_row(3, 20, spread=1.0)
    sampling = Sampling(temperature=0.8, seed=7)
    ids, weights = candidates(logits, sampling)
    expected = weights.astype(np.float64) / weights.sum(dtype=np.float64) * 4000
    drawn = [choose(logits, sampling, tokens=range(n), prompt_length=0) for n in range(4000)]
    counts = np.bincount(drawn, minlength=20)[ids]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 43.8  # 0.1 % of 19 degrees of freedom


def test_the_draw_is_the_running_sum_in_order_of_ids() -> None:
    logits = random_row(4, 3000)
    sampling = Sampling(temperature=1.0, seed=11)
    ids, weights = candidates(logits, sampling)
    whole = [int(w) for w in weights]
    for position in range(1, 60):
        target = random_bits(11, position) * sum(whole) >> 64
        running, index = whole[0], 0
        while running <= target:
            index += 1
            running += whole[index]
        got = choose(logits, sampling, tokens=[0] * position, prompt_length=0)
        assert got == ids[index]


@given(
    st.lists(st.integers(-40, 0), min_size=1, max_size=600),
    st.integers(0, 40),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
@settings(max_examples=150)
def test_what_is_kept_is_what_the_definition_keeps(
    quarters: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    """Many ties on purpose: the lowest id wins them."""
    logits = np.array(quarters, np.float32) / np.float32(4.0)
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    _, plain = candidates(logits, Sampling(temperature=1.0))
    weights = {i: int(w) for i, w in enumerate(plain)}
    order = sorted(range(len(quarters)), key=lambda i: (-quarters[i], i))
    kept = order[:top_k] if top_k else order
    if top_p < 1.0:
        need = math.ceil(Fraction(top_p) * sum(weights[i] for i in kept))
        running, count = 0, 0
        while running < need:
            running += weights[kept[count]]
            count += 1
        kept = kept[:count]
    kept = [i for i in kept if weights[i] >= Fraction(min_p) * weights[order[0]]]
    ids, got = candidates(logits, sampling)
    assert ids.tolist() == sorted(kept)
    assert [int(w) for w in got] == [weights[i] for i in sorted(kept)]


def test_kept_tokens_and_penalties_agree_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = random_row(5, 800)
    scores = torch.tensor(logits)[None]
    ids = torch.tensor([[3, 5, 5, 9]])
    for warper, sampling in (
        (theirs.TopKLogitsWarper(13), Sampling(temperature=1.0, top_k=13)),
        (theirs.TopPLogitsWarper(0.8), Sampling(temperature=1.0, top_p=0.8)),
        (theirs.MinPLogitsWarper(0.05), Sampling(temperature=1.0, min_p=0.05)),
    ):
        kept = torch.isfinite(warper(ids, scores.clone()))[0].nonzero()[:, 0].tolist()
        assert candidates(logits, sampling)[0].tolist() == kept
    repetition = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())[0].numpy()
    ours = penalize(logits, Sampling(repetition_penalty=1.3), tokens=[3, 5, 5, 9], prompt_length=4)
    assert np.array_equal(ours, repetition)


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = row(1.0, 1.0, 1.0, 1.0)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    got = penalize(logits, sampling, tokens=[0, 0, 1, 2, 2], prompt_length=2)
    assert got.tolist() == [1.0, 0.25, 0.0, 1.0]
    assert logits.tolist() == [1.0] * 4


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert choose(row(0, 2, 2, 1), Sampling(), tokens=[1], prompt_length=1) == 1
    nearly = Sampling(temperature=1e-9, seed=1)
    assert choose(row(0, 2, 2, 1), nearly, tokens=[1], prompt_length=1) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=1)
    with pytest.raises(NumericOverflow, match="position 2"):
        choose(row(0, 1, bad), sampling, tokens=[1, 1, 1], prompt_length=1)


def test_a_tiny_temperature_does_not_overflow() -> None:
    sampling = Sampling(temperature=2.0**-20, seed=3)
    assert choose(row(-3e38, 5, 3e38), sampling, tokens=[0], prompt_length=1) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 101),
        ("frequency_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", ("x" * 1001,)),
        ("stop", ("x",) * 65),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        sampling_from({field: value})


def test_an_unknown_option_lists_the_known() -> None:
    with pytest.raises(RequestError, match=r"temprature.*temperature"):
        sampling_from({"temprature": 1.0})
    assert sampling_from({"stop": "x"}).stop == ("x",)
    assert "max_tokens" in FIELDS
