"""In: requests of asyncio tasks. Out: Feeds of their tokens; one thread steps the engine.

Nothing that runs in an event loop waits for a step. After each step the thread wakes every loop
whose answers have grown, once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items

from openlpu.engine.model import Model
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request
from openlpu.serve.errors import ApiError

_log = logging.getLogger("uvicorn.error")  # the server's, which `serve` writes as its own lines


class Feed:
    """The answer to one request as it grows: iteration gives how many tokens there are, whenever
    there are more. For the loop in which it was made. Leave it with `cancel`."""

    def __init__(self, worker: Worker, answer: Answer, changed: asyncio.Event) -> None:
        self.answer = answer
        self.changed = changed
        """Set in the loop when the answer has grown or ended; several feeds may share it."""
        self.failure: ApiError | None = None
        """Why the answer ended, if it was no fault of its own."""
        self.loop = asyncio.get_running_loop()
        self.seen = -1  # the worker's: how many tokens the loop was woken for
        self.seen_s = 0.0  # and when the last of them came
        self._worker = worker
        self._given = 0

    def __aiter__(self) -> Feed:
        return self

    async def __anext__(self) -> int:
        while True:
            done = self.answer.done  # before the tokens, or the last ones could be missed
            count = len(self.answer.generated)
            if count > self._given:
                self._given = count
                return count
            if done:
                if self.failure is not None:
                    raise self.failure
                raise StopAsyncIteration
            self.changed.clear()
            await self.changed.wait()

    def cancel(self) -> None:
        """Take no further step for it. Harmless when it has ended."""
        if not self.answer.done:
            self.answer.cancel()
            self._worker.wake()


class Worker:
    """Drives the engine of a model. `running` answers are with the engine, `waiting` requests not
    yet: the most urgent and then the oldest goes first."""

    def __init__(self, model: Model, *, most_running: int, most_waiting: int) -> None:
        self.steps = 0
        """Of the engine, so far."""
        self.observe_step: Callable[[int], None] = lambda sequences: None
        """Called in the worker's thread after each step."""
        self.observe_tokens: Callable[[Answer, int, float], None] = lambda answer, new, since_s: (
            None
        )
        """Called there for each answer that grew: by how many tokens, and when the one before them
        came."""
        self._engine = model.engine
        self._most_running = most_running
        self._most_waiting = most_waiting
        self._feeds: list[Feed] = []
        self._places = most_running  # not taken, nor promised to one that waited
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()  # of the lists; never held during a step
        self._work = threading.Event()
        self._closed = False
        self._broken = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> int:
        return len(self._feeds)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def healthy(self) -> bool:
        """Whether steps are possible."""
        return self._thread.is_alive() and not self._broken

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def close(self) -> None:
        """End the answers under way, then the thread."""
        with self._lock:
            self._closed = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """There may be something to do. Any thread may call it."""
        self._work.set()

    async def submit(
        self,
        tokens: Items[int],
        sampling: Sampling,
        request: Request,
        *,
        changed: asyncio.Event | None = None,
    ) -> Feed:
        """Start an answer, as soon as there is a place for it.

        changed: set when it grows. Raises ApiError 503 if too many wait, RequestError like
        Engine.submit.
        """
        asked_s = self._engine.clock()
        await self._place(request.priority)
        try:
            answer = self._engine.submit(tokens, sampling, request)
            answer.started_s = asked_s  # the time in our queue is time that it waited
            feed = Feed(self, answer, changed or asyncio.Event())
        except BaseException:
            self._give_back()
            raise
        with self._lock:
            if self._closed:
                answer.cancel()
                raise _unavailable("the service is shutting down")
            self._feeds.append(feed)
        self.wake()
        return feed

    async def _place(self, priority: int) -> None:
        """Wait for a place. Raises ApiError 503."""
        with self._lock:
            if self._closed:
                raise _unavailable("the service is shutting down")
            if self._places and not self._queue:
                self._places -= 1
                return
            if len(self._queue) >= self._most_waiting:
                raise _unavailable("too many requests are waiting")
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._queue, (-priority, next(self._order), turn))
        self.wake()
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                self._queue = [entry for entry in self._queue if entry[2] is not turn]
                heapq.heapify(self._queue)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back()
            raise

    def _give_back(self) -> None:
        with self._lock:
            self._places += 1
        self.wake()

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            self._work.wait()
            self._work.clear()
            self._tell()
            while self._feeds and not self._closed:
                self._step()
                self._tell()
        for feed in list(self._feeds):
            feed.failure = _unavailable("the service is shutting down")
            feed.answer.cancel()
        self._tell()

    def _step(self) -> None:
        sequences = sum(not feed.answer.done for feed in self._feeds)
        try:
            self._engine.step()
        except Exception as error:
            _log.error("a step of the engine failed", exc_info=error)
            self._fail()
        else:
            self._broken = False
            self.observe_step(sequences)
        self.steps += 1

    def _fail(self) -> None:
        """End every answer: what the step did to them is not known."""
        with self._lock:
            feeds = list(self._feeds)
        for feed in feeds:
            if not feed.answer.done:
                feed.failure = ApiError(500, "the engine failed", type="server_error")
                feed.answer.cancel()
        try:
            self._engine.step()  # closes what was cancelled
        except Exception as error:
            self._broken = True
            _log.error("the engine does not recover", exc_info=error)

    def _tell(self) -> None:
        """Wake whoever has something to read, or a place."""
        calls: dict[asyncio.AbstractEventLoop, list[Callable[[], object]]] = {}
        with self._lock:
            kept = []
            for feed in self._feeds:
                done = feed.answer.done
                count = len(feed.answer.generated)
                if done or count != feed.seen:
                    self._observe(feed, count - max(feed.seen, 0))
                    feed.seen = count
                    calls.setdefault(feed.loop, []).append(feed.changed.set)
                if done:
                    self._places += 1
                else:
                    kept.append(feed)
            ended = len(kept) < len(self._feeds)
            self._feeds = kept
            while self._queue and (self._places or self._closed):
                _, _, turn = heapq.heappop(self._queue)
                self._places -= 1
                calls.setdefault(turn.get_loop(), []).append(self._promised(turn))
        if ended and not kept:
            self._reclaim()
        for loop, wakes in calls.items():
            try:
                loop.call_soon_threadsafe(_call, wakes)
            except RuntimeError:  # the loop has ended, and with it everybody who waited there
                _log.warning("answers were left behind by an event loop that ended")

    def _observe(self, feed: Feed, new: int) -> None:
        last_s = feed.answer.last_token_s
        if new > 0 and last_s is not None:
            self.observe_tokens(feed.answer, new, feed.seen_s)
            feed.seen_s = last_s

    def _promised(self, turn: asyncio.Future[None]) -> Callable[[], None]:
        closed = self._closed

        def give() -> None:
            if turn.done():  # left while it waited
                self._give_back()
            elif closed:
                turn.set_exception(_unavailable("the service is shutting down"))
            else:
                turn.set_result(None)

        return give

    def _reclaim(self) -> None:
        """Let the engine close sequences whose answers have ended, though no step follows."""
        try:
            self._engine.step()
        except Exception as error:
            self._broken = True
            _log.error("the engine does not give memory back", exc_info=error)


def _call(wakes: list[Callable[[], object]]) -> None:
    for wake in wakes:
        wake()


def _unavailable(why: str) -> ApiError:
    return ApiError(
        503,
        f"{why}; try again",
        type="server_error",
        code="unavailable",
        headers={"retry-after": "1"},
    )
