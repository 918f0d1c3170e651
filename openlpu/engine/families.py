"""In: the name of a family. Out: a tiny model of it with random weights, compiled.

The sizes are odd on purpose: grouped heads, dims that are no power of two, a window, biases, scaled
rope, so that a kernel that only fits round sizes is found out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.compiled import Compiled, Precision, compile_weights
from openlpu.engine.sampler import random_bits
from openlpu.load.config import ModelConfig
from openlpu.load.rope import Rope
from openlpu.load.weights import ArrayWeights
from openlpu.models import build

_LLAMA = ModelConfig(
    arch="llama",
    vocab_size=272,
    dim=96,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=16,
    ffn_dim=160,
    norm_eps=1e-5,
    context=1024,
    rope=Rope(theta=10_000.0),
    tied=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None, None),
)

FAMILIES: dict[str, ModelConfig] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, arch="mistral", windows=(24, 24), tied=False, heads=4, head_dim=32),
    "qwen2": replace(_LLAMA, arch="qwen2", qkv_bias=True, dim=80, heads=5, kv_heads=1),
    "qwen3": replace(
        _LLAMA, arch="qwen3", qk_norm=True, head_dim=32, rope=Rope(1e6, "linear", factor=2.0)
    ),
}


def random_model(family: str, *, precision: Precision = "w8") -> Compiled:
    """A compiled model of FAMILIES[family]; the weights are the same on every machine."""
    config = FAMILIES[family]
    return compile_weights(config, random_weights(config), precision=precision)


def random_weights(config: ModelConfig) -> ArrayWeights:
    """Weights for every tensor of the configuration."""
    arrays = {}
    for index, param in enumerate(build(config).params()):
        if param.source not in arrays:
            arrays[param.source] = _weights(param.shape, index)
    return ArrayWeights(arrays)


def _weights(shape: tuple[int, ...], key: int) -> NDArray[np.float32]:
    """Sums of uniform numbers: about normal, made of integers only. Gains and biases near 1."""
    count = int(np.prod(shape))
    # One Philox draw keys a splitmix64 stream: a draw for each weight would take seconds.
    z = np.arange(count, dtype=np.uint64) + np.uint64(random_bits(key, 0))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    quarters = z.view(np.int16).reshape(count, 4).astype(np.float32) / np.float32(2**15)
    values: NDArray[np.float32] = quarters.sum(axis=1, dtype=np.float32).reshape(shape)
    if len(shape) == 1:
        values = np.float32(1.0) + np.float32(0.25) * values
    else:
        values *= np.float32(shape[1] ** -0.5)
    return values
