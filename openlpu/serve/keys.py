"""In: names, and secrets that clients send. Out: Key, who may ask; only hashes are kept.

A secret has 256 random bits, so one round of SHA-256 is enough: there is nothing to guess. The
table is kept in memory and read again when the file has changed, which is looked at four times a
second: a key that another process revokes is dead within a second.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from openlpu.engine.clock import Clock, wall_clock
from openlpu.errors import RequestError
from openlpu.serve.database import Database

_PREFIX = "lpu-"
_SECRET_BYTES = 32
_FRESH_S = 0.25
_LONGEST_NAME = 100
_LONGEST_SECRET = 200


@dataclass(frozen=True, slots=True)
class Key:
    """Who may ask, and how much. revoked_s is None while it is good."""

    id: str
    name: str
    created_s: float
    revoked_s: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class KeyStore:
    """The keys of one database."""

    def __init__(self, database: Database, *, clock: Clock = wall_clock) -> None:
        self._database = database
        self._clock = clock
        self._version: int | None = None
        self._looked_s = float("-inf")
        self._by_digest: dict[bytes, Key] = {}
        self._good: set[str] = set()

    def add(
        self,
        name: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which is told this once. Raises RequestError, StoreError."""
        if not (name.strip() and name.isprintable() and len(name) <= _LONGEST_NAME):
            raise RequestError(f"a key needs a name of 1 to {_LONGEST_NAME} printable characters")
        for what, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
            if limit is not None and not 0 < limit < 1 << 53:
                raise RequestError(f"{what} per minute is {limit}; give at least 1")
        key = Key(
            id=f"key_{secrets.token_hex(8)}",
            name=name,
            created_s=time.time(),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        row = (key.id, name, _digest(secret), key.created_s, requests_per_minute, tokens_per_minute)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, NULL, ?, ?)", row)

        self._database.transact(insert)
        self._version = None
        return key, secret

    def list(self) -> Items[Key]:
        """All keys, revoked ones among them, oldest first."""
        return [key for _, key in self._rows()]

    def revoke(self, key_id: str) -> Key:
        """Make a key good for nothing; for good. Raises RequestError if there is no such key."""
        found = next((key for key in self.list() if key.id == key_id), None)
        if found is None:
            raise RequestError(f"there is no key {key_id!r}; `lpu keys list` shows them")
        now_s = time.time()

        def update(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE keys SET revoked_s = ? WHERE id = ? AND revoked_s IS NULL", (now_s, key_id)
            )

        self._database.transact(update)
        self._version = None
        return found if found.revoked_s is not None else replace(found, revoked_s=now_s)

    def verify(self, secret: str) -> Key | None:
        """The good key that a secret belongs to, if any."""
        if len(secret) > _LONGEST_SECRET:
            return None
        self._look()
        # The time of a lookup may tell something of a hash, which leads to no secret.
        key = self._by_digest.get(_digest(secret))
        return key if key is not None and key.revoked_s is None else None

    def is_good(self, key_id: str) -> bool:
        """Whether a key may still be used."""
        self._look()
        return key_id in self._good

    @property
    def any(self) -> bool:
        """Whether there ever was a key: who revokes the last one does not mean to open the door."""
        self._look()
        return bool(self._by_digest)

    def _look(self) -> None:
        now_s = self._clock()
        if self._version is not None and now_s - self._looked_s < _FRESH_S:
            return
        version = self._database.version
        if version != self._version:
            rows = self._rows()
            self._by_digest = dict(rows)
            self._good = {key.id for _, key in rows if key.revoked_s is None}
            self._version = version
        self._looked_s = now_s

    def _rows(self) -> Items[tuple[bytes, Key]]:
        found = self._database.read(
            "SELECT digest, id, name, created_s, revoked_s, requests_per_minute, tokens_per_minute"
            " FROM keys ORDER BY created_s, id"
        )
        return [(digest, Key(*values)) for digest, *values in found]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
