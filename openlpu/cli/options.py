"""In: nothing. Out: the options that several commands share, declared once, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from openlpu import chip as chips

DEFAULT_MODEL = "smollm2"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH",
        help="smollm2, a .gguf file, a Hugging Face folder, or org/name of the hub.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="w8|w4", help="w8: 8 bits, rotated. w4: the checkpoint's own blocks of 32."
    ),
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Threads; 0: one per usable core. Changes no bit.")
]
Kernels = Annotated[
    str | None,
    typer.Option(
        metavar="amx|avx512|avx2|neon|rvv|plain", help="Kernel set; the best. Changes no bit."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer in tokens.")]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="0 takes the likeliest token each time.")
]
TopK = Annotated[int, typer.Option(metavar="K", help="Only the K likeliest tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Only the likeliest tokens that reach probability P.")
]
MinP = Annotated[
    float, typer.Option(metavar="P", help="No token below P times the likeliest one's probability.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="X", help="Divides the logits of tokens seen before; 1: off.")
]
PresencePenalty = Annotated[
    float, typer.Option(metavar="X", help="Taken off the logits of tokens in the answer.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(metavar="X", help="Taken off once for each time in the answer.")
]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="The same seed gives the same answer. Random.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")]
ProgramFile = Annotated[Path, typer.Argument(metavar="FILE.lpu", help="A compiled program.")]
Chip = Annotated[
    str,
    typer.Option(
        "--chip",
        metavar="NAME|FILE",
        help="The chip; by default the shipped one that the program names.",
    ),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--params",
        metavar="NAME=N[,N...]",
        help="Values of a step's parameter; one N stands for all of them. May be repeated. "
        "By default the lowest allowed, but at least 1.",
    ),
]


def chip_of(name: str, chosen: str) -> chips.Chip:
    """The chip that a program names, or the one that the user chose, which must have its name.

    A program's file never chooses which file is read. Raises ProgramError, ChipError.
    """
    from openlpu.chip import load_chip, shipped_chips
    from openlpu.errors import ProgramError

    if not chosen and name not in shipped_chips():
        raise ProgramError(f"the program is for the chip {name!r}; give its file with --chip")
    chip = load_chip(chosen or name)
    if chip.name != name:
        raise ProgramError(f"the program is for the chip {name!r}, not for {chip.name!r}")
    return chip
