"""In: GGUF files that the gguf package wrote. Out: the values its own reader gives, or an error."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import gguf_tensors, save_gguf

from openlpu.errors import CheckpointError, UnsupportedModel, UnsupportedTensor
from openlpu.load.checkpoint import open_checkpoint
from openlpu.load.gguf import read_gguf
from openlpu.load.weights import ENCODINGS, LOSSLESS_BLOCKS, ArrayWeights

PARTS = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_gguf(tmp_path / "tiny.gguf", gguf_tensors())
    return tmp_path / "tiny.gguf"


def reference(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The values of every tensor: gguf's reader and dequantizer, transformers' row order."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    reader = GGUFReader(path)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    order = LlamaTensorProcessor(heads)
    is_llama = reader.get_field("general.architecture").contents() == "llama"  # type: ignore[union-attr]
    values = {}
    for tensor in reader.tensors:
        data = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if is_llama:
            data = order.process(data, tensor.name).weights
        values[tensor.name] = data
    return values


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_tensor_type_gives_the_values_of_the_gguf_package(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "m.gguf"
    stored = save_gguf(path, gguf_tensors(256), kind=encoding.upper())
    values = reference(path)
    weights = open_checkpoint(str(path)).weights
    assert len(weights.names()) == len(values)
    for part, name in PARTS.items():
        want, got = values[f"blk.0.{part}.weight"], f"layers.0.{name}"
        assert weights.encoding(got) == encoding and weights.shape(got) == want.shape
        rows = weights.rows(got)
        assert rows.dtype == np.float32 and rows.flags.c_contiguous
        assert np.array_equal(rows, want)
        assert np.array_equal(weights.rows(got, 5, 70), want[5:70])
        assert weights.rows(got, 9, 9).shape == (0, want.shape[1])
        if encoding in LOSSLESS_BLOCKS:
            raw = stored[f"blk.0.{part}.weight"].reshape(want.shape[0], -1)
            if name not in "qk":
                assert np.array_equal(weights.blocks(got, 3, 40), raw[3:40])
        else:
            with pytest.raises(UnsupportedTensor, match=rf"{got} is {encoding}"):
                weights.blocks(got)
    assert np.array_equal(weights.rows("final_norm", 1, 4), values["output_norm.weight"][1:4])


def test_blocks_of_queries_and_keys_follow_the_order_of_their_rows(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    save_gguf(tmp_path / "m.gguf", gguf_tensors(64), kind="Q8_0")
    weights = open_checkpoint(str(tmp_path / "m.gguf")).weights
    for name in ("layers.0.q", "layers.0.k"):
        blocks = weights.blocks(name, 3, 29)
        assert np.array_equal(
            dequantize(blocks, GGMLQuantizationType.Q8_0), weights.rows(name, 3, 29)
        )


def test_query_and_key_biases_are_reordered_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = gguf_tensors()
    for part, size in (("q", 64), ("k", 32), ("v", 32)):
        tensors[f"blk.0.attn_{part}.bias"] = rng.standard_normal(size).astype(np.float32)
    save_gguf(tmp_path / "m.gguf", tensors)
    values = reference(tmp_path / "m.gguf")
    weights = open_checkpoint(str(tmp_path / "m.gguf")).weights
    for part in "qkv":
        want = values[f"blk.0.attn_{part}.bias"]
        assert np.array_equal(weights.rows(f"layers.0.{part}_bias"), want)
        assert np.array_equal(weights.rows(f"layers.0.{part}_bias", 5, 20), want[5:20])
    assert not np.array_equal(weights.rows("layers.0.q_bias"), tensors["blk.0.attn_q.bias"])


def test_qwen_rows_are_stored_in_order(tmp_path: Path) -> None:
    tensors = gguf_tensors()
    for part, size in (("q", 64), ("k", 32), ("v", 32)):
        tensors[f"blk.0.attn_{part}.bias"] = np.arange(size, dtype=np.float32)
    tensors["output.weight"] = tensors["token_embd.weight"] * 2
    save_gguf(tmp_path / "m.gguf", tensors, arch="qwen2")
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.config.qkv_bias and not checkpoint.config.tied
    assert np.array_equal(checkpoint.weights.rows("layers.0.q"), tensors["blk.0.attn_q.weight"])
    assert np.array_equal(checkpoint.weights.rows("layers.0.q_bias"), np.arange(64))
    assert np.array_equal(checkpoint.weights.rows("head"), tensors["output.weight"])


def test_metadata_tokenizer_and_rope_divisors(tmp_path: Path) -> None:
    tensors = gguf_tensors() | {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
    extra = {"llama.attention.sliding_window": 32, "tokenizer.ggml.add_bos_token": True}
    save_gguf(tmp_path / "tiny.gguf", tensors, extra=extra)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.config.rope.freq_divisors == tuple(range(1, 9))
    assert checkpoint.config.windows == (32,) and checkpoint.config.vocab_size == 96
    source = checkpoint.tokenizer
    assert (source.kind, source.bos_id, source.eos_ids) == ("gguf", 1, (2, 3)) and source.add_bos
    assert source.metadata["tokenizer.ggml.tokens"] == [f"token{i}" for i in range(96)]
    assert source.metadata["tokenizer.ggml.token_type"].tolist() == [1] * 96
    assert checkpoint.chat_template == "{{ messages[0].content }}"
    assert checkpoint.name == "tiny"


def test_metadata_equals_that_of_the_gguf_reader(path: Path) -> None:
    from gguf import GGUFReader

    metadata = read_gguf(path).metadata
    fields = GGUFReader(path).fields
    assert set(metadata) == {name for name in fields if not name.startswith("GGUF.")}
    for name, value in metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        assert plain == fields[name].contents()


def test_a_few_rows_do_not_read_the_whole_tensor(tmp_path: Path) -> None:
    import tracemalloc

    tensors = gguf_tensors(256)
    rows = 8192  # 8 MiB as float32
    tensors["token_embd.weight"] = np.zeros((rows, 256), np.float32)
    save_gguf(tmp_path / "m.gguf", tensors, extra={"llama.vocab_size": rows})
    weights = open_checkpoint(str(tmp_path / "m.gguf")).weights
    tracemalloc.start()
    try:
        assert weights.rows("embed", 4000, 4010).shape == (10, 256)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_file_cut_short_after_it_was_opened_is_an_error(path: Path) -> None:
    weights = open_checkpoint(str(path)).weights
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    read = 0
    with pytest.raises(CheckpointError, match="cut short while it was read"):
        for name in weights.names():
            weights.rows(name)
            read += 1
    assert read


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    return path


def test_other_forms_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for form, start in {
        "big-endian": b"GGUF\0\0\0\3",
        "version 1": b"GGUF\1\0\0\0",
        "not a GGUF": b"PK\3\4",
        "ends inside": b"GGUF",
    }.items():
        path.write_bytes(start if form == "ends inside" else start + whole[len(start) :])
        with pytest.raises(CheckpointError, match=form):
            open_checkpoint(str(path))
    with pytest.raises(UnsupportedTensor, match=r"blk\.0\.attn_q\.weight.* type q3_k"):
        retyped = patched_type(whole, b"blk.0.attn_q.weight", 11)
        path.write_bytes(retyped)
        open_checkpoint(str(path))
    save_gguf(path, gguf_tensors(), arch="mamba")
    with pytest.raises(UnsupportedModel, match="'mamba'"):
        open_checkpoint(str(path))
    save_gguf(path, gguf_tensors(), extra={"split.count": 3})
    with pytest.raises(CheckpointError, match="one part of a split model"):
        open_checkpoint(str(path))
    save_gguf(path, gguf_tensors() | {"blk.0.attn_rot.weight": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_rot\.weight' has no place"):
        open_checkpoint(str(path))


def patched_type(data: bytes, name: bytes, kind: int) -> bytes:
    """The file with the type number of one two-dimensional tensor changed."""
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 2**40, 2**31])
def test_a_huge_length_anywhere_ends_at_once(path: Path, value: int) -> None:
    data = path.read_bytes()
    tokens = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    # Tensor count, key count, length of the first key, array length, length of its first string.
    for at in (8, 16, 24, tokens + 8, tokens + 16):
        path.write_bytes(data[:at] + struct.pack("<Q", value) + data[at + 8 :])
        started = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(path))
        assert time.process_time() - started < 1 and "\n" not in str(caught.value)


def test_a_repeated_key_tensor_or_place_is_damage(path: Path) -> None:
    whole = path.read_bytes()
    patched(path, b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id")
    with pytest.raises(CheckpointError, match="there twice"):
        read_gguf(path)
    path.write_bytes(whole)
    patched(path, b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight")
    with pytest.raises(CheckpointError, match="two tensors have one name"):
        read_gguf(path)
    name = b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name) + 4 + 16 + 4
    path.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    with pytest.raises(CheckpointError, match="overlap"):
        read_gguf(path)


def test_the_default_model_opens_fast(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(str(smollm2_path))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        read_gguf(smollm2_path)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.5  # 0.07 on an idle machine
    config = checkpoint.config
    assert (config.layers, config.dim, config.heads, config.kv_heads) == (30, 576, 9, 3)
    values = reference_rows(smollm2_path, "blk.7.ffn_down.weight", 100, 120)
    assert np.array_equal(checkpoint.weights.rows("layers.7.down", 100, 120), values)


def reference_rows(path: Path, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
    from gguf.quants import dequantize

    tensor = read_gguf(path).tensors[name]
    from gguf import GGMLQuantizationType

    rows = np.ascontiguousarray(tensor.data[start:stop])
    values: np.ndarray[Any, Any] = dequantize(rows, GGMLQuantizationType[tensor.encoding.upper()])
    return values


def test_weights_in_memory() -> None:
    rng = np.random.default_rng(0)
    arrays = {"embed": rng.standard_normal((5, 4)), "final_norm": rng.standard_normal(4)}
    weights = ArrayWeights(arrays)
    assert weights.names() == ("embed", "final_norm") and weights.shape("embed") == (5, 4)
    for name, values in arrays.items():
        assert np.array_equal(weights.rows(name, 1, 3), values.astype(np.float32)[1:3])
    assert weights.fingerprint() == ArrayWeights(arrays).fingerprint()
    assert weights.fingerprint() != ArrayWeights({"embed": arrays["embed"]}).fingerprint()
    with pytest.raises(CheckpointError, match="no tensor head"):
        weights.rows("head")
