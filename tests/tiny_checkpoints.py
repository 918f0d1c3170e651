"""In: an architecture and options. Out: a tiny random checkpoint, written by other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def hf_config(model_type: str, **options: Any) -> Any:
    """A transformers configuration; head_dim stays a free option of every architecture."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**SIZES, **options})


def save_hf(folder: Path, model_type: str, *, shards: str = "50GB", **options: Any) -> Any:
    """Save a random transformers model to `folder`; the model."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(model_type, **options))
    model = model.to(torch.float32)
    with torch.no_grad():  # biases and norms start as constants, which would hide a mix-up
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def gguf_tensors(width: int = 64, *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """One layer of a `llama` GGUF file with 4 heads over 2, ffn of 2 * width, 96 tokens."""
    kv = width // 2
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (96, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (kv, width),
        "blk.0.attn_v.weight": (kv, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_gate.weight": (2 * width, width),
        "blk.0.ffn_up.weight": (2 * width, width),
        "blk.0.ffn_down.weight": (width, 2 * width),
    }
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def save_gguf(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    *,
    kind: str = "F32",
    arch: str = "llama",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, NDArray[np.uint8]]:
    """Write `tensors` with the gguf package, matrices as `kind`; the bytes of each as stored.

    The package cannot quantize to the K types; their blocks are random bytes with sound scales.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    width = tensors["token_embd.weight"].shape[1]
    writer = GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"token{i}" for i in range(96)])
    writer.add_token_types([1] * 96)
    writer.add_token_merges(["t o", "to k"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_chat_template("{{ messages[0].content }}")
    for key, value in (extra or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    stored: dict[str, NDArray[np.uint8]] = {}
    for name, values in tensors.items():
        form = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        data = _as_stored(values, form)
        stored[name] = data.view(np.uint8).reshape(-1)
        writer.add_tensor(name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _as_stored(values: NDArray[np.float32], form: Any) -> NDArray[Any]:
    from gguf import GGMLQuantizationType as Kind
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import quantize

    if form not in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return quantize(values, form)
    elements, size = GGML_QUANT_SIZES[form]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // elements, size), dtype=np.uint8)
    scale = np.array([0.01], np.float16).view(np.uint8)
    if form is Kind.Q6_K:
        blocks[:, -2:] = scale
    else:
        blocks[:, 0:2] = blocks[:, 2:4] = scale
    return blocks.reshape(values.shape[0], -1)
