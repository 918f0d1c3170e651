"""In: a key and what its answers took. Out: whether it may ask now, and the headers that tell it.

Each limit is a bucket that holds a minute's worth and fills steadily. A request is taken when it
comes. Tokens are taken when they are known, at the end, and may leave a debt; while there is one
the key must wait. So a burst may run ahead, but no rate is exceeded for long. Buckets live in
memory: a restart fills them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from openlpu.engine.clock import Clock, wall_clock
from openlpu.serve.keys import Key

_MINUTE_S = 60.0


class RateLimited(Exception):
    """The key must wait. `what` is requests or tokens."""

    def __init__(self, what: str, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"the key's limit of {limit:,} {what} per minute is reached; "
            f"try again in {_duration(retry_after_s)}"
        )
        self.what = what
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Bucket:
    limit: int
    level: float
    filled_s: float

    def fill(self, now_s: float) -> None:
        gained = (now_s - self.filled_s) * self.limit / _MINUTE_S
        self.level = min(float(self.limit), self.level + gained)
        self.filled_s = now_s

    def wait_s(self, level: float) -> float:
        """Time until it is this full."""
        return max(0.0, (level - self.level) * _MINUTE_S / self.limit)


class Limits:
    """The buckets of all keys that were used. For one thread."""

    def __init__(self, *, clock: Clock = wall_clock) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def check(self, key: Key) -> None:
        """Take one request. Raises RateLimited, and then takes nothing."""
        requests, tokens = self._pair(key)
        if tokens is not None and tokens.level < 1:
            raise RateLimited("tokens", tokens.limit, tokens.wait_s(1))
        if requests is not None:
            if requests.level < 1:
                raise RateLimited("requests", requests.limit, requests.wait_s(1))
            requests.level -= 1

    def charge(self, key: Key, tokens: int) -> None:
        """Take the tokens of an answer and its prompt."""
        _, bucket = self._pair(key)
        if bucket is not None:
            bucket.level -= tokens

    def headers(self, key: Key) -> list[tuple[str, str]]:
        """What OpenAI's clients read: the limits, what remains, and when they are full again."""
        found = []
        for what, bucket in zip(("requests", "tokens"), self._pair(key), strict=True):
            if bucket is not None:
                reset = _duration(bucket.wait_s(bucket.limit))
                found += [
                    (f"x-ratelimit-limit-{what}", str(bucket.limit)),
                    (f"x-ratelimit-remaining-{what}", str(max(0, math.floor(bucket.level)))),
                    (f"x-ratelimit-reset-{what}", reset),
                ]
        return found

    def _pair(self, key: Key) -> tuple[_Bucket | None, _Bucket | None]:
        return (
            self._bucket(key.id, "requests", key.requests_per_minute),
            self._bucket(key.id, "tokens", key.tokens_per_minute),
        )

    def _bucket(self, key_id: str, what: str, limit: int | None) -> _Bucket | None:
        if limit is None:
            return None
        now_s = self._clock()
        bucket = self._buckets.setdefault(
            (key_id, what), _Bucket(limit, level=float(limit), filled_s=now_s)
        )
        bucket.fill(now_s)
        return bucket


def _duration(seconds: float) -> str:
    """Such as 1m3.5s, 850ms or 0s, rounded up, as the clients of OpenAI know it."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    shown = f"{rest_ms / 1000:g}s"
    return f"{hours}h{minutes}m{shown}" if hours else f"{minutes}m{shown}" if minutes else shown
