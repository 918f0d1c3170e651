"""In: the words of a command line. Out: one command run, its errors as one line, its exit code.

Exit codes: 0 done; 1 `verify` or `sim --check-host` found a differing bit; 2 bad input, named in
one line on stderr; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

from openlpu import __version__
from openlpu.cli.chat import chat
from openlpu.cli.compile import compile_model
from openlpu.cli.explain import explain
from openlpu.cli.keys import keys
from openlpu.cli.measure import bench, eval_text, verify
from openlpu.cli.models import inspect, models, pull
from openlpu.cli.program import asm, check, dis
from openlpu.cli.replay import replay
from openlpu.cli.run import run
from openlpu.cli.see import trace, view
from openlpu.cli.serve import serve
from openlpu.cli.simulate import simulate
from openlpu.cli.terminal import drop_output, note, write
from openlpu.errors import LpuError
from openlpu.knobs import DEBUG

app = typer.Typer(
    name="lpu",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(chat)
app.command()(pull)
app.command()(models)
app.command()(inspect)
app.command(name="eval")(eval_text)
app.command()(verify)
app.command()(bench)
app.command(name="compile")(compile_model)
app.command(name="sim")(simulate)
app.command()(explain)
app.command()(asm)
app.command()(dis)
app.command()(check)
app.command()(view)
app.command()(trace)
app.command()(serve)
app.command()(replay)
app.add_typer(keys, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"lpu {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Run language models with the same bits everywhere."""


def main() -> None:
    """The command `lpu`."""
    # A start makes a vocabulary's worth of objects and drops few: looking for rings among them as
    # often as Python does by default costs a tenth of a second.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # An answer may hold what an odd terminal cannot show; that is no reason to stop.
            stream.reconfigure(errors="replace")
    debugging = False
    try:
        debugging = DEBUG.value > 1
        code = app(standalone_mode=False)
    except LpuError as error:
        if debugging:
            raise
        code = _fail(str(error))
    except SystemExit as ended:
        # 1 is how the library that prints the help says that its reader went away.
        code = 141 if ended.code == 1 else ended.code
    except (KeyboardInterrupt, typer.Abort):
        note("")
        code = 130
    except OSError as error:
        if debugging:
            raise
        code = _system(error)
    except Exception as error:
        code = _usage(error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    note("lpu: " + " ".join(message.split()))
    return 2


def _system(error: OSError) -> int:
    """What the system refused, such as to print the help on a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
    where = error.filename or "standard output"
    return _fail(f"{where}: {(error.strerror or str(error)).lower()}")


def _usage(error: Exception) -> int:
    """typer's own errors (an option it does not know, a word that is no number) as one line.

    They are told by their shape, because their class moved between versions of typer.
    """
    message = getattr(error, "format_message", None)
    if message is None:
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    return _fail(message())
