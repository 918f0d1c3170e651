"""In: a model's name and what its clients may ask for. Out: a service; `lpu serve`."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openlpu.cli import options
from openlpu.cli.keys import Data
from openlpu.cli.terminal import Progress, watched, write
from openlpu.errors import RequestError

if TYPE_CHECKING:
    from openlpu.serve.run import Ready


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name or a path, as for --model of lpu run.")
    ] = options.DEFAULT_MODEL,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0: any free one.")] = 8000,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name for the model; may be repeated."),
    ] = None,
    precision: options.Precision = "w8",
    threads: options.Threads = None,
    kernels: options.Kernels = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of prompt and answer.")
    ] = None,
    kv_gib: Annotated[
        float | None,
        typer.Option(metavar="X", help="Limit of K/V memory; a quarter of the machine's memory."),
    ] = None,
    most_running: Annotated[
        int, typer.Option(metavar="N", help="Requests that are answered at the same time.")
    ] = 256,
    most_waiting: Annotated[
        int, typer.Option(metavar="N", help="Requests that wait; one more gets 503.")
    ] = 1024,
    most_connections: Annotated[
        int, typer.Option(metavar="N", help="Open connections; one more gets 503.")
    ] = 4096,
    body_mib: Annotated[float, typer.Option(metavar="X", help="Longest request.")] = 4.0,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Longest time of an answer, in seconds.")
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(metavar="S", help="Time that answers have to end after SIGTERM.")
    ] = 30.0,
    prefixes: Annotated[
        bool, typer.Option(help="Compute equal beginnings once. Changes no bit.")
    ] = True,
    speculate: Annotated[bool, typer.Option(help="Propose tokens. Changes no bit.")] = True,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write the text of requests to the log.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Without keys, serve a public address or under any name."),
    ] = False,
    data: Data = None,
    json: options.Json = False,
) -> None:
    """Serve a model over HTTP as OpenAI's API. Ctrl-C or SIGTERM lets answers end first."""
    from openlpu.serve.run import run
    from openlpu.serve.settings import Settings, default_data

    if kv_gib is not None and not 0 < kv_gib < 1 << 20:
        raise RequestError(f"--kv-gib is {kv_gib:g}; give more than 0")
    if not 0 < body_mib < 1 << 20:
        raise RequestError(f"--body-mib is {body_mib:g}; give more than 0")
    settings = Settings(
        model=model,
        precision=precision,
        threads=threads,
        kernels=kernels,
        context=context,
        aliases=tuple(alias or ()),
        host=host,
        port=port,
        most_running=most_running,
        most_waiting=most_waiting,
        most_connections=most_connections,
        body_bytes=int(body_mib * (1 << 20)),
        kv_bytes=None if kv_gib is None else int(kv_gib * (1 << 30)),
        request_timeout_s=timeout,
        drain_s=drain,
        log_prompts=log_prompts,
        share_prefixes=prefixes,
        speculate=speculate,
        data=Path(data) if data else default_data(),
    )

    def tell(ready: Ready) -> None:
        if json:
            write(dumps(asdict(ready)) + "\n")
        else:
            names = " or ".join((ready.model, *ready.aliases))
            write(f"{ready.url} serves {names}, identity {ready.identity}\n")

    with Progress() as progress:
        run(settings, forced=force, progress=progress if watched() else None, on_ready=tell)
