"""In: a model's name. Out: the model in the cache, what is there, how it is compiled.

`lpu pull`, `lpu models`, `lpu inspect`.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import Progress, note, table, write, write_json

if TYPE_CHECKING:
    from openlpu.engine.compiled import Compiled
    from openlpu.engine.profile import Stage


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


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name or a path, as for --model of lpu run.")
    ] = options.DEFAULT_MODEL,
    stop: Annotated[
        str, typer.Option(metavar="PASS", help="Show the graph as it is after this pass.")
    ] = "",
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph's text only.")] = False,
    no_time: Annotated[bool, typer.Option("--no-time", help="Measure no times.")] = False,
    precision: options.Precision = "w8",
    json: options.Json = False,
) -> None:
    """Show how a model is compiled: its passes, sizes, kernels and graph."""
    import dataclasses

    from openlpu.engine.model import open_model
    from openlpu.engine.profile import stages
    from openlpu.graph.text import dumps

    with Progress() as progress:
        _, compiled = open_model(model, precision=precision, progress=progress, stop=stop)
        text = dumps(compiled.graph)
        if graph:
            write(text)
            return
        found = stages(compiled, timed=not no_time, progress=progress)
        host = None if stop else _host(compiled, progress)
    if json:
        config = dataclasses.asdict(compiled.config)
        passes = [dataclasses.asdict(stage) for stage in found]
        write_json({"config": config, "passes": passes, "host": host, "graph": text})
        return
    write(f"{_sizes(compiled)}\n\n{_passes(found)}")
    if host:
        tasks = host.pop("tasks")
        write("\n" + "".join(f"{name:14}{value}\n" for name, value in host.items()))
        rows = [[name, str(count)] for name, count in tasks.items()]
        write("\n" + table(["kernel", "tasks a step"], rows))
    write(f"\n{text}")


def _host(compiled: Compiled, progress: Progress) -> dict[str, Any]:
    """What the host engine makes of it; compiles and packs if that was not done before."""
    from collections import Counter

    from openlpu.host.kernels import symbol
    from openlpu.host.plan import make_plan

    with closing(compiled.host(progress=progress)) as host:
        return {
            "kernels": host.kernels,
            "threads": host.threads,
            "packed_bytes": host.packed_bytes,
            "identity": host.identity,
            "tasks": dict(
                Counter(symbol(task.spec) for task in make_plan(host.graph, host.threads).tasks)
            ),
        }


def _sizes(compiled: Compiled) -> str:
    c = compiled.config
    heads = f"{c.heads} heads" if c.heads == c.kv_heads else f"{c.heads}/{c.kv_heads} heads"
    return (
        f"{c.arch}: {c.layers} layers, width {c.dim}, {heads} of {c.head_dim}, "
        f"feed-forward {c.ffn_dim}, vocabulary {c.vocab_size:,}, context {c.context:,}, "
        f"precision {compiled.precision}"
    )


def _passes(found: list[Stage]) -> str:
    columns = ["pass", "ops", "packed MB", "bytes a row", "layer, 1 row us", "512 rows us"]
    rows = [
        [
            stage.name,
            f"{stage.ops}",
            f"{stage.weight_bytes / 1e6:,.1f}",
            f"{stage.bytes_per_row:,}",
            *(
                "-" if us is None else f"{us:,.0f}"
                for us in (stage.layer_1_row_us, stage.layer_512_rows_us)
            ),
        ]
        for stage in found
    ]
    return table(columns, rows)
