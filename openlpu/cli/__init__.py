"""In: a command line. Out: text on stdout, everything else on stderr, an exit code."""

from openlpu.cli.app import app, main

__all__ = ["app", "main"]
