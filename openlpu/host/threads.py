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
    """THREADS - 1 workers and the caller. Workers live in generated code: they spin between steps
    for a few milliseconds, then sleep on a semaphore, so that an idle model costs nothing."""

    def __init__(self, code: Loaded, context: NDArray[np.int64]) -> None:
        """context: zeroed but for its fields; it is kept, and so is the code."""
        self._at = context.ctypes.data
        self._process = os.getpid()
        self._run = _function(code, "run", 1)
        stop, work = _function(code, "stop", 1), _function(code, "work", 2)
        _function(code, "prepare", 1)(self._at)
        threads = int(context[Context.THREADS])
        workers = [
            threading.Thread(target=work, args=(self._at, i), name=f"lpu-{i}", daemon=True)
            for i in range(1, threads)
        ]
        for worker in workers:
            worker.start()
        # Workers touch the context and the code: they must have ended before either is freed.
        self.close = weakref.finalize(
            self, _end, self._at, self._process, stop, workers, (code, context)
        )

    def step(self) -> None:
        """Run the task table once on all threads; returns when every thread is done.

        Raises RequestError where the workers are gone: after `close`, or in a forked child.
        """
        if not self.close.alive:
            raise RequestError("the model is closed; load it again")
        if os.getpid() != self._process:
            raise RequestError("the model was loaded before a fork; load it in the new process")
        self._run(self._at)


def _function(code: Loaded, name: str, integers: int) -> Callable[..., None]:
    """An entry point that takes the context's address and integers. Calls let go of the GIL."""
    kinds = [ctypes.c_void_p] + [ctypes.c_int64] * (integers - 1)
    return ctypes.CFUNCTYPE(None, *kinds)(code.address(name))


def _end(
    context: int,
    process: int,
    stop: Callable[[int], None],
    workers: list[threading.Thread],
    kept: object,
) -> None:
    del kept  # alive until here
    if os.getpid() != process:
        return  # a forked child has the memory, but not the threads
    stop(context)
    for worker in workers:
        worker.join()
