"""In: what a configuration says about positions. Out: Rope: the scaling of rotary frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from openlpu.errors import CheckpointError, UnsupportedModel
from openlpu.load.fields import Fields, shown

RopeKind = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: pair i of a head turns by theta**(-2i/head_dim) radians a position, scaled.

    Pairs are (i, i + head_dim/2). The fields after `kind` hold for the kinds that read them.
    """

    theta: float
    kind: RopeKind = "none"
    factor: float = 1.0
    """linear, llama3, yarn: how far the context is stretched."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor are kept."""
    original_context: int = 0
    """llama3, yarn: positions the model was trained on before it was stretched."""
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; None means 1 + ln(factor) / 10."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this over original_context are kept."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this over original_context are divided by `factor`."""
    truncate: bool = True
    """yarn: round the two pair indices between which it blends outwards to whole pairs."""
    freq_divisors: tuple[float, ...] | None = None
    """One divisor per pair, applied to its frequency; how GGUF stores llama3 scaling."""


_ROPE_KEYS: dict[RopeKind, frozenset[str]] = {
    "none": frozenset({"factor"}),  # some files keep a factor they do not use
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",  # says how the model was made; changes nothing
        }
    ),
}


def rope_from_hf(read: Fields, context: int) -> Rope:
    """rope_parameters, or the older rope_theta and rope_scaling beside each other."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(read.values.get(key, {}), dict):
            raise CheckpointError(f"config.json: {key} is not an object")
    # The order in which the reference implementation prefers them.
    given = read.values.get("rope_scaling") or read.values.get("rope_parameters") or {}
    scaling = Fields({k: v for k, v in given.items() if v is not None}, "config.json", "rope ")
    theta_in = scaling if "rope_theta" in scaling.values else read
    theta = theta_in.number("rope_theta", 10000.0, low=1.0, high=1e15)
    named = scaling.text("rope_type", scaling.text("type", "default"))
    kind = cast(RopeKind, "none" if named == "default" else named)
    if kind not in _ROPE_KEYS:
        raise UnsupportedModel(
            f"config.json: rope type {shown(named)} is not supported; "
            f"supported are default, {', '.join(k for k in _ROPE_KEYS if k != 'none')}"
        )
    if scaling.values.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedModel("config.json: partial_rotary_factor other than 1 is not supported")
    general = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    unknown = sorted(set(map(str, scaling.values)) - general - _ROPE_KEYS[kind])
    if unknown:
        raise UnsupportedModel(f"config.json: rope option {shown(unknown[0])} is not supported")
    if kind == "none":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=_stretch(scaling))
    # A key beside the rope parameters takes precedence over one in them.
    key = "original_max_position_embeddings"
    original = (read if key in read.values else scaling).integer(key, context, high=2**27)
    if kind == "llama3":
        low = scaling.number("low_freq_factor", low=1e-6, high=1e6)
        high = scaling.number("high_freq_factor", low=1e-6, high=1e6)
        return _llama3(theta, _stretch(scaling), low, high, original)
    factor = _stretch(scaling, context / original)
    return Rope(
        theta,
        "yarn",
        factor=factor,
        original_context=original,
        attention_factor=_attention_factor(scaling),
        beta_fast=scaling.number("beta_fast", 32.0, low=0.0, high=1e6) or 32.0,
        beta_slow=scaling.number("beta_slow", 1.0, low=0.0, high=1e6) or 1.0,
        truncate=scaling.flag("truncate", True),
    )


def _attention_factor(scaling: Fields) -> float | None:
    """What yarn multiplies cosines and sines with; None for its usual 1 + ln(factor) / 10."""
    if "attention_factor" in scaling.values:
        return scaling.number("attention_factor", low=1e-6, high=1e6)
    mscale = scaling.number("mscale", 0.0, low=0.0, high=1e6)
    all_dim = scaling.number("mscale_all_dim", 0.0, low=0.0, high=1e6)
    if not (mscale and all_dim):
        return None
    if mscale != all_dim:
        raise UnsupportedModel(
            "config.json: rope mscale other than mscale_all_dim is not supported"
        )
    return 1.0


def rope_from_gguf(read: Fields, context: int, divisors: tuple[float, ...] | None) -> Rope:
    """The keys rope.*, and the divisors that GGUF keeps as a tensor."""
    theta = read.number("rope.freq_base", 10000.0, low=1.0, high=1e15)
    older = read.number("rope.scale_linear", 0.0, low=0.0, high=1e6)
    factor = read.number("rope.scaling.factor", older, low=0.0, high=1e6) or 1.0
    # A factor without a type means linear scaling.
    kind = read.text("rope.scaling.type", "linear")
    original = read.integer("rope.scaling.original_context_length", context, high=2**27)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return Rope(theta, freq_divisors=divisors)
    if kind == "linear":
        return Rope(theta, "linear", factor=factor, freq_divisors=divisors)
    if kind == "yarn":
        return Rope(
            theta,
            "yarn",
            factor=factor,
            original_context=original,
            beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0, low=1e-6, high=1e6),
            beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0, low=1e-6, high=1e6),
            freq_divisors=divisors,
        )
    raise UnsupportedModel(
        f"GGUF metadata: rope scaling {shown(kind)} is not supported; "
        "supported are none, linear, yarn"
    )


def _stretch(scaling: Fields, default: float | None = None) -> float:
    return scaling.number("factor", default, low=1e-6, high=1e6)


def _llama3(theta: float, factor: float, low: float, high: float, original: int) -> Rope:
    if high <= low:
        raise CheckpointError(
            f"config.json: rope high_freq_factor {high} is not above low_freq_factor {low}"
        )
    return Rope(
        theta,
        "llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=original,
    )
