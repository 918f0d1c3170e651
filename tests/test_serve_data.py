"""In: keys, usage, a killed process, commands. Out: nothing is lost, no secret is kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_service import until

from openlpu.cli import main
from openlpu.errors import RequestError, StoreError
from openlpu.serve.database import FILE_NAME, Database
from openlpu.serve.keys import KeyStore
from openlpu.serve.limits import Limits, RateLimited
from openlpu.serve.usage import Totals, UsageStore


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path)
    yield opened
    opened.close()


# -- the file ---------------------------------------------------------------------------------


def test_a_file_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    Database(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("PRAGMA user_version=2")
    with pytest.raises(StoreError, match="newer version"):
        Database(tmp_path)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"anything at all, but no database" * 100)
    with pytest.raises(StoreError, match=r"not a database"):
        Database(tmp_path)


def test_writes_are_kept_and_none_comes_after_the_end(tmp_path: Path) -> None:
    database = Database(tmp_path)
    usage = UsageStore(database)
    for _ in range(2500):
        usage.record("k", "m", 3, 2, 1)
    database.close()
    assert isinstance(usage.record("k", "m", 1, 1, 1).exception(), StoreError)
    database = Database(tmp_path)
    assert UsageStore(database).totals("k") == Totals(2500, 7500, 5000, 2500)
    database.close()


def test_who_stops_waiting_for_a_row_does_not_cancel_it(database: Database) -> None:
    usage = UsageStore(database)

    async def impatient() -> None:
        with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.wrap_future(usage.record("k", "m", 1, 0, 1))
            other.execute("COMMIT")

    asyncio.run(impatient())
    assert usage.record("k", "m", 1, 0, 1).result(10) is None
    assert usage.totals("k").requests == 2


def test_a_file_that_another_process_holds_is_waited_for(database: Database) -> None:
    usage = UsageStore(database)
    with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        written = usage.record("k", "m", 1, 0, 1)
        time.sleep(0.3)
        assert not written.done()
        other.execute("COMMIT")
        assert written.result(10) is None
    assert usage.totals("k").requests == 1


_WRITER = """
import sys
from pathlib import Path
from openlpu.serve.database import Database
from openlpu.serve.keys import KeyStore
from openlpu.serve.usage import UsageStore
database = Database(Path(sys.argv[1]))
usage, keys = UsageStore(database), KeyStore(database)
while True:
    keys.add("one")
    for future in [usage.record("k", "m", 3, 2, 1) for _ in range(20)]:
        future.result()
    sys.stdout.write("20\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("patience_s", [0.0, 0.05, 0.2])
def test_a_killed_process_loses_nothing_it_had_told(tmp_path: Path, patience_s: float) -> None:
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        told = [child.stdout.readline()]
        time.sleep(patience_s)
        child.kill()
        told += child.stdout.read().splitlines()
        child.wait()
        child.stdout.close()
        path = tmp_path / "told"
        before = int(path.read_text()) if path.exists() else 0
        path.write_text(str(before + len(told)))
    database = Database(tmp_path)
    assert database.read("PRAGMA integrity_check") == [("ok",)]
    rounds = int((tmp_path / "told").read_text())
    totals = UsageStore(database).totals("k")
    assert totals.requests >= 20 * rounds
    assert totals.requests <= 20 * (rounds + 3)
    assert (totals.prompt_tokens, totals.cached_tokens) == (
        3 * totals.requests,
        2 * totals.requests,
    )
    assert len(KeyStore(database).list()) >= rounds
    database.close()


# -- keys and limits --------------------------------------------------------------------------


def test_a_secret_is_known_and_never_kept(database: Database) -> None:
    keys = KeyStore(database)
    assert not keys.any
    key, secret = keys.add("Ada", requests_per_minute=5)
    assert keys.verify(secret) == key
    assert keys.verify(secret + "x") is None
    assert keys.verify("") is None
    assert keys.verify("x" * 100_000) is None
    assert keys.verify("lpu-\udc80") is None
    kept = b"".join(path.read_bytes() for path in database.path.parent.iterdir())
    assert secret.encode() not in kept
    assert database.path.stat().st_mode & 0o077 == 0


def test_a_key_revoked_elsewhere_is_dead_within_a_second(database: Database) -> None:
    keys = KeyStore(database)
    key, secret = keys.add("Ada")
    assert keys.verify(secret) is not None
    other = Database(database.path.parent)
    KeyStore(other).revoke(key.id)
    other.close()
    until(lambda: keys.verify(secret) is None, 1.0)
    assert not keys.is_good(key.id)
    assert keys.any, "the last key's end does not open the door"
    assert keys.revoke(key.id).revoked_s is not None, "twice is once"
    with pytest.raises(RequestError, match="no key 'key_none'"):
        keys.revoke("key_none")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 101])
def test_a_key_has_a_name(database: Database, name: str) -> None:
    with pytest.raises(RequestError, match="needs a name"):
        KeyStore(database).add(name)


def test_buckets_fill_steadily_and_may_be_in_debt(database: Database) -> None:
    now_s = 0.0
    limits = Limits(clock=lambda: now_s)
    key, _ = KeyStore(database).add("Ada", requests_per_minute=2, tokens_per_minute=60)
    limits.check(key)
    limits.charge(key, 90)
    assert dict(limits.headers(key)) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    with pytest.raises(RateLimited, match="60 tokens per minute") as refused:
        limits.check(key)
    assert refused.value.retry_after_s == pytest.approx(31)
    now_s = 31.0
    limits.check(key)
    limits.check(key)
    with pytest.raises(RateLimited, match="2 requests per minute"):
        limits.check(key)


# -- the command ------------------------------------------------------------------------------


def test_the_command_makes_lists_and_revokes_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lpu(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lpu", "keys", *words, "--data", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    assert lpu("list") == (
        0,
        "key  name  made  state  requests/min  tokens/min  requests  tokens\n",
        "lpu: there is no key; `lpu keys add NAME` makes one\n",
    )
    code, out, err = lpu("add", "Ada", "--tokens-per-minute", "7000")
    assert code == 0
    assert "this is its secret" in err
    made = json.loads(lpu("add", "Bob", "--json")[1])
    database = Database(tmp_path)
    keys = KeyStore(database)
    ada, bob = keys.verify(out.strip()), keys.verify(made["secret"])
    assert ada is not None
    assert (ada.name, ada.tokens_per_minute) == ("Ada", 7000)
    assert bob is not None
    UsageStore(database).record(bob.id, "m", 30, 10, 4).result()
    database.close()
    assert lpu("revoke", ada.id)[0] == 0
    listed = json.loads(lpu("list", "--json")[1])
    assert [key["revoked_s"] is None for key in listed] == [False, True]
    assert listed[1]["usage"]["prompt_tokens"] == 30
    table = lpu("list")[1]
    assert out.strip() not in table
    assert made["secret"] not in table
    assert lpu("revoke", "nobody") == (
        2,
        "",
        "lpu: there is no key 'nobody'; `lpu keys list` shows them\n",
    )
    assert lpu("add", "Eve", "--requests-per-minute", "0")[0] == 2
