"""In: a config.json object or GGUF metadata. Out: ModelConfig: sizes and options, validated.

The values come from strangers. Each is checked for type and range, and an option that changes the
arithmetic and is not implemented is refused by name; nothing is ignored on trust. Where a key is
missing, the default of the architecture's reference implementation in transformers holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from openlpu.errors import CheckpointError, UnsupportedModel
from openlpu.load.fields import Fields, shown
from openlpu.load.rope import Rope, rope_from_gguf, rope_from_hf

__all__ = ["Arch", "ModelConfig", "Rope", "from_gguf", "from_hf"]

Arch = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family: sizes in elements, options as flags."""

    arch: Arch
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    context: int
    """Positions the model accepts."""
    rope: Rope
    tied: bool
    """The output head is the embedding matrix; the weights then have no tensor `head`."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Per layer: None sees all earlier positions, w the last w, the own one included."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"{self.heads} attention heads do not divide over {self.kv_heads} key/value heads; "
                "the configuration is damaged"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(
                f"an odd head_dim ({self.head_dim}) is not supported; rotary pairs need it even"
            )


_LARGEST = {
    "vocab_size": 2**24 - 1,
    "dim": 2**17,
    "layers": 1024,
    "heads": 4096,
    "head_dim": 4096,
    "ffn_dim": 2**20,
    "context": 2**27,
}

_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}

# Options that change the arithmetic, and the values under which they do not.
_HF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "rope_interleave": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "kv_lora_rank": (None, 0),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "parallel_attn": (None, False),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "alibi": (None, False),
    "layer_norm_type": (None, "rmsnorm"),
    "per_layer_config": (None, {}),
    "num_hidden_layers_mtp": (None, 0),
}

# The same for GGUF, without the architecture's prefix.
_GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (None, 0),
    "expert_used_count": (None, 0),
    "use_parallel_residual": (None, False),
    "attention.causal": (None, True),
    "attention.max_alibi_bias": (None, 0),
    "attention.clamp_kqv": (None, 0),
    "attention.scale": (None, 0),
    "attention.layer_norm_epsilon": (None,),
    "attention.sliding_window_pattern": (None,),
    "attention.key_length_mla": (None,),
    "attention.kv_lora_rank": (None,),
    "attention.temperature_length": (None, 0),
    "attention.temperature_scale": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 0, 1),
    "residual_scale": (None, 0, 1),
    "embedding_scale": (None, 0, 1),
    "hidden_activation": (None, "silu"),
    "rope.scaling.attn_factor": (None, 1),
    "rope.scaling.yarn_ext_factor": (None, 1),
    "rope.scaling.yarn_attn_factor": (None, 1),
    "rope.scaling.yarn_log_multiplier": (None, 0),
}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The object in config.json as a ModelConfig.

    Raises UnsupportedModel for an architecture or option that is not implemented, CheckpointError
    for a value that is missing, of the wrong type or out of range.
    """
    arch = _supported(config.get("model_type"), _HF_DEFAULTS)
    _refuse_other_heads(config.get("architectures"))
    # A null means the same as no key, except for the window, where it is a choice.
    given = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
    read = Fields({**_HF_DEFAULTS[arch], **given}, "config.json")
    read.refuse_unless(_HF_NEUTRAL)
    dim, heads, layers = _sizes(read, "hidden_size", "num_attention_heads", "num_hidden_layers")
    context = read.integer("max_position_embeddings", high=_LARGEST["context"])
    attention_bias = read.flag("attention_bias", False)
    if arch == "mistral" and attention_bias:
        raise UnsupportedModel("config.json: attention_bias is not supported for mistral")
    head_dim = read.integer("head_dim", dim // heads, high=_LARGEST["head_dim"])
    return ModelConfig(
        arch=arch,
        vocab_size=read.integer("vocab_size", high=_LARGEST["vocab_size"]),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=read.integer("num_key_value_heads", heads, high=heads),
        head_dim=head_dim,
        ffn_dim=read.integer("intermediate_size", high=_LARGEST["ffn_dim"]),
        norm_eps=read.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        context=context,
        rope=rope_from_hf(read, context),
        tied=read.flag("tie_word_embeddings", False),
        qkv_bias=arch == "qwen2" or attention_bias,
        o_bias=arch != "qwen2" and attention_bias,
        mlp_bias=arch == "llama" and read.flag("mlp_bias", False),
        qk_norm=arch == "qwen3",
        windows=_windows(read, arch, layers, context),
    )


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    tensors: Collection[str] = (),
    embed_rows: int | None = None,
    freq_divisors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """GGUF metadata as a ModelConfig.

    GGUF says some things through its tensor table only: `tensors` are the names in it (biases and
    a head of its own are there or not), `embed_rows` the vocabulary size where no key gives it,
    `freq_divisors` the content of rope_freqs.weight. Raises as `from_hf` does.
    """
    name = _supported(metadata.get("general.architecture"), ("llama", "qwen2", "qwen3"))
    read = Fields(metadata, "GGUF metadata", prefix=f"{name}.")
    read.refuse_unless(_GGUF_NEUTRAL)
    dim, heads, layers = _sizes(read, "embedding_length", "attention.head_count", "block_count")
    context = read.integer("context_length", high=_LARGEST["context"])
    head_dim = read.integer("attention.key_length", dim // heads, high=_LARGEST["head_dim"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.integer(key, head_dim, high=_LARGEST["head_dim"]) != head_dim:
            raise UnsupportedModel(
                f"GGUF metadata: {name}.{key} other than {head_dim} is not supported"
            )
    window = read.integer("attention.sliding_window", 0, low=0, high=_LARGEST["context"])
    if freq_divisors is not None and len(freq_divisors) != head_dim // 2:
        raise CheckpointError(
            f"rope_freqs.weight has {len(freq_divisors)} elements, not {head_dim // 2}"
        )
    return ModelConfig(
        arch=name,
        vocab_size=read.integer("vocab_size", embed_rows, high=_LARGEST["vocab_size"]),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=read.integer("attention.head_count_kv", heads, high=heads),
        head_dim=head_dim,
        ffn_dim=read.integer("feed_forward_length", high=_LARGEST["ffn_dim"]),
        norm_eps=read.number("attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        context=context,
        rope=rope_from_gguf(read, context, freq_divisors),
        tied="output.weight" not in tensors,
        qkv_bias=name == "qwen2" or "blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm=name == "qwen3",
        windows=(window if 0 < window < context else None,) * layers,
    )


def _supported(arch: object, known: Collection[str]) -> Arch:
    if not isinstance(arch, str) or arch not in known:
        raise UnsupportedModel(
            f"architecture {shown(arch)} is not supported; supported are {', '.join(known)}"
        )
    return cast(Arch, arch)


def _refuse_other_heads(architectures: object) -> None:
    """A classifier or a bare body has the model_type of its language model, but no logits."""
    names = architectures if isinstance(architectures, list) else []
    if names and not any(isinstance(n, str) and n.endswith("ForCausalLM") for n in names):
        raise UnsupportedModel(
            f"config.json: architectures {shown(names)} is not a language model (…ForCausalLM)"
        )


def _sizes(read: Fields, dim: str, heads: str, layers: str) -> tuple[int, int, int]:
    """Width, attention heads and layers by their names in this format, in range."""
    return (
        read.integer(dim, high=_LARGEST["dim"]),
        read.integer(heads, high=_LARGEST["heads"]),
        read.integer(layers, high=_LARGEST["layers"]),
    )


def _windows(read: Fields, arch: Arch, layers: int, context: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; a window that covers the context is none."""
    width: int | None = None
    if read.values.get("sliding_window") is not None:
        width = read.integer("sliding_window", high=2**40)
    if arch.startswith("qwen") and not read.flag("use_sliding_window", False):
        width = None
    if width is not None and width >= context:
        width = None
    if arch == "llama":
        if width is not None:
            raise UnsupportedModel("config.json: sliding_window is not supported for llama")
        return (None,) * layers
    if arch == "mistral":
        types = read.values.get("layer_types")
        usual = "full_attention" if width is None else "sliding_attention"
        if types is not None and types != [usual] * layers:
            raise UnsupportedModel("config.json: layer_types is not supported for mistral")
        return (width,) * layers
    first = read.integer("max_window_layers", 28, low=0, high=2**40)
    types = read.values.get("layer_types")
    if types is None:
        return tuple(width if layer >= first else None for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise UnsupportedModel(
            f"config.json: layer_types must name {layers} layers, each one of {', '.join(known)}"
        )
    return tuple(width if kind == "sliding_attention" else None for kind in types)
