"""In: sound checkpoints, damaged everywhere. Out: each loads or is refused, soon and cheaply."""

from __future__ import annotations

import shutil
import struct
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import gguf_tensors, save_gguf, save_hf

from openlpu.errors import CheckpointError, LpuError
from openlpu.load.checkpoint import open_checkpoint
from openlpu.load.gguf import read_gguf
from openlpu.load.safetensors import read_safetensors

CASES = 400
LONGEST_SECONDS = 2.0  # of processor time; a case takes milliseconds
MOST_BYTES = 24 << 20


def damaged(data: bytes, header_bytes: int, cases: int) -> Iterator[bytes]:
    """Truncations, flipped bits and replaced words; most of them inside the header."""
    rng = np.random.default_rng(7)
    words = [0, 1, 3, 0x7F, 0xFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
    for case in range(cases):
        changed = bytearray(data)
        limit = header_bytes if rng.random() < 0.9 else len(data)
        if case % 4 == 0:
            yield bytes(changed[: rng.integers(0, limit)])
            continue
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, limit))
            if case % 4 == 1:
                changed[at] ^= 1 << int(rng.integers(0, 8))
            elif case % 4 == 2:
                changed[at] = int(rng.integers(0, 256))
            else:
                word = struct.pack("<Q", words[rng.integers(0, len(words))])
                changed[at : at + 8] = word[: len(data) - at]
        yield bytes(changed)


def outcomes(path: Path, target: Path, contents: Iterable[bytes]) -> list[bool]:
    """For each content written to `target`: whether the checkpoint at `path` loads."""
    tracemalloc.start()  # only now: it would slow down whoever built the checkpoint
    try:
        found = []
        for data in contents:
            target.write_bytes(data)
            found.append(try_to_load(path))
        return found
    finally:
        tracemalloc.stop()


def try_to_load(path: Path) -> bool:
    """Open the checkpoint and read every value; whether that went well. Bounds time and memory."""
    started = time.process_time()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        weights = open_checkpoint(str(path)).weights
        for name in weights.names():
            weights.rows(name)
        sound = True
    except LpuError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        sound = False
    assert time.process_time() - started < LONGEST_SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES
    return sound


def test_damaged_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    save_gguf(path, gguf_tensors(), kind="Q8_0")
    whole = path.read_bytes()
    sizes = [tensor.data[:].size for tensor in read_gguf(path).tensors.values()]
    assert outcomes(path, path, [whole]) == [True]
    found = outcomes(path, path, damaged(whole, len(whole) - sum(sizes), CASES))
    assert CASES // 2 < found.count(False) < CASES  # a flipped bit in a token or weight is legal


def test_damaged_safetensors_files(tmp_path: Path) -> None:
    save_hf(tmp_path, "llama", num_hidden_layers=1)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    assert outcomes(tmp_path, path, [whole]) == [True]
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    found = outcomes(tmp_path, path, damaged(whole, header_bytes, CASES))
    assert CASES // 2 < found.count(False) < CASES


def test_damaged_json_files(tmp_path: Path) -> None:
    save_hf(tmp_path / "whole", "qwen3", num_hidden_layers=1, shards="20KB")
    (tmp_path / "whole" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    found = []
    for source in sorted((tmp_path / "whole").glob("*.json")):
        copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / source.stem))
        whole = source.read_bytes()
        found += outcomes(copy, copy / source.name, damaged(whole, len(whole), 40))
    assert len(found) == 160 and 80 < found.count(False) < 160


@settings(max_examples=150)
@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_after_a_sound_start(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, tensors: int, keys: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + data)
    if tensors or keys:
        with pytest.raises(CheckpointError):
            open_checkpoint(str(path))
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    header = struct.pack("<Q", tensors) + data
    (folder / "model.safetensors").write_bytes(header)
    try:
        read_safetensors(folder)
    except LpuError as error:
        assert str(error).isprintable()
