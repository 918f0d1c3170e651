"""In: events of the service. Out: JSON objects on standard error, one a line.

Lines are written by a thread of their own: a reader of the log that stalls must not stop answers.
If it stalls for long, lines are dropped, and counted in the next one. No line holds text of a
prompt or an answer, unless the operator asked for prompts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
import traceback
from typing import Any, TextIO

_MOST_WAITING = 10_000
_PATIENCE_S = 2.0


class Logs:
    """Where events go."""

    def __init__(self, stream: TextIO | None = None, *, prompts: bool = False) -> None:
        """stream: standard error if not given. prompts: whether prompts may be written."""
        self.prompts = prompts
        self._stream = sys.stderr if stream is None else stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """One line. Fields that are None are left out."""
        known = {name: value for name, value in fields.items() if value is not None}
        if self._dropped:
            known["dropped_lines"] = self._dropped
        line = json.dumps({"time": _now(), "event": event, **known}, default=str)
        try:
            self._lines.put_nowait(line + "\n")
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def failure(self, event: str, error: BaseException, **fields: Any) -> None:
        """A line about an error that nobody expected: its kind and where it came from. Its message
        may quote a prompt."""
        frames = traceback.extract_tb(error.__traceback__)
        self.write(
            event,
            error=type(error).__name__,
            message=str(error) if self.prompts else None,
            where=[f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
            **fields,
        )

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            # Nobody can be told that standard error is gone.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._stream.write(line)
                if self._lines.empty():
                    self._stream.flush()

    def close(self) -> None:
        """Write what waits, unless the reader stalls."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_PATIENCE_S)
        self._thread.join(_PATIENCE_S)


class ServerLog(logging.Handler):
    """Turns what the HTTP server's library logs into our lines."""

    def __init__(self, logs: Logs) -> None:
        super().__init__(logging.WARNING)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        """One line for a record."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._logs.failure("server_error", error)
        else:
            self._logs.write("server", level=record.levelname.lower(), message=record.getMessage())


def _now() -> str:
    now_s = time.time()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s))
    return f"{whole}.{int(now_s % 1 * 1000):03d}Z"
