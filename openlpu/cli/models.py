"""In: a model's name. Out: the model in the cache; what is there; `lpu pull`, `lpu models`."""

from __future__ import annotations

from typing import Annotated

import typer

from openlpu.cli import options
from openlpu.cli.terminal import Progress, note, table, write, write_json


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2, or org/name of the hub.")],
    json: options.Json = False,
) -> None:
    """Fetch a model, verified and resumable; nothing happens if it is there."""
    from openlpu.load import hub

    with Progress() as progress:
        path = hub.pull(name, progress)
    if json:
        write_json({"name": name, "path": str(path)})
    else:
        write(f"{path}\n")


def models(json: options.Json = False) -> None:
    """List the models in the cache."""
    from openlpu.load import hub

    found = hub.cached()
    if json:
        write_json([{"name": m.name, "path": str(m.path), "bytes": m.bytes} for m in found])
    elif found:
        rows = [[m.name, f"{m.bytes / 1e6:,.1f} MB", str(m.path)] for m in found]
        write(table(["model", "size", "path"], rows))
    else:
        write(table(["model", "size", "path"], []))
        note("lpu: the cache holds no model; `lpu pull smollm2` fetches one")
