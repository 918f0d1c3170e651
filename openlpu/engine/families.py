"""In: the name of a family. Out: a tiny model of it with random weights, compiled.

The sizes are odd on purpose: grouped heads, dims that are no power of two, a window, biases,
scaled rope, so that a kernel that only fits round sizes is found out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.compiled import Compiled, Precision, compile_weights
from openlpu.engine.sampler import random_bits
from openlpu.load.config import ModelConfig
from openlpu.load.rope import Rope
from openlpu.load.weights import ENCODINGS, ArrayWeights, Encoding, Tensor, Weights
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
    "qwen2": replace(_LLAMA, arch="qwen2", qkv_bias=True, dim=160, heads=10, kv_heads=1),
    "qwen3": replace(
        _LLAMA, arch="qwen3", qk_norm=True, head_dim=32, rope=Rope(1e6, "linear", factor=2.0)
    ),
}


_BLOCKS = {"llama": "q4_0", "mistral": "q4_1", "qwen2": "q8_0", "qwen3": "q4_1"}


def random_model(
    family: str, *, precision: Precision = "w8", config: ModelConfig | None = None
) -> Compiled:
    """A compiled model of FAMILIES[family], or of another config of the family; the weights are the
    same on every machine.

    For w4 its matrices are stored in blocks: q4_0, q4_1 or q8_0, by family.
    """
    config = config or FAMILIES[family]
    weights: Weights = random_weights(config)
    if precision == "w4":
        weights = _in_blocks(config, weights, ENCODINGS[_BLOCKS[family]])
    return compile_weights(config, weights, precision=precision)


def random_weights(config: ModelConfig) -> ArrayWeights:
    """Float32 weights for every tensor of the configuration."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for index, param in enumerate(build(config).params()):
        if param.source not in arrays:
            arrays[param.source] = _values(param.shape, index)
    return ArrayWeights(arrays)


def _values(shape: tuple[int, ...], key: int) -> NDArray[np.float32]:
    """Sums of uniform numbers: about normal, made of integers only. Gains and biases near 1."""
    quarters = _bits(int(np.prod(shape)), key).view(np.int16).reshape(-1, 4)
    values: NDArray[np.float32] = quarters.astype(np.float32).sum(axis=1).reshape(shape)
    values *= np.float32(2.0**-15)
    if len(shape) == 1:
        values = np.float32(1.0) + np.float32(0.25) * values
    else:
        values *= np.float32(shape[1] ** -0.5)
    return values


def _in_blocks(config: ModelConfig, weights: Weights, encoding: Encoding) -> Weights:
    """The same vectors, but matrices of random blocks, in scale with the float ones."""
    tensors = {}
    for index, name in enumerate(weights.names()):
        shape = weights.shape(name)
        if len(shape) == 1:
            data = weights.rows(name).view(np.uint8)[None]
            tensors[name] = Tensor(shape, "f32", data)
            continue
        rows, width = shape
        blocks = width // encoding.block_elements
        words = _bits(rows * blocks * 8, index).view(np.uint8).reshape(rows, blocks, 64)
        data = words[..., : encoding.block_bytes].copy()
        levels = 127 if encoding.name == "q8_0" else 8
        halves = [width**-0.5 / levels, -(width**-0.5)][: 2 if encoding.name == "q4_1" else 1]
        header = np.array(halves, "<f2") * (1 + words[..., -1:] / np.float16(1024))
        data[..., : 2 * len(halves)] = header.astype("<f2").view(np.uint8)
        tensors[name] = Tensor(shape, encoding.name, data.reshape(rows, -1))
    return Weights(tensors, fingerprint=f"{config} {encoding.name}")


def _bits(count: int, key: int) -> NDArray[np.uint64]:
    """Random words by splitmix64, keyed by Philox: a Philox draw for each would take seconds."""
    z = np.arange(count, dtype=np.uint64) + np.uint64(random_bits(key, 0))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
