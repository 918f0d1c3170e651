"""In: a receipt of the service. Out: whether this machine computes the same bits; `lpu replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import Progress, write, write_json
from openlpu.errors import RequestError

if TYPE_CHECKING:
    from openlpu.serve.receipt import Receipt, Repeated


def replay(
    file: Annotated[Path, typer.Argument(metavar="RECEIPT.json", help="A receipt.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH",
            help="The model to repeat it with; by default the one that the receipt names, if its "
            "name is smollm2 or that of a model in the cache.",
        ),
    ] = "",
    precision: Annotated[str, typer.Option(metavar="w8|w4", help="By default the receipt's.")] = "",
    threads: options.Threads = None,
    kernels: options.Kernels = None,
    json: options.Json = False,
) -> None:
    """Repeat what a receipt records; exit code 1 if a bit differs."""
    import openlpu
    from openlpu.serve import receipt as receipts

    receipt = receipts.read_receipt(_read(file))
    with Progress() as progress:
        loaded = openlpu.load(
            model or _known_name(receipt),
            precision=precision or receipt.model.precision,
            threads=threads,
            kernels=kernels,
            context=receipt.model.context,
            progress=progress,
        )
    with loaded:
        found, identity = receipts.replay(loaded, receipt), loaded.identity
    same_model = identity == receipt.model.identity
    same = same_model and all(part.same for part in found)
    if json:
        write_json(
            {
                "same": same,
                "same_model": same_model,
                "model": receipt.model.name,
                "identity": receipt.model.identity,
                "repeated_identity": identity,
                "parts": [_plain(part) for part in found],
            }
        )
    else:
        write(_told(receipt, found, same_model=same_model, same=same))
    if not same:
        raise typer.Exit(1)


def _read(file: Path) -> bytes:
    from openlpu.serve.receipt import MOST_BYTES

    try:
        with file.open("rb") as source:
            return source.read(MOST_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RequestError(f"{file}: {reason}; give a receipt") from None


def _known_name(receipt: Receipt) -> str:
    """The receipt's name for the model, where it can mean but one: the user chose no file here, and
    a stranger must not choose one, nor what is fetched."""
    from openlpu.load import hub

    name = receipt.model.name
    known = name in hub.ALIASES or name in (model.name for model in hub.cached())
    if not known or Path(name).exists():
        raise RequestError(f"the receipt is of the model {name!r}; say with --model where it is")
    return name


def _plain(part: Repeated) -> dict[str, Any]:
    import dataclasses

    return {**dataclasses.asdict(part), "same": part.same}


def _told(receipt: Receipt, found: list[Repeated], *, same_model: bool, same: bool) -> str:
    identity = receipt.model.identity
    model = "the same" if same_model else "ANOTHER MODEL"
    lines = [f"model {receipt.model.name!r}, identity {identity[:32]}: {model}"]
    for i, part in enumerate(found):
        verdict = "the same bits" if part.same else "DIFFERENT"
        if part.first_difference is not None:
            verdict += f", from {_UNITS[part.kind]} {part.first_difference} on"
        elif part.differing_logprobs:
            verdict += f", the log probabilities of {part.differing_logprobs:,} tokens"
        elif not part.same:
            verdict += f", ended by {part.repeated_finish_reason}, not {part.finish_reason}"
        lines.append(f"{part.kind} {i}, {part.tokens:,} tokens: {verdict}")
    lines.append("every bit agrees" if same else "the receipt does not hold here")
    return "\n".join(lines) + "\n"


_UNITS = {"answer": "token", "embedding": "number"}
