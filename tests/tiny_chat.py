"""In: a folder. Out: a whole tiny chat model in it: random weights, byte tokenizer, template."""

from __future__ import annotations

import json
from pathlib import Path

from openlpu.engine.families import random_weights
from openlpu.load.config import ModelConfig, from_hf

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
}


def hf_name(canonical: str) -> str:
    """The name that Hugging Face's llama gives a tensor."""
    if canonical.startswith("layers."):
        _, layer, part = canonical.split(".")
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    return {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}[canonical]


def tiny_config() -> ModelConfig:
    return from_hf(CONFIG)


def write_tiny_chat(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write the model; token i < 256 is byte i, 256 is <|start|>, 257 is <|end|>."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(tiny_config())
    arrays = {
        hf_name(name): weights.rows(name).reshape(weights.shape(name)) for name in weights.names()
    }
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _write_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({letters[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
