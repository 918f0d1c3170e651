"""In: a GGUF file of a llama model. Out: an equal model of float16 weights that lie on no grid.

The residual stream is turned by a random orthogonal matrix: gains go into the matrices behind them,
then every matrix that reads the stream is multiplied by it on one side, every one that writes on
the other. The function stays the same; the weights become as spread as those of any trained
float model. So a file of 4-bit blocks serves to measure how others would round a float one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import TABLES, Planned, kept, metadata, write
from numpy.typing import NDArray

_RECIPE = 1
_READS = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm"} | {
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
}
_WRITES = ("attn_output", "ffn_down")


def rotated(source: Path, fingerprint: str) -> Path:
    """The file, made once and kept in the cache under the checkpoint's fingerprint."""
    return kept(f"{fingerprint}-rotated-{_RECIPE}.gguf", lambda target: _make(source, target))


def _make(source: Path, target: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    values = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    table, head = TABLES
    dim = values[table].shape[1]
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    values.setdefault(head, values[table])
    known = {*_READS.values(), *_READS, *_WRITES}

    def turned(name: str) -> NDArray[Any]:
        value = values[name].astype(np.float64)
        prefix, _, part = name.removesuffix(".weight").rpartition(".")
        if value.ndim == 1:
            return np.ones(dim, np.float32)
        if name == table:
            value = value @ turn
        elif name == head:
            value = value * values["output_norm.weight"] @ turn
        elif part in _READS:
            value = value * values[f"{prefix}.{_READS[part]}.weight"] @ turn
        else:
            value = turn.T @ value
        return value.astype(np.float16)

    for name in values:
        part = name.removesuffix(".weight").rpartition(".")[2]
        if name not in (*TABLES, "output_norm.weight") and part not in known:
            raise SystemExit(f"{name}: only llama models can be turned")
    architecture, fields = metadata(reader, "F16")
    tensors = [
        Planned(name, value.shape, "F32" if value.ndim == 1 else "F16", lambda n=name: turned(n))  # type: ignore[misc]
        for name, value in values.items()
    ]
    write(target, architecture, fields, tensors)
