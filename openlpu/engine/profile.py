"""In: the stages of a Compiled. Out: per stage, its ops, the bytes between them, its time.

Times are those of one layer with random weights of the model's sizes: they do not depend on
values, and one layer is packed in a moment where all stages of the whole model take minutes.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from openlpu.engine.compiled import Compiled, compile_weights
from openlpu.engine.families import random_weights
from openlpu.engine.verify import engine_for, random_tokens
from openlpu.graph import Graph, Param, Value, types
from openlpu.load.config import ModelConfig
from openlpu.numerics import GROUP
from openlpu.store import Store

_ROWS_AND_REPEATS = ((1, 50), (512, 5))
# Bits of a weight as the host engine packs it: with the 16-bit scales (and minima) of 32 weights.
_BITS = {"f32": 32, "w8": 8, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5}


@dataclass(frozen=True, slots=True)
class Stage:
    """A graph after one pass. Times are None where the host engine cannot run it yet."""

    name: str
    ops: int
    kinds: dict[str, int]
    weight_bytes: int
    bytes_per_row: int
    """Bytes that ops write and read between them for one row; weights and K/V are not in it."""
    layer_1_row_us: float | None = None
    layer_512_rows_us: float | None = None


def stages(
    compiled: Compiled, *, timed: bool, progress: Callable[[str, int, int], None] | None = None
) -> list[Stage]:
    """Every stage of the compilation, in order."""
    with tempfile.TemporaryDirectory() as folder:  # random layers have no place in the cache
        return list(_stages(compiled, Store(Path(folder)), timed, progress))


def _stages(
    compiled: Compiled,
    store: Store,
    timed: bool,
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[Stage]:
    thin = _one_layer(compiled) if timed else None
    for index, (name, graph) in enumerate(compiled.stages):
        stage = Stage(
            name,
            len(graph.ops),
            dict(Counter(op.kind for op in graph.ops)),
            weight_bytes(graph),
            bytes_per_row(graph),
        )
        if thin and any(p.format != "f32" and len(p.shape) == 2 for p in graph.params()):
            one, many = _times_us(replace(thin, stages=thin.stages[: index + 1]), store)
            stage = replace(stage, layer_1_row_us=one, layer_512_rows_us=many)
        yield stage
        if progress:
            progress("measure", index + 1, len(compiled.stages))


def weight_bytes(graph: Graph) -> int:
    """Bytes of all weights as packed, scales included; a tied table counts for each use."""
    return _param_bytes(graph.params())


def bytes_per_step(graph: Graph) -> int:
    """Bytes of the weights that every step reads: all but the embedding table."""
    return _param_bytes(p for op in graph.ops if op.kind != "embed" for p in op.params)


def _param_bytes(params: Iterable[Param]) -> int:
    total = 0
    for param in params:
        count = 1
        for size in param.shape:
            count *= size
        total += int(count * _BITS[param.format] / 8)
        total += 4 * param.shape[0] if param.format == "w8" else 0
    return total


def bytes_per_row(graph: Graph) -> int:
    """Bytes written and read between ops for one row whose logits are wanted."""
    known = types(graph)
    return sum(
        _row_bytes(known[name])
        for op in graph.ops
        for name in (op.out, *op.src)
        if name != "tokens"
    )


def _row_bytes(value: Value) -> int:
    match value.kind:
        case "q8":
            return value.width + 4
        case "g8":
            return value.width + 4 * (value.width // GROUP)
    return 4 * value.width


def _one_layer(compiled: Compiled) -> Compiled:
    config: ModelConfig = replace(
        compiled.config, layers=1, vocab_size=256, windows=compiled.config.windows[:1], tied=True
    )
    return compile_weights(config, random_weights(config), precision=compiled.precision)


def _times_us(thin: Compiled, store: Store) -> tuple[float, float]:
    """Least microseconds of a step of 1 and of 512 rows at the beginning of a sequence."""
    results = []
    with closing(thin.host(store=store)) as host:
        engine = engine_for(host, thin)
        for rows, repeats in _ROWS_AND_REPEATS:
            tokens = random_tokens(min(rows, engine.context), thin.config.vocab_size)
            times = []
            for _ in range(repeats):
                sequence = engine.open()
                started_s = time.perf_counter()
                engine.last_logits(sequence, tokens)
                times.append(time.perf_counter() - started_s)
                engine.close(sequence)
            results.append(min(times) * 1e6)
    return results[0], results[1]
