"""In: configurations of transformers. Out: the same meaning in ModelConfig, or a refusal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import MODEL_TYPES, SIZES, hf_config

from openlpu.errors import CheckpointError, LpuError, UnsupportedModel
from openlpu.load.config import ModelConfig, from_gguf, from_hf
from openlpu.load.rope import Rope


def as_json(model_type: str, **options: Any) -> dict[str, Any]:
    """What save_pretrained would write."""
    loaded: dict[str, Any] = json.loads(hf_config(model_type, **options).to_json_string())
    return loaded


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_agree_with_transformers(model_type: str) -> None:
    config = from_hf(as_json(model_type, rms_norm_eps=3e-5))
    assert config.arch == model_type
    assert (config.vocab_size, config.dim, config.ffn_dim) == (96, 64, 96)
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.context, config.norm_eps, config.tied) == (256, 3e-5, False)
    assert config.rope == Rope(10000.0)
    assert config.windows == (None, None)
    assert config.qkv_bias == (model_type == "qwen2")
    assert config.qk_norm == (model_type == "qwen3")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_missing_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    sparse = {
        key: SIZES[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    sparse |= {"num_attention_heads": 32, "model_type": model_type, "hidden_size": 128}
    reference = type(hf_config(model_type))(**sparse)
    config = from_hf(sparse)
    assert config.kv_heads == reference.num_key_value_heads
    assert config.context == reference.max_position_embeddings
    assert config.norm_eps == reference.rms_norm_eps
    assert config.tied == reference.tie_word_embeddings
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    assert config.head_dim == getattr(reference, "head_dim", None) or 128 // 32


@pytest.mark.parametrize("options", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_of_llama(options: dict[str, bool]) -> None:
    config = from_hf(as_json("llama", **options))
    attention = "attention_bias" in options
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (
        attention,
        attention,
        not attention,
    )


ROPES: list[tuple[dict[str, Any], Rope]] = [
    ({"rope_type": "default"}, Rope(5e5)),
    ({"rope_type": "linear", "factor": 4.0}, Rope(5e5, "linear", factor=4.0)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        Rope(5e5, "yarn", 4.0, original_context=64),
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
            "truncate": False,
        },
        Rope(
            5e5,
            "yarn",
            4.0,
            original_context=64,
            attention_factor=1.25,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
        Rope(5e5, "yarn", 4.0, original_context=64, attention_factor=1.0),
    ),
]


@pytest.mark.parametrize(("scaling", "expected"), ROPES)
def test_rope_in_its_new_and_its_old_form(scaling: dict[str, Any], expected: Rope) -> None:
    new = as_json("llama", rope_parameters={"rope_theta": 5e5, **scaling})
    assert from_hf(new).rope == expected
    old = as_json("llama")
    del old["rope_parameters"]
    renamed = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert from_hf({**old, "rope_theta": 5e5, "rope_scaling": renamed}).rope == expected
    assert from_hf({**old, "rope_theta": 5e5, "rope_scaling": None}).rope == Rope(5e5)


def test_the_original_context_of_yarn_falls_back_as_in_transformers() -> None:
    scaling = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}
    reference = hf_config("llama", rope_parameters=dict(scaling))
    config = from_hf({**as_json("llama"), "rope_parameters": scaling})
    original = reference.rope_parameters["original_max_position_embeddings"]
    assert config.rope.original_context == original == 256
    outside = {**as_json("llama"), "rope_parameters": scaling}
    config = from_hf({**outside, "original_max_position_embeddings": 32})
    assert config.rope.original_context == 32


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mistral", {"sliding_window": 32}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
    ],
)
def test_sliding_windows_agree_with_transformers(model_type: str, options: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    written = as_json(model_type, **options)
    config = from_hf(written)
    model = AutoModelForCausalLM.from_config(hf_config(model_type, **options))
    for layer, window in zip(model.model.layers, config.windows, strict=True):
        if model_type == "mistral":
            reference = model.config.sliding_window
        else:
            reference = layer.self_attn.sliding_window
        assert window == (None if reference is None or reference >= 256 else reference)


def test_an_unknown_architecture_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        from_hf({"model_type": "mamba"})
    with pytest.raises(UnsupportedModel, match=r"'gemma3'.*llama, qwen2, qwen3"):
        from_gguf({"general.architecture": "gemma3"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("attn_logit_softcapping", 50.0),
        ("partial_rotary_factor", 0.5),
        ("num_local_experts", 8),
        ("num_experts", 64),
        ("no_rope_layers", [1, 0]),
        ("sliding_window", 32),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "longrope", "long_factor": [1.0], "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [1], "rope_theta": 1e4}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("head_dim", 15),
        ("is_causal", False),
    ],
)
def test_an_option_that_changes_the_arithmetic_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        from_hf({**as_json("llama"), option: value})
    text = str(caught.value)
    assert option in text or "rope" in text or "partial_rotary_factor" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 2**24),
        ("vocab_size", True),
        ("vocab_size", "96"),
        ("hidden_size", -64),
        ("hidden_size", 2**18),
        ("num_hidden_layers", 1025),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("rope_parameters", {"rope_theta": float("inf")}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}),
        ("rope_parameters", ["default"]),
        ("rope_parameters", {"rope_type": "linear"}),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError):
        from_hf({**as_json("llama"), key: value})


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


HF_KEYS = [
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "hidden_act",
    "architectures",
    "model_type",
    "tie_word_embeddings",
]


@given(st.dictionaries(st.sampled_from([*SIZES, *HF_KEYS]), VALUES), st.sampled_from(MODEL_TYPES))
def test_any_values_load_or_are_refused(values: dict[str, Any], model_type: str) -> None:
    try:
        config = from_hf({**SIZES, "model_type": model_type, **values})
    except LpuError as error:
        assert str(error).isprintable()
    else:
        assert isinstance(config, ModelConfig) and config.heads % config.kv_heads == 0


GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.feed_forward_length": 96,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 96,
}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, Rope(1e4)),
        ({"freq_base": 5e5, "scaling.type": "none", "scaling.factor": 4.0}, Rope(5e5)),
        ({"scaling.factor": 4.0}, Rope(1e4, "linear", 4.0)),
        ({"scale_linear": 4.0}, Rope(1e4, "linear", 4.0)),
        ({"scaling.type": "linear", "scaling.factor": 2.0}, Rope(1e4, "linear", 2.0)),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 64,
            },
            Rope(1e4, "yarn", 4.0, original_context=64),
        ),
    ],
)
def test_rope_in_gguf(extra: dict[str, Any], expected: Rope) -> None:
    metadata = GGUF | {f"llama.rope.{key}": value for key, value in extra.items()}
    assert from_gguf(metadata).rope == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 8),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
        ("llama.attention.causal", False),
        ("llama.rope.scaling.attn_factor", 2.0),
    ],
)
def test_gguf_options_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=key.removeprefix("llama.").split(".")[0]):
        from_gguf({**GGUF, key: value})


GGUF_KEYS = [*GGUF, "llama.rope.scaling.type", "llama.expert_count", "llama.rope.freq_base"]


@given(
    st.dictionaries(st.sampled_from(GGUF_KEYS), VALUES | st.lists(st.integers(0, 9)).map(np.array)),
    st.none() | st.tuples(st.floats(), st.floats()),
)
def test_any_metadata_loads_or_is_refused(values: dict[str, Any], divisors: Any) -> None:
    try:
        from_gguf({**GGUF, **values}, embed_rows=96, freq_divisors=divisors)
    except LpuError as error:
        assert str(error).isprintable()


def test_gguf_windows_and_biases() -> None:
    config = from_gguf(
        {**GGUF, "llama.attention.sliding_window": 32},
        tensors={"output.weight", "blk.0.attn_q.bias"},
    )
    assert config.windows == (32, 32) and config.qkv_bias and not config.tied
    assert from_gguf({**GGUF, "llama.attention.sliding_window": 0}).windows == (None, None)
