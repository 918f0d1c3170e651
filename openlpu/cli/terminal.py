"""In: progress, notes and results of a command. Out: bars or plain lines on stderr, JSON on stdout.

A program that reads stdout sees answers only. rich is imported when something must be drawn: a warm
start that draws nothing does not pay for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from openlpu.errors import LpuError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_PATIENCE_S = 0.3  # stages that end sooner are not worth a line


def write(text: str) -> None:
    """Put text on standard output at once; leave quietly if nobody reads it any more.

    Raises LpuError if it cannot be written: a full disk, or an output that is closed.
    """
    if sys.stdout is None:
        raise LpuError("standard output is closed; redirect it to a file or to /dev/null")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        sys.exit(141)
    except OSError as error:
        drop_output()
        raise LpuError(f"standard output: {(error.strerror or str(error)).lower()}") from None


def drop_output() -> None:
    """Send what standard output still holds nowhere: Python flushes once more at its end, which
    must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(value: Any) -> None:
    """Put a value on standard output as one JSON document; dataclasses become objects."""
    write(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def note(text: str) -> None:
    """Put lines on standard error, if there is one. A name out of a file may hold letters that
    steer a terminal: those are not let through."""
    shown = (c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text)
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write("".join(shown) + "\n")
        sys.stderr.flush()


def watched() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns in line, the first to the left and the others to the right, for any reader."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        + "\n"
        for line in lines
    )


class Progress:
    """A callback (stage, done, in all) that draws a bar on a terminal, else a line per stage."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began_s: dict[str, float] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began_s = self._began_s.setdefault(stage, now)
        if stage not in self._tasks and now - began_s < _PATIENCE_S:
            return
        if not watched():
            if stage not in self._tasks:
                note(f"lpu: {stage} ...")
                self._tasks[stage] = 0  # type: ignore[assignment]
            return
        bars = self._bars = self._bars or _bars()
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(stage, total=total)
        bars.update(self._tasks[stage], completed=done, total=total)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # results go where the user sent them, bars or not
        redirect_stderr=False,
    )
    bars.start()
    return bars


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
