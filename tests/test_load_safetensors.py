"""In: folders that transformers saved. Out: the same tensors, or one clear line of error."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_checkpoints import MODEL_TYPES, save_hf

from openlpu.errors import CheckpointError, UnsupportedTensor
from openlpu.load.checkpoint import open_checkpoint
from openlpu.load.safetensors import read_safetensors

CANONICAL = {
    "model.embed_tokens": "embed",
    "lm_head": "head",
    "model.norm": "final_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def canonical(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    prefix = ""
    if stem.startswith("model.layers."):
        _, _, index, stem = stem.split(".", 3)
        prefix = f"layers.{index}."
    return prefix + CANONICAL[stem] + ("_bias" if kind == "bias" else "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_hf(path, "llama")
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("shards", ["50GB", "40KB"])
def test_every_tensor_of_every_family(tmp_path: Path, model_type: str, shards: str) -> None:
    model = save_hf(tmp_path, model_type, shards=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "40KB")
    checkpoint = open_checkpoint(str(tmp_path))
    weights = checkpoint.weights
    reference = {canonical(n): t.numpy() for n, t in model.state_dict().items()}
    assert set(weights.names()) == set(reference)
    for name, values in reference.items():
        assert weights.shape(name) == values.shape and weights.encoding(name) == "f32"
        assert np.array_equal(weights.rows(name), values)
        assert np.array_equal(weights.rows(name, 3, 9), values[3:9])
    assert (checkpoint.tokenizer.bos_id, checkpoint.tokenizer.eos_ids) == (1, (2,))
    assert checkpoint.chat_template is None and checkpoint.source == tmp_path


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_biases_and_tied_heads(tmp_path: Path, model_type: str, options: dict[str, Any]) -> None:
    model = save_hf(tmp_path, model_type, **options)
    checkpoint = open_checkpoint(str(tmp_path))
    reference = {canonical(n): t.numpy() for n, t in model.state_dict().items()}
    if checkpoint.config.tied:
        assert np.array_equal(reference.pop("head"), checkpoint.weights.rows("embed"))
    assert set(checkpoint.weights.names()) == set(reference)
    for name, values in reference.items():
        assert np.array_equal(checkpoint.weights.rows(name), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_hf(tmp_path, "llama").to(dtype)
    model.save_pretrained(tmp_path)
    weights = open_checkpoint(str(tmp_path)).weights
    for name, tensor in model.state_dict().items():
        assert (
            weights.encoding(canonical(name))
            == {"float16": "f16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
        )
        assert np.array_equal(weights.rows(canonical(name)), tensor.to(torch.float32).numpy())


def test_what_ends_generation_and_the_chat_template(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id": [5, 2], "bos_token_id": 4}')
    settings = {"chat_template": "{{ 1 }}", "add_bos_token": True}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(str(copy))
    source = checkpoint.tokenizer
    assert (source.kind, source.folder, source.bos_id, source.eos_ids) == ("hf", copy, 4, (5, 2))
    assert source.add_bos and checkpoint.chat_template == "{{ 1 }}"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert open_checkpoint(str(copy)).chat_template == "d"
    (copy / "chat_template.jinja").write_text("from a file")
    assert open_checkpoint(str(copy)).chat_template == "from a file"
    (copy / "generation_config.json").write_text('{"eos_token_id": [96]}')
    with pytest.raises(CheckpointError, match="eos_token_id"):
        open_checkpoint(str(copy))


def test_an_infinity_or_nan_is_refused_with_its_tensor(copy: Path) -> None:
    for value in (np.inf, -np.inf, np.nan):
        stored = {n: t.data[:] for n, t in read_safetensors(copy).tensors.items()}
        arrays = {
            n: d.copy().view(np.float32).reshape(read_safetensors(copy).tensors[n].shape)
            for n, d in stored.items()
        }
        arrays["model.layers.1.mlp.up_proj.weight"][7, 7] = value
        save_file(arrays, copy / "model.safetensors")
        weights = open_checkpoint(str(copy)).weights
        assert weights.rows("layers.1.up", 0, 7).shape == (7, 64)
        with pytest.raises(CheckpointError, match=r"layers\.1\.up holds an infinity or a NaN"):
            weights.rows("layers.1.up")


def test_the_fingerprint_follows_the_files(copy: Path) -> None:
    first = open_checkpoint(str(copy)).weights.fingerprint()
    assert first == open_checkpoint(str(copy)).weights.fingerprint()
    edit_config(copy, rms_norm_eps=2e-5)
    second = open_checkpoint(str(copy)).weights.fingerprint()
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert len({first, second, open_checkpoint(str(copy)).weights.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 97}, r"shape \[96, 64\].*\[97, 64\]"),
        ({"num_hidden_layers": 3}, r"layers\.2\.attn_norm is missing"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\w+ has no place"),
        ({"attention_bias": True}, r"layers\.0\.q_bias is missing"),
        ({"vocab_size": 95}, r"embed has shape"),
    ],
)
def test_weights_that_do_not_match_their_configuration(
    copy: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(copy, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(copy))


def test_missing_pieces_name_the_way_out(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(str(copy / "absent"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        open_checkpoint(str(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/x.safetensors", "a\\b", "", 7])
def test_an_index_cannot_leave_its_folder(copy: Path, target: Any) -> None:
    index = {"weight_map": {"model.norm.weight": target}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight file"):
        open_checkpoint(str(copy))


def test_an_index_that_promises_too_much(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "more": "a.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no shard holds tensor 'more'"):
        open_checkpoint(str(copy))
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        open_checkpoint(str(copy))


def written(folder: Path, header: str, body: bytes = b"") -> Path:
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header.encode() + body
    )
    return folder


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 4, "ends at byte 8 of 4"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 12, "12 bytes of data"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', 12, "hole at byte 4"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', 8, "has 8 bytes"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}', 8, "lacks its type"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', 4, "lacks its type"),
        ('{"a":{"dtype":"F32","shape":[1]}}', 4, "lacks its type"),
        ('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', 4, "'F99'"),
        ('{"a":1}', 0, "not an object"),
        ('{"a":{},"a":{}}', 0, "there twice"),
        ("[" * 100_000, 0, "not valid JSON"),
        ("[]", 0, "no JSON object"),
        (
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            '"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            12,
            "overlap",
        ),
    ],
)
def test_hostile_headers(tmp_path: Path, header: str, body: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(written(tmp_path, header, b"\0" * body))
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    for length in (1 << 63, 2**64 - 1, 1 << 20):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match="a header of"):
            read_safetensors(tmp_path)


def test_a_type_that_is_not_supported_is_named_where_it_matters(copy: Path) -> None:
    arrays = {
        n: t.data[:].copy().view(np.float32).reshape(t.shape)
        for n, t in read_safetensors(copy).tensors.items()
    }
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float64)}
    save_file(arrays | buffers, copy / "model.safetensors")
    assert open_checkpoint(str(copy)).weights.shape("final_norm") == (64,)
    arrays["model.norm.weight"] = np.zeros(64, np.float64)
    save_file(arrays, copy / "model.safetensors")
    with pytest.raises(UnsupportedTensor, match=r"'model\.norm\.weight' has type F64"):
        open_checkpoint(str(copy))
