"""In: a kind, a key and bytes to keep. Out: whole, read-only files in the one cache folder.

An entry is one file, root/kind/key. It appears by a rename after its bytes are on disk, so a reader
sees a whole entry or none, whatever happens to the writer. What an entry means, and how its damage
is noticed, is the caller's business: the caller keeps a header in it and calls `remove`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from openlpu import knobs
from openlpu.errors import StoreError

_LONGEST_NAME = 160  # file systems allow 255 bytes; temporary names add a prefix and a suffix


def default_root() -> Path:
    """The cache folder: LPU_CACHE, or openlpu in the platform's folder for caches."""
    if knobs.CACHE.value:
        return Path(knobs.CACHE.value).expanduser()
    try:
        home = Path.home()
    except RuntimeError:
        raise StoreError("no home folder for the cache; set LPU_CACHE to a folder") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "openlpu"


class Store:
    """The cache. Safe for many threads and processes at once; every failure is a StoreError."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = default_root() if root is None else Path(root)

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lives, or would live. Different keys have different paths."""
        return self.root / _file_name(kind) / _file_name(key)

    def get(self, kind: str, key: str) -> Path | None:
        """The file of a whole entry, or None."""
        path = self.path(kind, key)
        return path if path.is_file() else None

    @contextlib.contextmanager
    def create(self, kind: str, key: str, *, reserve_bytes: int = 0) -> Iterator[Path]:
        """Yield an empty file to fill; it becomes the entry when the block ends without an error.

        `reserve_bytes` claims the space first, so that a full disk is an error here and not a bus
        error in a mapped write later. Open the file with "r+b" to keep the reservation. Every
        OSError raised in the block is taken for a failure of the cache and raised as StoreError.
        """
        path = self.path(kind, key)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
            handle, temporary = _open_temporary(path)
            try:
                if reserve_bytes and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, reserve_bytes)
                yield temporary
                _flush(temporary)
                os.replace(temporary, path)
                _flush(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
                os.close(handle)

    @contextlib.contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Hold the entry's lock: one holder among all threads and processes; others wait."""
        path = self.path(kind, key)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The lock file stays: removing it would let two holders lock two files of one name.
            handle = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with explained(path):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def remove(self, kind: str, key: str) -> None:
        """Forget an entry; nothing happens if it is not there."""
        path = self.path(kind, key)
        with explained(path):
            path.unlink(missing_ok=True)

    def folder(self, kind: str, key: str) -> Path:
        """A working folder that survives a killed process, created if needed; never an entry."""
        path = self.path(kind, key)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    @staticmethod
    def map(path: Path) -> NDArray[np.uint8]:
        """The file's bytes, mapped read-only: uint8 [bytes]."""
        with explained(path):
            if path.stat().st_size == 0:
                return np.empty(0, np.uint8)  # an empty file cannot be mapped
            return np.memmap(path, dtype=np.uint8, mode="r")

    def entries(self) -> list[tuple[str, str, int]]:
        """Every whole entry as (kind, key as its file name, bytes), sorted."""
        with explained(self.root):
            return sorted(
                (file.parent.name, file.name, file.stat().st_size)
                for file in self.root.glob("*/*")
                if file.is_file() and not file.name.startswith(".")
            )


def _file_name(key: str) -> str:
    """One path component for any text; readable, and injective up to sha256."""
    name = quote(key, safe=" +=@,()", errors="surrogatepass")
    if name.startswith("."):  # hidden names are ours, and '.' and '..' are the system's
        name = "%2E" + name[1:]
    if not name or len(name) > _LONGEST_NAME:
        name = f"{name[:80]}%{hashlib.sha256(name.encode()).hexdigest()}"
    return name


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StoreError(
            f"cache {path}: {reason.lower()}; free space or permissions there, "
            "or set LPU_CACHE to another folder"
        ) from error


def _open_temporary(path: Path) -> tuple[int, Path]:
    """A new locked file beside `path`. The lock, not a process id, says that its writer lives."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return handle, Path(name)
        except BlockingIOError:
            pass  # a cleaner took it between the two calls, and will remove it
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files whose writer is gone: those whose lock nobody holds."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another cleaner was faster, or the writer lives
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _flush(path: Path) -> None:
    """Wait until a file's or a folder's bytes are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
