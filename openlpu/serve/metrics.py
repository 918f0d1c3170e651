"""In: requests, answers, the worker and its pages. Out: the page that Prometheus reads.

Counters and histograms grow as things happen; gauges look at the worker when the page is read.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from openlpu.engine.pages import PageTable
from openlpu.engine.sequence import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MOST_RECENT = 1024


class Load(Protocol):
    """What the gauges look at; the worker is one."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def steps(self) -> int: ...


class Recent:
    """The latest times of a kind, and when each was. Threads may share it."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=_MOST_RECENT)
        self._lock = threading.Lock()

    def add(self, at_s: float, seconds: float) -> None:
        with self._lock:
            self._times.append((at_s, seconds))

    def median_s(self, since_s: float) -> float | None:
        """Of those since then; None if there are none."""
        with self._lock:
            found = [seconds for at_s, seconds in self._times if at_s >= since_s]
        return statistics.median(found) if found else None


class Metrics:
    """Everything that is counted, in a registry of its own: two services in one process do not
    meet."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Answered requests.", "endpoint", "status")
        self._request_s = self._histogram(
            "request_seconds", "From a request's header to its last byte.", _LATENCY_S, "endpoint"
        )
        self._answers = self._counter("answers", "Answers by their end.", "finish_reason")
        self._queue_s = self._histogram(
            "queue_seconds", "From an answer's start to the first step with it.", _LATENCY_S
        )
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "From an answer's start to its first token.", _LATENCY_S
        )
        self._token_s = self._histogram(
            "inter_token_seconds", "Mean time between the tokens of an answer.", _TOKEN_S
        )
        self._batch = self._histogram("batch_sequences", "Sequences in a step.", _ROWS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_tokens", "Prompt tokens whose K/V were there.")
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._proposed = self._counter("proposed_tokens", "Tokens that prompt lookup proposed.")
        self._accepted = self._counter("accepted_tokens", "Proposed tokens that were right.")
        self._preempted = self._counter("preemptions", "Times that a sequence gave its K/V up.")
        self.recent_first_token = Recent()
        self.recent_token = Recent()

    def watch(self, load: Load, pages: PageTable) -> None:
        """Let the gauges look at a worker and its K/V pages."""
        self._gauge("running_requests", "Answers under way.", lambda: load.running)
        self._gauge("waiting_requests", "Requests in the queue.", lambda: load.waiting)
        self._gauge("steps", "Steps of the engine so far.", lambda: load.steps)
        self._gauge("kv_pages_held", "K/V pages that sequences hold.", lambda: pages.held)
        self._gauge("kv_pages_kept", "K/V pages kept for equal prefixes.", lambda: pages.kept)
        self._gauge("kv_pages_limit", "Most K/V pages; 0: no limit.", lambda: pages.limit or 0)

    def observe_request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered. endpoint: a route, never a client's own text."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_s.labels(endpoint).observe(seconds)

    def observe_step(self, sequences: int) -> None:
        """A step computed something for so many sequences."""
        self._batch.observe(sequences)

    def observe_tokens(self, answer: Answer, new: int, since_s: float) -> None:
        """An answer has so many new tokens; the one before them came at since_s."""
        self._generated.inc(new)
        first_s, last_s = answer.first_token_s, answer.last_token_s
        assert first_s is not None
        assert last_s is not None
        if new == len(answer.generated):
            self.recent_first_token.add(first_s, first_s - answer.started_s)
        else:
            self.recent_token.add(last_s, (last_s - since_s) / new)

    def observe_answer(
        self, answer: Answer, reason: str | None = None, *, counts_prompt: bool = True
    ) -> None:
        """An answer has ended. reason: why, where it is not the engine that knows.
        counts_prompt: whether it is the first one to its prompt."""
        reason = reason or answer.finish_reason or "none"
        self._answers.labels("error" if answer.error else reason).inc()
        if answer.first_step_s is not None:
            self._queue_s.observe(answer.first_step_s - answer.started_s)
            if counts_prompt:
                self._prompt.inc(answer.prompt_length)
                self._cached.inc(answer.reused)
        tokens = len(answer.generated)
        if answer.first_token_s is not None and answer.last_token_s is not None:
            self._first_token_s.observe(answer.first_token_s - answer.started_s)
            if tokens > 1:
                self._token_s.observe((answer.last_token_s - answer.first_token_s) / (tokens - 1))
        self._proposed.inc(answer.proposed)
        self._accepted.inc(answer.accepted)
        self._preempted.inc(answer.preempted)

    def totals(self) -> dict[str, float]:
        """What has been counted so far, for those who look often."""
        counters = {
            "answers": self._answers,
            "prompt_tokens": self._prompt,
            "cached_tokens": self._cached,
            "generated_tokens": self._generated,
            "proposed_tokens": self._proposed,
            "accepted_tokens": self._accepted,
            "preemptions": self._preempted,
            "batch_sequences": self._batch,
        }
        return {name: _total(counter) for name, counter in counters.items()}

    def render(self) -> bytes:
        """The page, as of now."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"lpu_{name}", what, labels, registry=self._registry)

    def _histogram(
        self, name: str, what: str, bounds: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"lpu_{name}", what, labels, buckets=bounds, registry=self._registry)

    def _gauge(self, name: str, what: str, look: Callable[[], float]) -> None:
        Gauge(f"lpu_{name}", what, registry=self._registry).set_function(look)


def _total(counted: MetricWrapperBase) -> float:
    """The sum over all labels, of what was counted or observed."""
    (metric,) = counted.collect()
    return sum(s.value for s in metric.samples if s.name.endswith(("_total", "_sum")))
