"""In: rows to keep. Out: one SQLite file that survives a killed process; keys and usage are in it.

Two ways to write. `transact` is for keys: it is on disk when it returns. `write` is for usage: it
returns at once, and one thread commits whatever came meanwhile as one transaction. That thread does
not wait for the disk itself (synchronous=NORMAL): a commit survives the process in any case, and
only a machine that loses power may lose the last of them, never the file. Waiting would hold back
the end of each answer by a disk's latency.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from openlpu.errors import StoreError

T = TypeVar("T")

FILE_NAME = "service.sqlite3"
VERSION = 1
_SCHEMA = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest BLOB NOT NULL UNIQUE,
    created_s REAL NOT NULL,
    revoked_s REAL,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER
) STRICT;
CREATE TABLE usage (
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    hour INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (key_id, model, hour)
) STRICT, WITHOUT ROWID;
"""
_BUSY_MS = 5000
_MOST_WAITING = 100_000  # rows kept while the disk refuses them, some 50 MB
_MOST_AT_ONCE = 1000
_RETRY_S = 0.2


@dataclass(slots=True)
class _Write:
    sql: str
    values: Sequence[Any]
    written: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.written.set_running_or_notify_cancel()  # who stops waiting must not cancel the row


class Database:
    """The file. Any thread may use it, and other processes at the same time."""

    def __init__(self, folder: Path) -> None:
        """Open the file in `folder`, made if need be. Raises StoreError."""
        self.path = folder / FILE_NAME
        self._lock = threading.Lock()
        self._writes: queue.Queue[_Write | None] = queue.Queue(_MOST_WAITING)
        self._writer: threading.Thread | None = None
        self._closing = threading.Event()
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.touch(mode=0o600)
            self._connection = self._connect("FULL")
            with self._transaction(self._connection):
                self._migrate()

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        return connection

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StoreError(
                f"{self.path} was written by a newer version (schema {version}, this one reads "
                f"{VERSION}); update openlpu, or choose another folder"
            )
        if version == 0:
            for statement in _SCHEMA.split(";"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={VERSION}")

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[None]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise StoreError(
                f"{self.path}: {reason}; is the folder writable, the disk full?"
            ) from (error)

    # -- at once --------------------------------------------------------------------------------

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows that a query finds."""
        with self._lock, self._explained():
            return self._connection.execute(sql, values).fetchall()

    def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` as one transaction, which is on disk when this returns."""
        with self._lock, self._explained(), self._transaction(self._connection):
            return work(self._connection)

    @property
    def version(self) -> int:
        """Changes whenever another connection or process has committed something."""
        (found,) = self.read("PRAGMA data_version")[0]
        return int(found)

    # -- later ----------------------------------------------------------------------------------

    def write(self, sql: str, values: Sequence[Any] = ()) -> Future[None]:
        """Let the writer's thread run a statement soon; the future tells when it is kept.

        While the disk refuses rows they are kept in memory and tried again; beyond a bound, and at
        the end, their futures hold a StoreError.
        """
        wanted = _Write(sql, values)
        with self._lock:
            try:
                if self._closing.is_set():
                    raise queue.Full
                self._writes.put_nowait(wanted)
            except queue.Full:
                wanted.written.set_exception(StoreError(f"{self.path} takes no more rows"))
            else:
                if self._writer is None:
                    self._writer = threading.Thread(target=self._run, name="usage", daemon=True)
                    self._writer.start()
        return wanted.written

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        ended = False
        while not ended:
            batch = [self._writes.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _MOST_AT_ONCE:
                    batch.append(self._writes.get_nowait())
            ended = None in batch
            rows = [row for row in batch if row is not None]
            while rows:
                try:
                    connection = connection or self._connect("NORMAL")
                    with self._transaction(connection):
                        for row in rows:
                            connection.execute(row.sql, row.values)
                except sqlite3.Error as error:
                    if self._closing.wait(_RETRY_S):
                        lost = StoreError(f"{self.path}: {str(error).lower()}")
                        for row in rows:
                            row.written.set_exception(lost)
                        break
                else:
                    for row in rows:
                        row.written.set_result(None)
                    break
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Write what waits, and close the file. Nothing can be written afterwards."""
        with self._lock:
            self._closing.set()
            writer = self._writer
        if writer is not None:
            self._writes.put(None)
            writer.join()
        with self._lock:
            self._connection.close()
