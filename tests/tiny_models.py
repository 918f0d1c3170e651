"""In: an architecture and options. Out: tiny random models in memory, and batches to run them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.compiler import compile_graph
from openlpu.graph import Batch, Graph
from openlpu.load.config import ModelConfig, from_hf
from openlpu.load.names import from_hf_name
from openlpu.load.weights import ArrayWeights, Tensor, Weights
from openlpu.passes.recipe import Materializer
from openlpu.reference import Reference

SIZES: dict[str, Any] = {
    "vocab_size": 113,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_whole_pairs_off": {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn_attention_factor": {**YARN, "attention_factor": 1.25},
}


def settings(family: str, **options: Any) -> dict[str, Any]:
    """A config.json object of one of FAMILIES."""
    return {**SIZES, **FAMILIES[family], **options}


def random_model(family: str, *, seed: int = 0, **options: Any) -> tuple[ModelConfig, ArrayWeights]:
    """A model of the family with random weights of a sensible size, biases and gains included."""
    config = from_hf(settings(family, **options))
    rng = np.random.default_rng(seed)
    return config, ArrayWeights({n: _random(rng, n, s) for n, s in _shapes(config).items()})


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    values = rng.standard_normal(shape)
    if name.endswith("norm"):
        return 1.0 + 0.3 * values
    return 0.3 * values if len(shape) == 1 else values / np.sqrt(shape[1])


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, c.dim), "final_norm": (c.dim,)}
    if not c.tied:
        shapes["head"] = (c.vocab_size, c.dim)
    for i in range(c.layers):
        layer: dict[str, tuple[int, ...]] = {"attn_norm": (c.dim,), "ffn_norm": (c.dim,)}
        layer |= {"q": (q, c.dim), "k": (kv, c.dim), "v": (kv, c.dim), "o": (c.dim, q)}
        layer |= {"gate": (c.ffn_dim, c.dim), "up": (c.ffn_dim, c.dim)}
        layer |= {"down": (c.dim, c.ffn_dim)}
        if c.qk_norm:
            layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
        biased = "qkv" * c.qkv_bias + "o" * c.o_bias
        names = [*biased, *(("gate", "up", "down") if c.mlp_bias else ())]
        layer |= {f"{name}_bias": layer[name][:1] for name in names}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def as_transformers(family: str, *, seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """(transformers model, our ModelConfig, our Weights) with the same random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = settings(family, **options)
    arch = given.pop("model_type")
    hf_config = AutoConfig.for_model(arch, **given, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(hf_config).to(torch.float32).eval()
    config = from_hf(hf_config.to_dict())
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ours = from_hf_name(name)
            assert ours is not None, name
            arrays[ours] = _random(rng, ours, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(arrays[ours]))
    return model, config, ArrayWeights(arrays)


def in_blocks(weights: Weights, kinds: Sequence[str] = ("q4_1", "q4_0", "q8_0")) -> Weights:
    """The same model with its matrices stored in blocks, by the gguf package, kinds in turn."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    tensors: dict[str, Tensor] = {}
    for i, name in enumerate(weights.names()):
        values, shape = weights.rows(name), weights.shape(name)
        if len(shape) == 1:
            tensors[name] = Tensor(shape, "f32", values.view(np.uint8).reshape(1, -1))
        else:
            kind = kinds[i % len(kinds)]
            tensors[name] = Tensor(
                shape, kind, quantize(values, GGMLQuantizationType[kind.upper()])
            )
    return Weights(tensors, fingerprint="in blocks")


def encodings(weights: Weights) -> dict[str, str]:
    return {name: weights.encoding(name) for name in weights.names()}


def stages(config: ModelConfig, weights: Weights, precision: str = "w8") -> dict[str, Graph]:
    """The graph after each pass, by the pass's name."""
    return dict(compile_graph(config, encodings(weights), precision))


def reference(config: ModelConfig, weights: Weights, precision: str = "w8") -> Reference:
    """The reference of the fully compiled graph."""
    graph = compile_graph(config, encodings(weights), precision)[-1][1]
    return Reference(graph, Materializer(weights))


def step(rows: Iterable[tuple[int, int, int]], wanted: Sequence[int] | None = None) -> Batch:
    """A Batch of rows (slot, position, token), all of them wanted unless said otherwise."""
    slots, positions, tokens = (np.array(part, np.int32) for part in zip(*rows, strict=True))
    chosen = np.arange(len(slots)) if wanted is None else np.asarray(wanted)
    pages = np.zeros((int(slots.max()) + 1, 1), np.int32)
    return Batch(tokens, positions, slots, chosen.astype(np.int32), pages)


def feed(
    model: Reference, tokens: Sequence[int], *, cuts: Sequence[int] = (), slot: int = 0
) -> NDArray[np.float32]:
    """Logits [T, V] of a sequence alone, in steps cut before the given positions."""
    edges = [0, *cuts, len(tokens)]
    model.reset(slot)
    parts = [
        model.step(step([(slot, p, tokens[p]) for p in range(first, last)]))
        for first, last in itertools.pairwise(edges)
    ]
    return np.concatenate(parts)


def random_tokens(count: int, *, seed: int = 0, vocab_size: int = SIZES["vocab_size"]) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, vocab_size, count)]
