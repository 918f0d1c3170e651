"""In: a model, and the interpreter that has llama.cpp. Out: perplexities of both, on the same text.

    python bench/perplexity.py --llama-python P

Two checkpoints: the model as it is, and `rotated`, an equal one of float16 weights, which 4 bits
must round. The text's tokens are cut into windows; every token but the first is scored, as
openlpu.engine.evaluate says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shlex
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines import Peer
from gguf_files import converted, forms
from machine import cpu_model, system_name
from rich.console import Console
from rich.table import Table
from rotated import rotated
from rounds import TEXT

from openlpu import __version__
from openlpu.engine.evaluate import perplexity
from openlpu.engine.model import open_model
from openlpu.engine.verify import engine_for
from openlpu.errors import LpuError
from openlpu.load.checkpoint import Checkpoint, open_checkpoint
from openlpu.load.tokenizer import Tokenizer

LLAMA_FORMS = ("F16", "Q8_0", "Q4_1", "Q4_0")


@dataclass(frozen=True, slots=True)
class Score:
    """An engine's perplexity of the text, with a checkpoint's weights in some form."""

    checkpoint: str
    engine: str
    form: str
    perplexity: float


class Scores:
    """Everything that is scored, on one text."""

    def __init__(self, tokens: int, window: int, python: str, threads: int) -> None:
        self._tokens, self._window = tokens, window
        self._python, self._threads = python, threads
        self.found: list[Score] = []
        self.about: dict[str, Any] = {"openlpu": __version__}

    def add(self, name: str, path: str, note: Any) -> None:
        """All engines with one checkpoint."""
        checkpoint = open_checkpoint(path)
        ids = Tokenizer.from_source(checkpoint.tokenizer).encode(TEXT.read_text("utf-8"))
        ids = ids[: self._tokens]
        for engine, form in (("reference", "float"), ("openlpu", "w8"), ("openlpu", "w4")):
            note(f"{name}: {engine} {form}")
            value = self._own(path, ids, form)
            self.found.append(Score(name, engine, form, value))
        for form in LLAMA_FORMS if self._python else ():
            note(f"{name}: llama.cpp {form}")
            value = self._llama(checkpoint, ids, form)
            self.found.append(Score(name, "llama.cpp", form, value))

    def _own(self, path: str, ids: list[int], form: str) -> float:
        if form == "float":
            compiled = open_model(path)[1]
            runner: Any = compiled.reference(graph=compiled.float_graph)
        else:
            compiled = open_model(path, precision=form)[1]
            runner = compiled.host(threads=self._threads)
        with closing(runner):
            return perplexity(engine_for(runner, compiled), ids, window=self._window).value

    def _llama(self, checkpoint: Checkpoint, ids: list[int], form: str) -> float:
        source, fingerprint = checkpoint.source, checkpoint.weights.fingerprint()
        file = source if forms(source) == {form} else converted(source, fingerprint, form)
        worker = str(Path(__file__).with_name("llama_worker.py"))
        peer = Peer("llama.cpp", [self._python, worker, str(file), str(self._threads)])
        with closing(peer):
            self.about["llama.cpp"] = peer.about
            starts = range(0, len(ids) - 1, self._window)
            windows = [ids[start : start + self._window + 1] for start in starts]
            losses = peer.ask({"windows": windows})["losses"]
        assert len(losses) == len(ids) - 1
        return math.exp(math.fsum(losses) / len(losses))


def _table(scores: list[Score]) -> Table:
    table = Table("checkpoint", "engine", "weights", "perplexity", "to float")
    base = {s.checkpoint: s.perplexity for s in scores if s.form == "float"}
    for score in scores:
        ratio = score.perplexity / base[score.checkpoint] - 1
        numbers = f"{score.perplexity:.3f}", f"{ratio:+.2%}" if score.form != "float" else ""
        table.add_row(score.checkpoint, score.engine, score.form, *numbers)
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="a GGUF file of a llama model")
    parser.add_argument("--llama-python", default="", metavar="P")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    progress = Console(stderr=True)
    scores = Scores(options.tokens, options.window, options.llama_python, options.threads)
    try:
        checkpoint = open_checkpoint(options.model)
        scores.add("as it is", options.model, progress.print)
        turned = rotated(checkpoint.source, checkpoint.weights.fingerprint())
        scores.add("rotated", str(turned), progress.print)
    except (LpuError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    Console().print(_table(scores.found))
    if options.json:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": _command(options),
            "model": checkpoint.name,
            "text": f"bench/text/{TEXT.name}",
            "tokens": options.tokens,
            "window": options.window,
            "cpu": cpu_model(),
            "system": f"{system_name()}, Python {sys.version.split()[0]}",
            "engines": scores.about,
            "scores": [asdict(score) for score in scores.found],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _command(options: argparse.Namespace) -> str:
    """The command without the paths of this machine; what they name is in the record."""
    words = ["python", "bench/perplexity.py", "--model", Path(options.model).name]
    for name in ("tokens", "window", "threads"):
        words += [f"--{name}", str(vars(options)[name])]
    return shlex.join(words)


if __name__ == "__main__":
    main()
