"""In: models of every family. Out: embeddings with the same bits everywhere, and transformers'."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from test_host import KERNELS, batch, block_model, host_of, prompt, same_bits
from tiny_models import as_transformers

from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import Compiled, compile_weights
from openlpu.engine.embed import FinalNorm, Mean, embeddings, final_norm, reading
from openlpu.engine.families import FAMILIES, random_model
from openlpu.engine.runner import Runner
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request
from openlpu.engine.verify import engine_for, random_tokens
from openlpu.errors import DoesNotFit, NumericOverflow, RequestError
from openlpu.graph.step import PAGE, Batch
from openlpu.numerics.rotation import rotate_last, unrotate_last
from openlpu.store import Store

VOCABULARY = 272
F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return random_model("llama")


@pytest.fixture(scope="module")
def host(compiled: Compiled, store: Store) -> Iterator[Runner]:
    with closing(compiled.host(store=store, threads=2)) as runner:
        yield runner


def engine_on(runner: Runner, **options: object) -> Engine:
    return Engine(runner, context=400, vocab_size=VOCABULARY, **options)  # type: ignore[arg-type]


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random_tokens(n, VOCABULARY, seed=i) for i, n in enumerate(lengths)]


# -- the arithmetic ---------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 48, 96, 80, 112, 160, 576, 896, 1536, 7 * 16])
def test_unrotating_is_the_inverse_of_rotating(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((5, width))
    error = np.abs(unrotate_last(rotate_last(x, seed=3), seed=3) - x).max()
    assert error < 4e-15
    alone = np.concatenate([unrotate_last(row[None], seed=3) for row in x])
    assert np.array_equal(alone, unrotate_last(x, seed=3))


def test_the_mean_is_the_same_by_any_pieces_and_of_rows_that_come_twice() -> None:
    norm = FinalNorm(np.linspace(0.5, 1.5, 96), 1e-5, 1)
    states = np.random.default_rng(0).standard_normal((50, 96)).astype(np.float32)
    found = []
    for pieces in ([(0, 50)], [(0, 1), (1, 33), (33, 50)], [(0, 20), (0, 7), (0, 40), (40, 50)]):
        mean = Mean(norm)
        for start, stop in pieces:
            mean.take(start, states[start:stop])
        found.append(mean.embedding())
    assert same_bits(found[1], found[0])
    assert same_bits(found[2], found[0])
    assert found[0].dtype == np.float32
    assert abs(np.linalg.norm(found[0].astype(np.float64)) - 1) < 1e-7


def test_the_known_bits_of_one_embedding() -> None:
    """The same on every machine and with every numpy: nothing here comes from a library's sum."""
    norm = FinalNorm(1 + np.arange(96) / 64, 1e-5, 1)
    states = (np.arange(7 * 96) * 37 % 101 - 50).reshape(7, 96).astype(np.float32)
    mean = Mean(norm)
    mean.take(0, states)
    digest = hashlib.sha256(mean.embedding().astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "60f385b5ed8cd969"


def test_a_mean_of_zero_has_no_direction_and_a_poisoned_row_is_an_error() -> None:
    mean = Mean(FinalNorm(np.ones(16), 1e-5, None))
    mean.take(0, np.zeros((2, 16), np.float32))
    assert not mean.embedding().any()
    with pytest.raises(NumericOverflow, match="no embedding"):
        mean.take(2, np.full((1, 16), np.inf, np.float32))


# -- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["w8", "q4_1"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_states_of_host_and_reference(
    family: str, precision: str, kernels: str, store: Store
) -> None:
    """States and logits come from one model in any order, and neither disturbs the other."""
    compiled = random_model(family) if precision == "w8" else block_model(family, precision)
    reference = compiled.reference()
    rows = prompt(200)
    with closing(host_of(compiled, store, kernels=kernels, threads=2)) as host:
        for step in (batch(rows[:1]), batch(rows[1:40]), batch(rows[40:], wanted=[0, 7, 159])):
            states = host.states(step)
            assert states.shape == (step.wanted.size, compiled.config.dim)
            assert same_bits(states, reference.states(step))
            assert same_bits(host.step(step), reference.step(step))
            assert same_bits(host.states(step), states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_embeddings_of_host_and_reference(family: str, precision: str, store: Store) -> None:
    compiled = random_model(family, precision=precision)  # type: ignore[arg-type]
    norm = final_norm(compiled)
    assert (norm.seed is None) == (precision == "w4")
    prompts = prompts_of(1, 2, 63, 64, 65, 300)
    with closing(compiled.host(store=store, threads=2)) as host:
        together = embeddings(engine_for(host, compiled), norm, prompts)
        alone = [embeddings(engine_for(host, compiled), norm, [p]) for p in prompts]
    assert together.shape == (6, compiled.config.dim)
    assert same_bits(together, np.concatenate(alone))
    assert same_bits(
        together, embeddings(engine_for(compiled.reference(), compiled), norm, prompts)
    )


def test_embeddings_among_answers_are_those_alone(compiled: Compiled, host: Runner) -> None:
    """With answers under way, cancelled neighbours, shared prefixes and memory for few of them."""
    norm, prompts = final_norm(compiled), prompts_of(5, 130, 64, 399, 1)
    expected = embeddings(engine_on(host), norm, prompts)
    sampling = Sampling(max_tokens=40)
    lonely = engine_on(host)
    alone = lonely.submit(prompts[1], sampling)
    finish(lonely)
    for most_pages in (None, 9, 8):
        engine = engine_on(host, most_pages=most_pages)
        answers = [engine.submit(prompts[1], sampling) for _ in range(3)]
        means = [Mean(norm) for _ in prompts]
        readers = []
        for tokens, mean in zip(prompts, means, strict=True):
            readers.append(engine.submit(tokens, *reading(mean)))
            engine.submit(tokens, *reading(Mean(norm))).cancel()
            engine.step()
            answers.append(engine.submit(prompts[1], sampling))
        finish(engine)
        assert [a.error for a in [*answers, *readers]] == [None] * 13
        assert same_bits(np.stack([mean.embedding() for mean in means]), expected)
        assert all(answer.generated == alone.generated for answer in answers)
        assert engine.sequences == 0
        assert engine.pages.held == 0


def finish(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


# -- time and memory --------------------------------------------------------------------------


class Watched:
    """A runner that notes the rows of each step."""

    slots = 64
    shares_pages = True

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.max_rows = self.rows_of_a_sequence = 512
        self.log: list[tuple[str, int]] = []

    @property
    def pages(self) -> int:
        return self.runner.pages

    def grow(self, pages: int) -> None:
        self.runner.grow(pages)

    def step(self, batch: Batch) -> F32:
        self.log.append(("logits", batch.tokens.size))
        return self.runner.step(batch)

    def states(self, batch: Batch) -> F32:
        self.log.append(("states", batch.tokens.size))
        return self.runner.states(batch)  # type: ignore[attr-defined]

    def close(self) -> None:
        pass


def test_answers_wait_for_one_step_of_128_rows_at_most(compiled: Compiled, host: Runner) -> None:
    watched = Watched(host)
    engine = engine_on(watched)
    answer = engine.submit(prompts_of(3)[0], Sampling(max_tokens=30, ignore_eos=True))
    engine.step()
    for tokens in prompts_of(390, 390, 390):
        engine.submit(tokens, *reading(Mean(final_norm(compiled))))
    finish(engine)
    assert answer.finish_reason == "length"
    kinds = [kind for kind, _ in watched.log]
    assert all(pair != ("states", "states") for pair in pairwise(kinds[:20]))
    assert max(rows for kind, rows in watched.log if kind == "states") == 128
    assert sum(rows for kind, rows in watched.log if kind == "states") == 3 * 390


def test_a_cancelled_reader_takes_no_further_step(compiled: Compiled, host: Runner) -> None:
    watched = Watched(host)
    engine = engine_on(watched)
    answer = engine.submit(prompts_of(390)[0], *reading(Mean(final_norm(compiled))))
    answer.cancel()
    engine.step()
    assert (watched.log, engine.busy, engine.pages.held) == ([], False, 0)


def test_what_cannot_be_read_is_refused(compiled: Compiled, host: Runner) -> None:
    norm = final_norm(compiled)

    class LogitsOnly(Watched):
        states = None  # type: ignore[assignment]

    engine = engine_on(host, most_pages=4)
    with pytest.raises(RequestError, match="no tokens"):
        embeddings(engine, norm, [[]])
    with pytest.raises(RequestError, match="context of 400"):
        embeddings(engine, norm, prompts_of(401))
    with pytest.raises(DoesNotFit, match="pages"):
        embeddings(engine, norm, prompts_of(5 * PAGE))
    assert embeddings(engine, norm, []).shape == (0, 96)
    assert embeddings(engine_on(host), norm, prompts_of(400)).shape == (1, 96)  # all the context
    with pytest.raises(RequestError, match="states cannot be read"):
        engine_on(LogitsOnly(host)).submit([1], *reading(Mean(norm)))


def test_a_reader_that_fails_spares_the_others(compiled: Compiled, host: Runner) -> None:
    class Broken:
        def take(self, first: int, states: F32) -> None:
            raise NumericOverflow("broken")

    engine, norm = engine_on(host), final_norm(compiled)
    broken = engine.submit(prompts_of(3)[0], Sampling(), Request(reader=Broken()))
    mean = Mean(norm)
    whole: Answer = engine.submit(prompts_of(3)[0], *reading(mean))
    finish(engine)
    assert isinstance(broken.error, NumericOverflow)
    assert whole.finish_reason == "stop"
    assert same_bits(mean.embedding(), embeddings(engine_on(host), norm, prompts_of(3))[0])


# -- transformers -----------------------------------------------------------------------------


def float_embeddings(compiled: Compiled, prompts: list[list[int]], *, stage: str) -> F32:
    graph = dict(compiled.stages)[stage]
    norm = final_norm(compiled)
    if stage == "build":
        norm = replace(norm, seed=None)
    return embeddings(engine_for(compiled.reference(graph=graph), compiled), norm, prompts)


@pytest.mark.parametrize("family", ["llama", "smollm2", "mistral", "qwen2", "qwen3"])
def test_embeddings_are_those_of_transformers(family: str) -> None:
    import torch

    model, config, weights = as_transformers(family)
    compiled = compile_weights(config, weights)
    prompts = [random_tokens(n, config.vocab_size, seed=n) for n in (1, 9, 60)]
    expected = []
    for tokens in prompts:
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokens])).last_hidden_state[0].double().numpy()
        mean = hidden.mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    plain = float_embeddings(compiled, prompts, stage="build")
    turned = float_embeddings(compiled, prompts, stage="rotate")
    quantized = embeddings(
        engine_for(compiled.reference(), compiled), final_norm(compiled), prompts
    )
    for i, theirs in enumerate(expected):
        assert np.abs(plain[i] - theirs).max() < 1e-6
        assert np.abs(turned[i] - theirs).max() < 1e-6
        assert quantized[i] @ theirs > 0.9995
