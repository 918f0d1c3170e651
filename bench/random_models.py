"""In: the name of a shape. Out: a GGUF file of it with random weights, Q4_0, kept in the cache.

Speed does not depend on what the weights say. They are small enough for finite logits; the
vocabulary is a list of names, for those who compute from token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import Field, Planned, kept, matrix_form, write
from numpy.typing import NDArray

VOCAB, CONTEXT = 32_000, 2048
FORM, BLOCK = "Q4_0", 32
_RECIPE = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a llama model with a head of its own."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """(name, outputs, inputs) of every matrix."""
        dim, kv = self.dim, self.dim // self.heads * self.kv_heads
        yield "token_embd.weight", VOCAB, dim
        yield "output.weight", VOCAB, dim
        for i in range(self.layers):
            for part, outputs, inputs in (
                ("attn_q", dim, dim),
                ("attn_k", kv, dim),
                ("attn_v", kv, dim),
                ("attn_output", dim, dim),
                ("ffn_gate", self.ffn_dim, dim),
                ("ffn_up", self.ffn_dim, dim),
                ("ffn_down", dim, self.ffn_dim),
            ):
                yield f"blk.{i}.{part}.weight", outputs, inputs

    def norms(self) -> Iterator[str]:
        """The name of every vector; each has `dim` elements."""
        yield "output_norm.weight"
        for i in range(self.layers):
            yield f"blk.{i}.attn_norm.weight"
            yield f"blk.{i}.ffn_norm.weight"


SHAPES = {
    "tinyllama-1.1b": Shape(2048, 22, 32, 4, 5632),
    "llama-7b": Shape(4096, 32, 32, 32, 11008),
}


def random_file(name: str) -> Path:
    """The model SHAPES[name]; the same bytes wherever it is made."""
    return kept(f"{name}-{FORM}-{_RECIPE}.gguf", lambda target: _make(SHAPES[name], target))


def _make(shape: Shape, target: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = [_matrix(rng, *matrix) for matrix in shape.matrices()]
    tensors += [
        Planned(name, (shape.dim,), "F32", lambda: np.ones(shape.dim, np.float32))
        for name in shape.norms()
    ]
    write(target, "llama", _fields(shape), tensors)


def _matrix(rng: np.random.Generator, name: str, outputs: int, inputs: int) -> Planned:
    form = matrix_form(name, FORM)

    def data() -> NDArray[Any]:
        # Blocks of a float16 scale and 32 weights; a product keeps its input's size.
        width = BLOCK if form == "Q8_0" else BLOCK // 2
        deviation = 73.9 if form == "Q8_0" else 4.6  # of uniform bytes, and of uniform nibbles
        blocks = np.empty((outputs, inputs // BLOCK, 2 + width), np.uint8)
        scale = np.array([1 / (deviation * inputs**0.5)], np.float16)
        blocks[..., :2] = scale.view(np.uint8)
        blocks[..., 2:] = rng.integers(0, 256, (*blocks.shape[:2], width), np.uint8)
        return blocks.reshape(outputs, -1)

    return Planned(name, (outputs, inputs), form, data)


def _fields(shape: Shape) -> list[Field]:
    from gguf import GGUFValueType as Type
    from gguf import LlamaFileType

    integers = {
        "general.file_type": int(LlamaFileType[f"MOSTLY_{FORM}"]),
        "general.quantization_version": 2,
        "llama.block_count": shape.layers,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": shape.dim,
        "llama.feed_forward_length": shape.ffn_dim,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.rope.dimension_count": shape.dim // shape.heads,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    numbers = {"llama.rope.freq_base": 10_000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    return [
        *(Field(name, value, Type.UINT32) for name, value in integers.items()),
        *(Field(name, value, Type.FLOAT32) for name, value in numbers.items()),
        *(Field(name, value, Type.STRING) for name, value in texts.items()),
        Field("tokenizer.ggml.tokens", _tokens(), Type.ARRAY, Type.STRING),
        Field("tokenizer.ggml.token_type", [1] * VOCAB, Type.ARRAY, Type.INT32),
        Field("tokenizer.ggml.merges", ["t o", "to k"], Type.ARRAY, Type.STRING),
    ]


def _tokens() -> list[str]:
    """Letters, which loaders look for, and names."""
    letters = [chr(code) for code in range(33, 127)] + ["\u010a", "\u0120", "to", "tok"]
    return letters + [f"token{i}" for i in range(len(letters), VOCAB)]
