"""In: JSON lines that name prompts. Out: JSON lines with an engine's times and tokens.

What the processes of all engines share; it needs nothing but numpy, since each of them runs in an
environment of its own. A line {"prompts": [[ids], ...], "steps": N} computes the prompts (of equal
length) together, then N greedy steps of all sequences. A line {} asks only for the processor time
used so far.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def serve(about: dict[str, Any], run: Callable[..., dict[str, Any]]) -> None:
    """Tell about the engine, answer the lines of standard input, leave when it ends."""
    answers = _answers()
    ready = {**about, "python": sys.version.split()[0], "numpy": np.__version__}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        answer = run(**job) if job else {}
        answer["cpu_s"] = time.process_time()
        print(json.dumps(answer), file=answers, flush=True)


def made_once(folder: Path, name: str, script: str, *arguments: str) -> Path:
    """The folder `name`, made by `script ARGUMENTS FOLDER` in a process of its own (which leaves
    nothing in this one's memory) if it is not there. It appears whole or not at all."""
    made = folder / name
    if not made.is_dir():
        unfinished = folder / f"{name}.{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        command = [sys.executable, script, *arguments, str(unfinished)]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
            raise SystemExit(f"{name}: the conversion failed")
        unfinished.rename(made)
    return made


def _answers() -> Any:
    """Standard output; what libraries print from now on goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
