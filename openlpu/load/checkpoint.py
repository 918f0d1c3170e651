"""In: a path, an alias or a hub name. Out: Checkpoint: configuration, weights, tokenizer source.

Weights and configuration are compared up front, so that whoever reads a Checkpoint finds every
tensor it expects, in the expected shape, with query and key rows in rotate-half order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import CheckpointError
from openlpu.load import config as configs
from openlpu.load.config import ModelConfig
from openlpu.load.fields import Fields, shown
from openlpu.load.gguf import GgufFile, read_gguf
from openlpu.load.hub import ALIASES, HUB_NAME, Progress, pull
from openlpu.load.jsonfile import read_object, read_optional
from openlpu.load.names import check_tensors, from_gguf_name, from_hf_name
from openlpu.load.safetensors import INDEX, SafetensorsFolder, read_safetensors
from openlpu.load.source import TokenizerSource
from openlpu.load.weights import Tensor, Weights, decode, fingerprint_files

_LARGEST_TEMPLATE_BYTES = 1 << 20
_BUFFERS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias")
"""Tensors that old checkpoints store although the configuration determines them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as it came: nothing is converted yet, and the big tensors are not read yet."""

    config: ModelConfig
    weights: Weights
    tokenizer: TokenizerSource
    chat_template: str | None
    """jinja2 source that a stranger wrote; None for a model that is not made for chat."""
    name: str
    source: Path
    """The GGUF file or the Hugging Face folder."""


def open_checkpoint(path_or_name: str, *, progress: Progress | None = None) -> Checkpoint:
    """Open a GGUF file, a Hugging Face folder, an alias, or an org/name of the hub.

    Fetches what is not in the cache; `progress` is called with (stage, bytes done, bytes in all).
    Raises CheckpointError and its kinds, DownloadError, StoreError.
    """
    try:
        path = Path(path_or_name).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, no text
        reason = str(error).splitlines()[0][:100]
        raise CheckpointError(f"{path_or_name[:80]!r}: not a path ({reason})") from None
    if is_folder:
        return _open_folder(path, path.resolve().name)
    if is_file:
        return _open_gguf(path, path.stem)
    if path_or_name in ALIASES:
        file = pull(path_or_name, progress)
        return _open_gguf(file, path_or_name, fingerprint=ALIASES[path_or_name].sha256)
    if HUB_NAME.fullmatch(path_or_name) and path.suffix != ".gguf":
        return _open_folder(pull(path_or_name, progress), path_or_name)
    raise CheckpointError(
        f"{path_or_name}: no such file or folder; give a .gguf file, a Hugging Face folder, "
        f"org/name of the hub, or {', '.join(ALIASES)}"
    )


def _open_folder(folder: Path, name: str) -> Checkpoint:
    if not (folder / "config.json").is_file():
        lone = sorted(folder.glob("*.gguf"))
        if len(lone) == 1:
            return _open_gguf(lone[0], lone[0].stem)
        raise CheckpointError(
            f"{folder}: holds no config.json and not exactly one .gguf file; "
            "give the model's folder or file"
        )
    raw = read_object(folder / "config.json")
    config = configs.from_hf(raw)
    stored = read_safetensors(folder)
    tensors = _canonical_hf(stored, config)
    check_tensors(tensors, config, str(folder))
    files = [*stored.files, folder / "config.json"]
    files += [folder / INDEX] if (folder / INDEX).is_file() else []
    settings = read_optional(folder / "tokenizer_config.json")
    return Checkpoint(
        config=config,
        weights=Weights(tensors, fingerprint=fingerprint_files(files)),
        tokenizer=_hf_tokenizer(folder, raw, settings, config.vocab_size),
        chat_template=_hf_template(folder, settings),
        name=name,
        source=folder,
    )


def _canonical_hf(stored: SafetensorsFolder, config: ModelConfig) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in [*stored.tensors, *stored.refused]:
        canonical = from_hf_name(name)
        if _BUFFERS.fullmatch(name) or (config.tied and canonical == "head"):
            continue  # a tied head is the embedding, whatever the file holds
        stored.require_supported(name)
        if canonical is None:
            raise CheckpointError(f"tensor {name[:80]!r} has no place in a {config.arch} model")
        tensors[canonical] = stored.tensors[name]
    return tensors


def _hf_tokenizer(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], vocab_size: int
) -> TokenizerSource:
    """generation_config.json says what ends generation; config.json where it does not."""
    generation = read_optional(folder / "generation_config.json")

    def ids(key: str) -> tuple[int, ...]:
        value = generation.get(key)
        return _token_ids(config.get(key) if value is None else value, vocab_size, key)

    return TokenizerSource(
        kind="hf",
        folder=folder,
        metadata={},
        bos_id=next(iter(ids("bos_token_id")), None),
        eos_ids=ids("eos_token_id"),
        add_bos=settings.get("add_bos_token") is True,
    )


def _hf_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the template in tokenizer_config.json: one, or several with names."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > _LARGEST_TEMPLATE_BYTES:
            raise CheckpointError(f"{file}: more than {_LARGEST_TEMPLATE_BYTES:,} bytes; damaged")
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{file}: cannot be read as UTF-8; fetch it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return _template(template, str(folder / "tokenizer_config.json"))


def _template(value: object, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _LARGEST_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{where}: the chat template is no text of usual size; fetch it again"
        )
    return value


def _open_gguf(path: Path, name: str, *, fingerprint: str | None = None) -> Checkpoint:
    """`fingerprint`: the sha256 of a file that was verified; copies of it are one model."""
    file = read_gguf(path)
    config = _gguf_config(file)
    tensors: dict[str, Tensor] = {}
    for stored_name, tensor in file.tensors.items():
        if stored_name == "rope_freqs.weight":
            continue  # part of the configuration
        canonical = from_gguf_name(stored_name)
        if canonical is None:
            raise CheckpointError(
                f"{path}: tensor {stored_name[:80]!r} has no place in a {config.arch} model"
            )
        tensors[canonical] = tensor
    check_tensors(tensors, config, str(path))
    if config.arch == "llama":
        _restore_rotary_order(tensors, config)
    return Checkpoint(
        config=config,
        weights=Weights(tensors, fingerprint=fingerprint or fingerprint_files([path])),
        tokenizer=_gguf_tokenizer(file.metadata, config.vocab_size),
        chat_template=_template(file.metadata.get("tokenizer.chat_template"), str(path)),
        name=name,
        source=path,
    )


def _gguf_config(file: GgufFile) -> ModelConfig:
    divisors: tuple[float, ...] | None = None
    if "rope_freqs.weight" in file.tensors:
        stored = file.tensors["rope_freqs.weight"]
        divisors = tuple(decode(stored.data[:], stored.encoding)[0].tolist())
        if not all(1e-6 < d < 1e9 for d in divisors):
            raise CheckpointError(f"{file.path}: rope_freqs.weight is out of range; fetch it again")
    embed = file.tensors.get("token_embd.weight")
    return configs.from_gguf(
        file.metadata,
        tensors=file.tensors.keys(),
        embed_rows=embed.shape[0] if embed else None,
        freq_divisors=divisors,
    )


def _restore_rotary_order(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Undo what GGUF does to `llama` models alone: it stores the two elements of a rotary pair
    beside each other, so that row 2j + p of a head is its row p * head_dim / 2 + j elsewhere.
    """
    for part, heads in (("q", config.heads), ("k", config.kv_heads)):
        pairs = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
        order: NDArray[np.intp] = pairs.transpose(0, 2, 1).ravel()
        for index in range(config.layers):
            for name in (f"layers.{index}.{part}", f"layers.{index}.{part}_bias"):
                if name in tensors:
                    tensors[name] = replace(tensors[name], order=order)


def _gguf_tokenizer(metadata: Mapping[str, Any], vocab_size: int) -> TokenizerSource:
    def ids(key: str) -> tuple[int, ...]:
        full = f"tokenizer.ggml.{key}_token_id"
        return _token_ids(metadata.get(full), vocab_size, full)

    # Files from before the key existed: SentencePiece models and Llama 3 start with it.
    read = Fields(metadata, "GGUF metadata", prefix="tokenizer.ggml.")
    starts = read.text("model", "") == "llama" or read.text("pre", "") == "llama-bpe"
    return TokenizerSource(
        kind="gguf",
        folder=None,
        metadata=metadata,
        bos_id=next(iter(ids("bos")), None),
        eos_ids=tuple(dict.fromkeys(ids("eos") + ids("eot") + ids("eom"))),
        add_bos=read.flag("add_bos_token", starts),
    )


def _token_ids(value: object, vocab_size: int, key: str) -> tuple[int, ...]:
    """One id, several, or none, as a tuple of ids of the vocabulary."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int and 0 <= v < vocab_size for v in values):
        raise CheckpointError(
            f"{key} = {shown(value)} names no token of {vocab_size}; fetch the model again"
        )
    return tuple(values)
