"""In: what each answer took. Out: totals by key, model and hour, kept in the database."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

from openlpu.serve.database import Database

ANONYMOUS = ""  # the key_id of who came without a key
_HOUR_S = 3600
# One row an hour, so that a busy service's file stays small for years.
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, 1, ?, ?, ?)
ON CONFLICT (key_id, model, hour) DO UPDATE SET
    requests = requests + 1,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""


@dataclass(frozen=True, slots=True)
class Totals:
    """What was used. cached_tokens are those of the prompts whose K/V were there already."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class UsageStore:
    """The meters of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        key_id: str | None,
        model: str,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        at: float | None = None,
    ) -> Future[None]:
        """Count one answer, at a time in unix seconds. Returns at once; who answers a client waits
        for the future before the last byte, so that no answered request is ever lost."""
        hour = int(time.time() if at is None else at) // _HOUR_S
        row = (key_id or ANONYMOUS, model, hour, prompt_tokens, cached_tokens, completion_tokens)
        return self._database.write(_ADD, row)

    def totals(self, key_id: str | None = None, since: float = 0.0) -> Totals:
        """The sum over a key's answers from the hour of `since` on; None: who came without one."""
        return self.by_key(since).get(key_id or ANONYMOUS, Totals())

    def by_key(self, since: float = 0.0) -> dict[str, Totals]:
        """The sums of all keys that were used; ANONYMOUS among them."""
        rows = self._database.read(
            "SELECT key_id, sum(requests), sum(prompt_tokens), sum(cached_tokens),"
            " sum(completion_tokens) FROM usage WHERE hour >= ? GROUP BY key_id",
            (int(since) // _HOUR_S,),
        )
        return {key_id: Totals(*sums) for key_id, *sums in rows}
