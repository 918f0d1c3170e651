"""In: matrices, correlated inputs, a checkpoint of floats. Out: 4-bit blocks that err less, always
the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import house
import numpy as np
import pytest
import tiny_chat
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

import openlpu
from openlpu import knobs
from openlpu.calibrate.feedback import round_blocks
from openlpu.calibrate.moments import factored, second_moments
from openlpu.engine.model import open_model
from openlpu.engine.verify import rows_of
from openlpu.errors import RequestError, UnsupportedModel
from openlpu.load.blocks import decode_blocks, pack_blocks, unpack_blocks
from openlpu.numerics.quant import quantize_groups

FORMATS = ("q4_0", "q4_1")


def inputs(rows: int, width: int, seed: int) -> np.ndarray:
    """Rows whose columns go together, some of them large, as they are in models."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width // 2)) @ rng.normal(size=(width // 2, width))
    mixed += rng.normal(size=(rows, width))
    return (mixed * np.exp(rng.normal(size=width))).astype(np.float32)


@pytest.mark.parametrize("block_format", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_fed_back_errors_are_smaller_than_those_of_rounding(block_format: str, seed: int) -> None:
    """In what the linear gives, for the rows of the text and for others like them."""
    rng = np.random.default_rng(seed)
    x = inputs(700, 128, seed)
    w = rng.standard_t(5, size=(96, 128)).astype(np.float32)
    q, scale = quantize_groups(x[:500], group=32)
    tensor = round_blocks(w.astype(np.float64), factored(second_moments(q, scale)), block_format)
    ours = decode_blocks(pack_blocks(tensor, block_format), block_format)
    plain = decode_blocks(quantize(w, GGMLQuantizationType[block_format.upper()]), block_format)
    for part, most in ((x[:500], 0.5), (x[500:], 0.7)):
        exact = part @ w.T
        errors = [float(((part @ v.T - exact) ** 2).sum()) for v in (ours, plain)]
        assert errors[0] < most * errors[1]


def test_the_moments_and_their_factor_are_what_numpy_says() -> None:
    x = inputs(400, 96, 3)
    q, scale = quantize_groups(x, group=32)
    wide = (q.reshape(400, 3, 32) * scale[..., None].astype(np.float64)).reshape(400, 96)
    moments = second_moments(q, scale)
    size = np.sqrt((wide**2).sum(axis=0))
    assert np.abs((moments - wide.T @ wide) / size / size[:, None]).max() < 1e-4
    factor = factored(moments)
    whole = factor.size[:, None] * factor.r * 2.0**-26
    damped = moments + 0.01 * np.trace(moments) / 96 * np.eye(96)
    np.testing.assert_allclose(whole @ whole.T, damped, rtol=1e-5, atol=1e-6 * damped.max())
    assert np.array_equal(factor.r, np.triu(factor.r))


@settings(max_examples=30)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1))
def test_blocks_are_packed_as_they_are_unpacked(block_format: str, seed: int) -> None:
    size = {"q4_0": 18, "q4_1": 20}[block_format]
    data = np.random.default_rng(seed).integers(0, 256, (3, 4, size), np.uint8)
    data[..., 1] &= 0x3B  # finite scales
    if block_format == "q4_1":
        data[..., 3] &= 0x3B
    stored = data.reshape(3, -1)
    assert np.array_equal(pack_blocks(unpack_blocks(stored, block_format), block_format), stored)


def test_a_row_of_zeros_and_inputs_of_zeros_are_no_trouble() -> None:
    q, scale = quantize_groups(np.zeros((10, 64), np.float32), group=32)
    w = np.ones((16, 64))
    w[3] = 0.0
    for block_format in FORMATS:
        tensor = round_blocks(w, factored(second_moments(q, scale)), block_format)
        found = decode_blocks(pack_blocks(tensor, block_format), block_format)
        assert np.array_equal(found, w.astype(np.float32))


SAME = """
import hashlib, sys
import numpy as np
sys.path.insert(0, "tests")
from test_calibrate import inputs
from openlpu.calibrate.feedback import round_blocks
from openlpu.calibrate.moments import factored, second_moments
from openlpu.numerics.quant import quantize_groups
factor = factored(second_moments(*quantize_groups(inputs(600, 256, 1), group=32)))
tensor = round_blocks(np.random.default_rng(2).normal(size=(160, 256)), factor, "q4_1")
parts = (factor.r, factor.size, tensor.q, tensor.scale, tensor.minimum)
print(hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest())
"""


def test_neither_threads_nor_the_kernels_of_a_library_change_a_bit() -> None:
    found = set()
    for threads, core in (("1", "Haswell"), ("2", ""), ("1", "Nehalem"), ("2", "SkylakeX")):
        env = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OPENBLAS_CORETYPE": core}
        done = subprocess.run(
            [sys.executable, "-c", SAME],
            cwd=house.REPOSITORY,
            env=env if core else {k: v for k, v in env.items() if k != "OPENBLAS_CORETYPE"},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1


@pytest.fixture
def floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of float32 whose sizes are multiples of 32."""
    monkeypatch.setitem(tiny_chat.CONFIG, "hidden_size", 64)
    return tiny_chat.write_tiny_chat(tmp_path / "model")


def test_a_checkpoint_of_floats_runs_in_four_bits(floats: Path, tmp_path: Path) -> None:
    """Made once; the host runs what the reference says, near to the floats."""
    stages: list[str] = []
    with knobs.override(CACHE=str(tmp_path / "cache")):
        with openlpu.load(
            str(floats), precision="w4", progress=lambda stage, *_: stages.append(stage)
        ) as model:
            tokens = model.tokenize("The same blocks, whoever makes them.")
            expected = rows_of(model.compiled.reference(), model.compiled, tokens)
            assert np.array_equal(model.logits(tokens), expected[-1])
            identity = model.identity
        assert "rounding to 4 bits" in stages
        stages.clear()
        with openlpu.load(
            str(floats), precision="w4", progress=lambda stage, *_: stages.append(stage)
        ) as again:
            assert again.identity == identity
        assert "rounding to 4 bits" not in stages
        text = tmp_path / "text.txt"
        text.write_text("Quite another text. " * 40)
        with (
            knobs.override(CALIBRATION=str(text)),
            openlpu.load(str(floats), precision="w4") as other,
        ):
            assert other.identity != identity


def test_what_cannot_be_used_is_told(floats: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with knobs.override(CACHE=str(tmp_path / "cache")):
        with knobs.override(CALIBRATION=str(short)), pytest.raises(RequestError, match="too short"):
            open_model(str(floats), precision="w4")
        for path in (tmp_path / "missing.txt", tmp_path):
            with (
                knobs.override(CALIBRATION=str(path)),
                pytest.raises(RequestError, match="LPU_CALIBRATION"),
            ):
                open_model(str(floats), precision="w4")


def test_sizes_that_are_no_multiples_of_a_group_are_refused(tmp_path: Path) -> None:
    folder = tiny_chat.write_tiny_chat(tmp_path / "model")  # 48 wide
    with (
        knobs.override(CACHE=str(tmp_path / "cache")),
        pytest.raises(UnsupportedModel, match="not a multiple of 32"),
    ):
        open_model(str(folder), precision="w4")
