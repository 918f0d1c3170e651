"""In: tiny random models of every family. Out: the float graph gives what transformers gives."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from openlpu.errors import UnsupportedModel
from openlpu.graph import types
from openlpu.load.config import from_hf
from openlpu.load.rope import Rope
from openlpu.models import build
from openlpu.models.rope import rope_table
from openlpu.passes.recipe import Materializer
from openlpu.reference import Reference

TOKENS = tiny.random_tokens(70)


def differences(family: str, **options: Any) -> tuple[float, float]:
    """Largest difference of logits from transformers', whole and in chunks, as a share of the
    largest logit."""
    import torch

    model, config, weights = tiny.as_transformers(family, **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = Reference(build(config), Materializer(weights))
    whole = tiny.feed(ours, TOKENS)
    chunks = tiny.feed(ours, TOKENS, cuts=(1, 9, 32))
    scale = np.abs(expected).max()
    assert scale > 1.0, "the logits say nothing"
    return np.abs(whole - expected).max() / scale, np.abs(chunks - expected).max() / scale


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_agrees_with_transformers(family: str) -> None:
    assert max(differences(family)) < 2e-5


@pytest.mark.parametrize("scaling", tiny.SCALINGS)
def test_rope_scaling_agrees_with_transformers(scaling: str) -> None:
    rope = dict(tiny.SCALINGS[scaling])
    assert max(differences("llama", rope_parameters=rope, num_hidden_layers=1)) < 2e-5


@pytest.mark.parametrize("scaling", ["default", *tiny.SCALINGS])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_frequencies_agree_with_transformers(scaling: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = tiny.SCALINGS.get(scaling, {"rope_type": "default", "rope_theta": 500000.0})
    given = tiny.settings("llama", head_dim=head_dim, rope_parameters=dict(rope))
    theirs = LlamaConfig(**{k: v for k, v in given.items() if k != "model_type"})
    embedding = LlamaRotaryEmbedding(theirs)
    ours = rope_table(from_hf(given).rope, head_dim)
    np.testing.assert_allclose(
        np.array(ours.turns) * (2 * np.pi / 2**64), embedding.inv_freq.numpy(), rtol=1e-6
    )
    assert ours.magnitude == pytest.approx(embedding.attention_scaling, rel=1e-14)


def test_divisors_are_llama3_scaling() -> None:
    """GGUF stores llama3 scaling as one divisor per pair: both spellings give one table."""
    scaled = Rope(
        10000.0,
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=64,
    )
    table, plain = rope_table(scaled, 32), rope_table(Rope(10000.0), 32)
    divisors = tuple(p / s for p, s in zip(plain.turns, table.turns, strict=True))
    divided = rope_table(Rope(10000.0, freq_divisors=divisors), 32)
    np.testing.assert_allclose(divided.turns, table.turns, rtol=1e-14)


def test_yarn_needs_frequencies_that_differ() -> None:
    with pytest.raises(UnsupportedModel, match=r"yarn with rope theta 1\.0"):
        rope_table(Rope(1.0, "yarn", factor=2.0, original_context=32), 16)


def test_only_wanted_rows_reach_the_head() -> None:
    config, _ = tiny.random_model("llama")
    known = types(build(config))
    assert known["logits"].rows == known["last"].rows == "L"


def test_a_tied_head_is_the_table() -> None:
    config, _ = tiny.random_model("smollm2")
    sources = {param.name: param.source for param in build(config).params()}
    assert sources["head"] == "embed"
