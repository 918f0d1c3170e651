"""In: a checkpoint without blocks of 4 bits. Out: its Weights with such blocks, made once, cached.

They are kept as a GGUF file of the linears of the layers, under canonical names; tables, heads and
vectors stay in the checkpoint. What is made depends on the checkpoint and the text alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np

from openlpu.calibrate.rounding import calibrate
from openlpu.compiler import compile_graph
from openlpu.errors import RequestError
from openlpu.graph import Graph, GroupedTensor, Param
from openlpu.graph.ops import BLOCK_FORMATS, weights_and_biases
from openlpu.knobs import CALIBRATION, timed
from openlpu.load.blocks import pack_blocks
from openlpu.load.checkpoint import Checkpoint
from openlpu.load.gguf import read_gguf
from openlpu.load.tokenizer import Tokenizer
from openlpu.load.weights import ENCODINGS, Weights
from openlpu.numerics import CONTRACT
from openlpu.passes.recipe import Materializer
from openlpu.store import Store

METHOD = "feedback-1"
FORMAT = "q4_1"
MOST_TOKENS = 4096
LEAST_TOKENS = 64
_MOST_BYTES = 1 << 20  # of a text
_KIND = "blocks"
Progress = Callable[[str, int, int], None]


def has_blocks(weights: Weights) -> bool:
    """Whether a matrix of the checkpoint is stored in blocks that import without loss."""
    return any(
        len(weights.shape(name)) == 2 and weights.encoding(name) in BLOCK_FORMATS
        for name in weights.names()
    )


def in_blocks(
    checkpoint: Checkpoint, *, store: Store | None = None, progress: Progress | None = None
) -> Weights:
    """The checkpoint's weights, those of the layers' linears in FORMAT.

    Raises RequestError for a text that cannot be used, UnsupportedModel for sizes that are no
    multiples of 32, CheckpointError, StoreError.
    """
    store = store or Store()
    weights, text = checkpoint.weights, _text()
    parts = (METHOD, FORMAT, CONTRACT, weights.fingerprint(), text)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if store.get(_KIND, key) is None:
        graph = _graph(checkpoint)
        with store.lock(_KIND, key):
            if store.get(_KIND, key) is None:
                with timed(1, "weights rounded to 4 bits"), store.create(_KIND, key) as new:
                    _write(new, graph, checkpoint, text, progress)
    blocks = read_gguf(store.path(_KIND, key)).tensors
    return weights.with_tensors(blocks, fingerprint=key)


def _text() -> str:
    """The text to calibrate with: the knob's file, or our own."""
    if not CALIBRATION.value:
        return resources.files("openlpu.calibrate").joinpath("text.txt").read_text("utf-8")
    try:
        with Path(CALIBRATION.value).expanduser().open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", errors="ignore")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{CALIBRATION.env}={CALIBRATION.value!r}: {reason.lower()}") from None


def _graph(checkpoint: Checkpoint) -> Graph:
    """What the model will run, its layers' matrices in FORMAT."""
    weights = checkpoint.weights
    encodings = {
        name: FORMAT
        if name.startswith("layers.") and len(weights.shape(name)) == 2
        else weights.encoding(name)
        for name in weights.names()
    }
    return compile_graph(checkpoint.config, encodings, "w4")[-1][1]


def _params(graph: Graph) -> list[Param]:
    """The matrices to round, in the order in which they are used."""
    linears = (op for op in graph.ops if op.kind == "linear")
    used = (op.params[i] for op in linears for i in weights_and_biases(op)[0])
    return [param for param in used if param.format == FORMAT]


def _write(
    path: Path, graph: Graph, checkpoint: Checkpoint, text: str, progress: Progress | None
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter  # imported late: few starts need it

    tokens = Tokenizer.from_source(checkpoint.tokenizer).encode(text)[:MOST_TOKENS]
    if len(tokens) < LEAST_TOKENS:
        raise RequestError(
            f"a text of {len(tokens)} tokens is too short to calibrate with; "
            f"give one of {LEAST_TOKENS} to {MOST_TOKENS:,}"
        )
    params, form = _params(graph), ENCODINGS[FORMAT]
    total = sum(param.shape[0] * param.shape[1] for param in params)
    writer = GGUFWriter(path, "blocks")
    kind, byte = GGMLQuantizationType[FORMAT.upper()], np.dtype(np.uint8)
    for param in params:
        rows, row_bytes = param.shape[0], param.shape[1] // form.block_elements * form.block_bytes
        shape = rows, row_bytes
        writer.add_tensor_info(param.source, shape, byte, rows * row_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0

    def made(param: Param, tensor: GroupedTensor) -> None:
        nonlocal done
        writer.write_tensor_data(pack_blocks(tensor, FORMAT))
        done += param.shape[0] * param.shape[1]
        if progress:
            progress("rounding to 4 bits", done, total)

    try:
        calibrate(graph, Materializer(checkpoint.weights), tokens, made)
    finally:
        writer.close()
