"""In: loaded kernels and a context. Out: Team, the threads that walk the task table together."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from openlpu.errors import RequestError
from openlpu.host.layout import Context
from openlpu.jit import Loaded


class Team:
    """`threads` - 1 workers and the caller. Workers spin between steps for a few milliseconds,
    then park on a semaphore, so that an idle model costs nothing."""

    def __init__(self, code: Loaded, context: NDArray[np.int64], threads: int) -> None:
        self._code = code  # the functions live in it
        self._context = context
        at, c_long, address = context.ctypes.data, ctypes.c_int64, ctypes.c_void_p
        self._begin = ctypes.CFUNCTYPE(c_long, address)(code.address("begin"))
        self._run = ctypes.CFUNCTYPE(None, address)(code.address("run"))
        work = ctypes.CFUNCTYPE(c_long, address, c_long, c_long)(code.address("work"))
        self._at = at
        self._process = os.getpid()
        self._wake = [threading.Semaphore(0) for _ in range(threads)]
        self._closing = threading.Event()
        seen = int(context[Context.GENERATION])
        self._workers = [
            threading.Thread(
                target=_live,
                args=(work, at, thread, seen, self._wake[thread], self._closing),
                name=f"lpu-{thread}",
                daemon=True,
            )
            for thread in range(1, threads)
        ]
        for worker in self._workers:
            worker.start()
        # Workers touch the context and the code: they must have ended before either is freed.
        self.close = weakref.finalize(self, _end, self._closing, self._wake, self._workers)

    def step(self) -> None:
        """Run the task table once on all threads; returns when every thread is done.

        Raises RequestError where the workers are gone: after `close`, or in a forked child.
        """
        if not self.close.alive:
            raise RequestError("the model is closed; load it again")
        if os.getpid() != self._process:
            raise RequestError("the model was loaded before a fork; load it in the new process")
        parked = self._begin(self._at)
        thread = 1
        while parked >> thread:
            if parked >> thread & 1:
                self._wake[thread].release()
            thread += 1
        self._run(self._at)


def _live(
    work: Callable[[int, int, int], int],
    context: int,
    thread: int,
    seen: int,
    wake: threading.Semaphore,
    closing: threading.Event,
) -> None:
    """A worker: run steps until none comes for a while, then wait to be woken."""
    while not closing.is_set():
        seen = work(context, thread, seen)
        wake.acquire()


def _end(
    closing: threading.Event, wake: list[threading.Semaphore], workers: list[threading.Thread]
) -> None:
    closing.set()
    for semaphore in wake:
        semaphore.release()
    for worker in workers:
        worker.join()
