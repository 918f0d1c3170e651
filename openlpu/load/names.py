"""In: a tensor's name in a checkpoint, and a ModelConfig. Out: canonical names and their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from openlpu.errors import CheckpointError
from openlpu.load.config import ModelConfig
from openlpu.load.weights import Tensor

_HF_WHOLE = {
    "model.embed_tokens.weight": "embed",
    "lm_head.weight": "head",
    "model.norm.weight": "final_norm",
}
_HF_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    **{f"self_attn.{n}_proj.weight": n for n in "qkvo"},
    **{f"self_attn.{n}_proj.bias": f"{n}_bias" for n in "qkvo"},
    **{f"mlp.{n}_proj.weight": n for n in ("gate", "up", "down")},
    **{f"mlp.{n}_proj.bias": f"{n}_bias" for n in ("gate", "up", "down")},
}
_GGUF_WHOLE = {
    "token_embd.weight": "embed",
    "output.weight": "head",
    "output_norm.weight": "final_norm",
}
_GGUF_LAYER = {
    "attn_norm.weight": "attn_norm",
    "ffn_norm.weight": "ffn_norm",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    **{f"attn_{n}.weight": n for n in "qkv"},
    **{f"attn_{n}.bias": f"{n}_bias" for n in "qkv"},
    "attn_output.weight": "o",
    "attn_output.bias": "o_bias",
    **{f"ffn_{n}.weight": n for n in ("gate", "up", "down")},
    **{f"ffn_{n}.bias": f"{n}_bias" for n in ("gate", "up", "down")},
}
_NUMBER = r"(0|[1-9]\d{0,3})"
_HF_PATTERN = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)")
_GGUF_PATTERN = re.compile(rf"blk\.{_NUMBER}\.(.+)")


def from_hf_name(name: str) -> str | None:
    """model.layers.3.self_attn.q_proj.weight -> layers.3.q; None for a name that means nothing."""
    return _canonical(name, _HF_WHOLE, _HF_PATTERN, _HF_LAYER)


def from_gguf_name(name: str) -> str | None:
    """blk.3.attn_q.weight -> layers.3.q; None for a name that means nothing."""
    return _canonical(name, _GGUF_WHOLE, _GGUF_PATTERN, _GGUF_LAYER)


def _canonical(
    name: str, whole: Mapping[str, str], pattern: re.Pattern[str], layer: Mapping[str, str]
) -> str | None:
    found = pattern.fullmatch(name)
    if found is None:
        return whole.get(name)
    part = layer.get(found[2])
    return part and f"layers.{found[1]}.{part}"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this configuration has, in the order of its layers."""
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.dim)}
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (config.dim,),
        "q": (q_dim, config.dim),
        "k": (kv_dim, config.dim),
        "v": (kv_dim, config.dim),
        "o": (config.dim, q_dim),
        "ffn_norm": (config.dim,),
        "gate": (config.ffn_dim, config.dim),
        "up": (config.ffn_dim, config.dim),
        "down": (config.dim, config.ffn_dim),
    }
    if config.qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    for present, names in (
        (config.qkv_bias, ("q", "k", "v")),
        (config.o_bias, ("o",)),
        (config.mlp_bias, ("gate", "up", "down")),
    ):
        layer |= {f"{name}_bias": layer[name][:1] for name in names if present}
    for index in range(config.layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm"] = (config.dim,)
    if not config.tied:
        shapes["head"] = (config.vocab_size, config.dim)
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    """Compare canonical tensors with the configuration. Raises CheckpointError at a difference."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name} is missing; fetch the model again")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"its configuration says {list(shape)}; weights and configuration do not match"
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointError(
                f"{where}: tensor {name} has no place in its configuration; they do not match"
            )
