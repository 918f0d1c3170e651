"""In: a model. Out: for each bit claim, how many cases were compared and how many bits differed.

Everything is run on the machine at hand: the host engine against the numpy reference, against
itself with other threads, batches, pieces and kernels, and against a second process. Prompts are
pseudo-random tokens of the whole vocabulary, so that no claim leans on ordinary text.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import Compiled, Precision
from openlpu.engine.families import FAMILIES, random_model
from openlpu.engine.model import open_model
from openlpu.engine.runner import Runner
from openlpu.engine.sampler import random_bits
from openlpu.engine.sequence import Sequence
from openlpu.errors import UnsupportedTarget
from openlpu.jit import TARGETS
from openlpu.store import Store

F32 = NDArray[np.float32]

KERNELS = tuple(TARGETS)
THREADS = (1, 2, 3)
PIECES = (1, 7, 64)
BATCHES = (2, 7, 32)
_ROWS_KEPT = 32  # rows of logits compared of a long prompt, the last one among them
_XOR_BYTES = 1 << 24  # of a comparison, held unpacked at once
_RANDOM_TOKENS = 340  # beyond one chunk of positions
_LONG = 32_768


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the table. differing_bits is None where this machine cannot test the claim."""

    claim: str
    cases: str
    compared_bits: int
    differing_bits: int | None
    seconds: float


class Differences:
    """Adds up bits that differ between pairs of arrays."""

    def __init__(self) -> None:
        self.compared = 0
        self.differing = 0

    def add(self, got: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
        """Compare two arrays; another shape counts as every bit."""
        self.compared += expected.nbytes * 8
        a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (got, expected))
        if a.size != b.size or got.shape != expected.shape:
            self.differing += expected.nbytes * 8
        elif not np.array_equal(a, b):
            for at in range(0, a.size, _XOR_BYTES):
                bits = np.unpackbits(a[at : at + _XOR_BYTES] ^ b[at : at + _XOR_BYTES])
                self.differing += int(bits.sum(dtype=np.int64))


def random_tokens(count: int, vocab_size: int, *, seed: int = 0) -> list[int]:
    """Tokens spread over the whole vocabulary, the same on every machine."""
    return [random_bits(seed, i) * vocab_size >> 64 for i in range(count)]


def rows_of(runner: Runner, compiled: Compiled, tokens: Items[int], piece: int = 512) -> F32:
    """Logits [n, V] of up to 32 rows spread over the prompt, computed `piece` rows at a time."""
    engine = engine_for(runner, compiled)
    kept = np.zeros(len(tokens), bool)
    kept[np.linspace(0, len(tokens) - 1, min(_ROWS_KEPT, len(tokens))).astype(int)] = True
    sequence = engine.open()
    try:
        found, done = [], 0
        for logits in engine.score(sequence, tokens, piece=piece):
            found.append(logits[kept[done : done + len(logits)]])
            done += len(logits)
        return np.concatenate(found)
    finally:
        engine.close(sequence)


def engine_for(runner: Runner, compiled: Compiled) -> Engine:
    """An engine with the model's own context."""
    return Engine(runner, context=compiled.graph.context, vocab_size=compiled.config.vocab_size)


def verify(
    name_or_path: str,
    *,
    precision: str = "w8",
    full: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Claim]:
    """Test every claim; yields the rows of the table as they are done.

    Without `full`: prompts of 30 and 400 tokens, about a minute; with it: 30, 900 and 4,000,
    random models on every kernel set, and a context of 32,768.
    """
    _, compiled = open_model(name_or_path, precision=precision, progress=progress)
    lengths = [n for n in ((30, 900, 4000) if full else (30, 400)) if n < compiled.graph.context]
    vocab_size = compiled.config.vocab_size
    prompts = {n: random_tokens(n, vocab_size, seed=n) for n in lengths}
    with closing(compiled.host(progress=progress)) as host:
        base = {n: rows_of(host, compiled, prompts[n]) for n in lengths}
        identity = host.identity
        yield from _against_reference(compiled, prompts, base, lengths if full else lengths[:1])
        yield _random_models(compiled.precision, full=full)
        if full:
            yield _long_context(compiled.precision)
        yield _pieces(host, compiled, prompts, base)
        yield _batches(host, compiled, base_tokens=prompts[lengths[0]])
    yield _threads(compiled, prompts, base)
    yield from _kernels(compiled, prompts, base, lengths if full else lengths[:1])
    yield _restart(name_or_path, precision, base[lengths[0]], lengths[0])
    yield _packing(compiled, identity, times=(1, 1, 2, 3) if full else (1,))


def _claim(
    claim: str, cases: str, differences: Differences, started_s: float, *, tested: bool = True
) -> Claim:
    return Claim(
        claim,
        cases,
        differences.compared,
        differences.differing if tested else None,
        time.perf_counter() - started_s,
    )


def _tokens_text(lengths: Items[int]) -> str:
    return ", ".join(f"{n:,}" for n in lengths) + " tokens"


def _against_reference(
    compiled: Compiled,
    prompts: dict[int, list[int]],
    base: dict[int, F32],
    lengths: Items[int],
) -> Iterator[Claim]:
    reference = compiled.reference()
    for n in lengths:
        started_s, found = time.perf_counter(), Differences()
        found.add(base[n], rows_of(reference, compiled, prompts[n]))
        yield _claim("host equals the numpy reference", _tokens_text([n]), found, started_s)


def _random_models(precision: Precision, *, full: bool) -> Claim:
    started_s, found = time.perf_counter(), Differences()
    sets = KERNELS if full else (None,)
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            compiled = random_model(family, precision=precision)
            tokens = random_tokens(_RANDOM_TOKENS, compiled.config.vocab_size)
            expected = rows_of(compiled.reference(), compiled, tokens)
            for kernels in sets:
                try:
                    host = compiled.host(kernels=kernels, store=Store(Path(folder)))
                except UnsupportedTarget:
                    continue
                with closing(host):
                    for piece in (512, 7):
                        found.add(rows_of(host, compiled, tokens, piece), expected)
    return _claim("random models equal the reference", ", ".join(FAMILIES), found, started_s)


def _long_context(precision: Precision) -> Claim:
    """A small random model at the end of a context of 32,768: the reference's last rows, on every
    kernel set and any number of threads, in one step, in pieces and one by one."""
    started_s, found = time.perf_counter(), Differences()
    config = replace(FAMILIES["qwen3"], layers=1, heads=2, kv_heads=1, windows=(None,))
    config = replace(config, context=_LONG + 64)
    tokens = random_tokens(_LONG, config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        compiled = random_model("qwen3", precision=precision, config=config)
        expected = _last_rows(compiled.reference(), compiled, tokens, (_ROWS_KEPT,))
        for kernels in KERNELS:
            for threads in THREADS:
                try:
                    host = compiled.host(
                        kernels=kernels, threads=threads, store=Store(Path(folder))
                    )
                except UnsupportedTarget:
                    continue
                with closing(host):
                    for pieces in ((_ROWS_KEPT,), (1,), (7, 1, 16, 3)):
                        found.add(_last_rows(host, compiled, tokens, pieces), expected)
    cases = f"{_LONG:,} tokens; threads {', '.join(map(str, THREADS))}"
    return _claim("a long context of a random model", cases, found, started_s)


def _last_rows(runner: Runner, compiled: Compiled, tokens: list[int], pieces: Items[int]) -> F32:
    """Logits of the last rows, so many at a time in turn."""
    engine = engine_for(runner, compiled)
    sequence = engine.open()
    try:
        engine.last_logits(sequence, tokens[:-_ROWS_KEPT])
        found, rest = [], tokens[-_ROWS_KEPT:]
        for count in itertools.cycle(pieces):
            found += list(engine.score(sequence, rest[:count], piece=count))
            rest = rest[count:]
            if not rest:
                return np.concatenate(found)
        raise AssertionError("pieces never end")
    finally:
        engine.close(sequence)


def _pieces(
    host: Runner, compiled: Compiled, prompts: dict[int, list[int]], base: dict[int, F32]
) -> Claim:
    started_s, found = time.perf_counter(), Differences()
    for n, tokens in prompts.items():
        for piece in PIECES:
            found.add(rows_of(host, compiled, tokens, piece), base[n])
    cases = f"{', '.join(map(str, PIECES))} at a time; {_tokens_text(list(prompts))}"
    return _claim("a prompt in pieces, or token by token", cases, found, started_s)


def _batches(host: Runner, compiled: Compiled, *, base_tokens: list[int]) -> Claim:
    """Every sequence of a batch, alone and together: its prompt, then four tokens one by one."""
    started_s, found = time.perf_counter(), Differences()
    size = max(BATCHES)
    vocab_size = compiled.config.vocab_size
    prompts = [
        base_tokens[: 5 + i % 20] + random_tokens(9, vocab_size, seed=i) for i in range(size)
    ]
    alone = [_decoded(host, compiled, [tokens])[0] for tokens in prompts]
    for count in BATCHES:
        together = _decoded(host, compiled, prompts[:count])
        for got, expected in zip(together, alone, strict=False):
            found.add(got, expected)
    cases = f"{', '.join(map(str, BATCHES))} sequences"
    return _claim("alone or in a batch with others", cases, found, started_s)


def _decoded(host: Runner, compiled: Compiled, prompts: list[list[int]]) -> list[F32]:
    """Logits [5, V] of each prompt's last five tokens: the prompts together, then in lockstep."""
    engine, last = engine_for(host, compiled), 4
    sequences = [engine.open() for _ in prompts]
    try:
        for sequence, tokens in zip(sequences, prompts, strict=True):
            sequence.tokens = tokens[:-last]
        plan: list[tuple[Sequence, int]] = []
        rows: list[F32] = []
        for sequence in sequences:  # prompts together, as many as fit one step
            if sum(r for _, r in plan) + sequence.pending > host.max_rows:
                rows.append(engine.compute(plan, wanted="last"))
                plan = []
            plan.append((sequence, sequence.pending))
        rows.append(engine.compute(plan, wanted="last"))
        found = [np.concatenate(rows)]
        for step in range(-last, 0):
            for sequence, tokens in zip(sequences, prompts, strict=True):
                sequence.tokens.append(tokens[step])
            found.append(engine.compute([(s, 1) for s in sequences], wanted="last"))
        return list(np.stack(found, axis=1))
    finally:
        for sequence in sequences:
            engine.close(sequence)


def _threads(compiled: Compiled, prompts: dict[int, list[int]], base: dict[int, F32]) -> Claim:
    started_s, found = time.perf_counter(), Differences()
    for threads in THREADS:
        with closing(compiled.host(threads=threads)) as host:
            for n, tokens in prompts.items():
                found.add(rows_of(host, compiled, tokens), base[n])
    cases = f"{', '.join(map(str, THREADS))}; {_tokens_text(list(prompts))}"
    return _claim("any number of threads", cases, found, started_s)


def _kernels(
    compiled: Compiled,
    prompts: dict[int, list[int]],
    base: dict[int, F32],
    lengths: Items[int],
) -> Iterator[Claim]:
    for kernels in KERNELS:
        started_s, found = time.perf_counter(), Differences()
        try:
            host = compiled.host(kernels=kernels)
        except UnsupportedTarget:
            cases = "not on this processor"
            yield _claim(f"{kernels} kernels", cases, found, started_s, tested=False)
            continue
        with closing(host):
            for n in lengths:
                found.add(rows_of(host, compiled, prompts[n]), base[n])
        yield _claim(f"{kernels} kernels", _tokens_text(lengths), found, started_s)


def _restart(name_or_path: str, precision: str, expected: F32, length: int) -> Claim:
    started_s, found = time.perf_counter(), Differences()
    code = "import sys; from openlpu.engine.verify import digest; digest(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, name_or_path, precision, str(length)],
        capture_output=True,
        check=False,
    )
    digest = np.frombuffer(hashlib.sha256(expected.tobytes()).digest(), np.uint8)
    found.add(np.frombuffer(done.stdout, np.uint8), digest)
    return _claim("after a restart from the cache", "sha256 of the logits", found, started_s)


def digest(name_or_path: str, precision: str, length: str) -> None:
    """What the second process does: write the sha256 of its logits to standard output."""
    _, compiled = open_model(name_or_path, precision=precision)
    with closing(compiled.host()) as host:
        tokens = random_tokens(int(length), compiled.config.vocab_size, seed=int(length))
        rows = rows_of(host, compiled, tokens)
    sys.stdout.buffer.write(hashlib.sha256(rows.tobytes()).digest())


def _packing(compiled: Compiled, identity: str, *, times: Items[int]) -> Claim:
    """Pack again into an empty cache, once for each thread count: the same identity, the same file
    as the one that the other claims ran on."""
    started_s, found = time.perf_counter(), Differences()
    expected = np.frombuffer(identity.encode(), np.uint8)
    packed = compiled.packed_bytes(Store())
    for threads in times:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            with closing(compiled.host(threads=threads, store=store)) as host:
                found.add(np.frombuffer(host.identity.encode(), np.uint8), expected)
            found.add(compiled.packed_bytes(store), packed)
    cases = f"sha256 of the tensors, the file; threads {', '.join(map(str, times))}"
    return _claim("packed again from the checkpoint", cases, found, started_s)
