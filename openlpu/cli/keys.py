"""In: names of clients. Out: keys for them, what they used, no key any more; `lpu keys`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import note, table, write, write_json

if TYPE_CHECKING:
    from openlpu.serve.database import Database
    from openlpu.serve.keys import Key

keys = typer.Typer(no_args_is_help=True, help="Say who may use `lpu serve`.")

Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Folder of keys and usage; beside the cache."),
]
_Limit = Annotated[int | None, typer.Option(metavar="N", help="No limit by default.")]


@contextmanager
def _opened(folder: Path | None) -> Iterator[Database]:
    from openlpu.serve.database import Database
    from openlpu.serve.settings import default_data

    database = Database(folder or default_data())
    try:
        yield database
    finally:
        database.close()


@keys.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    requests_per_minute: _Limit = None,
    tokens_per_minute: _Limit = None,
    data: Data = None,
    json: options.Json = False,
) -> None:
    """Make a key. Its secret is printed this once; only a hash of it is kept."""
    from openlpu.serve.keys import KeyStore

    with _opened(data) as database:
        key, secret = KeyStore(database).add(
            name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
        )
    if json:
        write_json({**dataclasses.asdict(key), "secret": secret})
    else:
        note(f"lpu: {key.id} is the key of {name}; this is its secret, keep it")
        write(f"{secret}\n")


@keys.command(name="list")
def list_keys(data: Data = None, json: options.Json = False) -> None:
    """List all keys with what they used."""
    from openlpu.serve.keys import KeyStore
    from openlpu.serve.usage import Totals, UsageStore

    with _opened(data) as database:
        found = KeyStore(database).list()
        used = UsageStore(database).by_key()
    rows: list[dict[str, Any]] = [
        {**dataclasses.asdict(key), "usage": dataclasses.asdict(used.get(key.id, Totals()))}
        for key in found
    ]
    if json:
        write_json(rows)
        return
    columns = ["key", "name", "made", "state", "requests/min", "tokens/min", "requests", "tokens"]
    write(table(columns, [_row(key, used.get(key.id, Totals())) for key in found]))
    if not found:
        note("lpu: there is no key; `lpu keys add NAME` makes one")


def _row(key: Key, used: Any) -> list[str]:
    made = time.strftime("%Y-%m-%d", time.gmtime(key.created_s))
    state = "good" if key.revoked_s is None else "revoked"
    limits = [
        "-" if n is None else f"{n:,}" for n in (key.requests_per_minute, key.tokens_per_minute)
    ]
    tokens = used.prompt_tokens + used.completion_tokens
    return [key.id, key.name, made, state, *limits, f"{used.requests:,}", f"{tokens:,}"]


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `lpu keys list` shows it.")],
    data: Data = None,
    json: options.Json = False,
) -> None:
    """Make a key good for nothing, within a second and for good; answers under way end."""
    from openlpu.serve.keys import KeyStore

    with _opened(data) as database:
        revoked = KeyStore(database).revoke(key)
    if json:
        write_json(revoked)
    else:
        note(f"lpu: {revoked.id}, the key of {revoked.name}, is revoked")
