"""In: a program's file and a prompt. Out: the answer, computed cycle by cycle; `lpu sim`.

The chip stands behind the engine's Runner face, so templates, sampling and text are those of
`lpu run`. The figures at the end tell time on the chip from time on this machine.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.run import read_stdin
from openlpu.cli.terminal import Progress, note, write, write_json
from openlpu.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from openlpu.chip import Chip
    from openlpu.engine import Stream
    from openlpu.engine.compiled import Compiled
    from openlpu.engine.onchip import Checked, ChipStep, Facts, MachineName, OnChip
    from openlpu.load.checkpoint import Checkpoint


def simulate(
    file: options.ProgramFile,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The prompt; - reads stdin.")],
    tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer in tokens.")] = 16,
    machine: Annotated[
        str,
        typer.Option(metavar="fast|step", help="Simulator. step is plain and slow; same bits."),
    ] = "fast",
    check_host: Annotated[
        bool,
        typer.Option(
            "--check-host", help="Compare every logit with the host engine's; 1 if a bit differs."
        ),
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: go on with the text.")
    ] = False,
    system: options.System = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH",
            help="Where the model's tokenizer is; by default as it was named to `lpu compile`.",
        ),
    ] = "",
    chip: options.Chip = "",
    json: options.Json = False,
) -> None:
    """Answer a prompt on a simulated chip, cycle by cycle."""
    import openlpu
    from openlpu import asm
    from openlpu.engine import onchip

    # Checked before anything is read.
    sampling = openlpu.Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        max_tokens=tokens,
    )
    kind = _machine(machine)
    if raw and system is not None:
        raise RequestError("--raw takes no --system; write it into the prompt")
    text: str | list[dict[str, str]] = read_stdin() if prompt == "-" else prompt
    if system is not None:
        text = [{"role": "system", "content": system}, {"role": "user", "content": str(text)}]
    program = asm.load(file)
    made_for = options.chip_of(program.chip, chip)
    shown = _Shown()
    with Progress() as progress:
        progress("load the chip", 0, 1)
        checkpoint, compiled = _opened(onchip.facts(program), model, progress)
        on = onchip.machine(program, made_for, kind)
        runner = onchip.OnChip(program, made_for, on, told=shown.told)
        progress("load the chip", 1, 1)
        both = _beside_host(runner, compiled, progress) if check_host else None
    context = runner.facts.context
    with openlpu.Model(checkpoint, compiled, both or runner, context=context) as loaded:
        ids = loaded.prompt_tokens(text, raw=raw)
        began_s = time.perf_counter()
        stream = shown.answer(loaded.answer(ids, sampling), len(ids), tokens, quiet=json)
        report = _report(stream, runner, both, time.perf_counter() - began_s)
    report |= {"model": checkpoint.name, "precision": compiled.precision, "machine": kind}
    report |= {"chip": made_for.name, "clock_hz": made_for.clock_hz}
    _add_time(report, made_for)
    if json:
        write_json(report)
    else:
        note(_figures(report))
    if both is not None and both.differing_bits:
        raise typer.Exit(1)


def _machine(name: str) -> MachineName:
    from openlpu.engine.onchip import MACHINES

    for known in MACHINES:
        if known == name:
            return known
    raise RequestError(f"machine is {name!r}; give one of: {', '.join(MACHINES)}")


def _opened(facts: Facts, chosen: str, progress: Progress) -> tuple[Checkpoint, Compiled]:
    """The checkpoint that the program was compiled from, as far as its tokenizer tells."""
    from openlpu.engine.model import open_model

    name = chosen or facts.checkpoint
    if not name:
        raise RequestError("the program does not say where its tokenizer is; give --model")
    try:
        checkpoint, compiled = open_model(name, precision=facts.precision, progress=progress)
    except CheckpointError as error:
        if chosen:
            raise
        raise CheckpointError(f"{error}; the program names it so, --model names another") from None
    if compiled.config.vocab_size != facts.vocabulary:
        raise RequestError(
            f"{name} has {compiled.config.vocab_size:,} tokens, the program {facts.vocabulary:,}; "
            "give its own checkpoint with --model"
        )
    return checkpoint, compiled


def _beside_host(runner: OnChip, compiled: Compiled, progress: Progress) -> Checked:
    """The chip with the host engine beside it, for the same tensors."""
    from openlpu.engine.onchip import Checked

    host = compiled.host(progress=progress)
    if host.identity != runner.identity:
        host.close()
        raise RequestError(
            "the program was compiled from other tensors than the checkpoint has; compile it again"
        )
    return Checked(runner, host)


class _Shown:
    """Bars for prompt and answer on stderr, and the answer on stdout as it comes."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._prompt = self._most = 0
        self._rows = 0

    def told(self, step: ChipStep) -> None:
        """After a step of the chip."""
        self._rows += len(step.positions)
        if self._progress is None:
            return
        if self._rows <= self._prompt:
            self._progress("prompt", self._rows, self._prompt)
        else:
            self._progress("answer", self._rows - self._prompt, self._most)

    def answer(self, stream: Stream, prompt: int, most: int, *, quiet: bool) -> Stream:
        """Run the stream to its end. prompt: its tokens; most: the longest answer's."""
        self._prompt, self._most = prompt, most
        with Progress() as self._progress:
            self._progress("prompt", 0, prompt)
            first = next(stream, "")
        # A bar puts itself in the place of sys.stdout, and would take the text for its terminal;
        # on a terminal the text itself shows how far it is.
        out, ended = sys.stdout, True
        with Progress() as self._progress:
            if not quiet and out is not None and out.isatty():
                self._progress = None
            for piece in itertools.chain([first] if first else [], stream):
                if not quiet:
                    ended = piece.endswith("\n")
                    with contextlib.redirect_stdout(out):
                        write(piece)
        if not quiet and (not ended or not stream.text):
            write("\n")
        return stream


def _report(stream: Stream, runner: OnChip, both: Checked | None, seconds: float) -> dict[str, Any]:
    """What was said, and what it took. seconds: on this machine, all in all."""
    result = stream.result()
    machine_s = sum(step.machine_s for step in runner.steps)
    host_s = both.second_s if both is not None else 0.0
    prompt = result.stats.prompt_tokens
    parts: dict[str, list[ChipStep]] = {"prompt": [], "answer": []}
    for step in runner.steps:
        parts["prompt" if min(step.positions) < prompt else "answer"].append(step)
    tokens = {"prompt": prompt, "answer": result.stats.generated_tokens}
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": result.stats.seed,
        "identity": runner.identity,
        **{
            name: {
                "tokens": tokens[name],
                "steps": len(steps),
                "rows": sum(len(step.positions) for step in steps),
                "cycles": sum(step.cycles for step in steps),
            }
            for name, steps in parts.items()
        },
        "steps": len(runner.steps),
        "cycles": runner.cycles,
        "predicted_cycles": runner.cycles,  # a step that differs is an error
        "simulation": {
            "seconds": machine_s,
            "cycles_per_s": runner.cycles / max(machine_s, 1e-9),
            "beside_s": seconds - machine_s - host_s,
        },
        "check": None
        if both is None
        else {"logits": both.logits, "differing_bits": both.differing_bits, "seconds": host_s},
    }


def _add_time(report: dict[str, Any], chip: Chip) -> None:
    """Time at the chip's clock."""
    for part in (report, report["prompt"], report["answer"]):
        part["seconds"] = part["cycles"] / chip.clock_hz
    for part in (report["prompt"], report["answer"]):
        part["tokens_per_s"] = part["rows"] / part["seconds"] if part["cycles"] else 0.0


def _figures(report: dict[str, Any]) -> str:
    lines = []
    for name in ("prompt", "answer"):
        part = report[name]
        lines.append(
            f"{name:9}{part['tokens']:,} tokens, {part['steps']:,} steps, {part['cycles']:,} cycles"
            f": {part['seconds'] * 1e3:,.3f} ms on the chip, {part['tokens_per_s']:,.0f} tokens/s"
        )
    here, check = report["simulation"], report["check"]
    if report["seed"] is not None:
        lines[-1] += f", seed {report['seed']}"
    lines.append(
        f"{'cycles':9}{report['cycles']:,}, as predicted in each of {report['steps']:,} steps: "
        f"{report['seconds'] * 1e3:,.3f} ms on {report['chip']} at "
        f"{report['clock_hz'] / 1e6:,.0f} MHz"
    )
    lines.append(
        f"{'here':9}{_time(here['seconds'])} to simulate them ({report['machine']}), "
        f"{here['cycles_per_s']:,.0f} cycles/s; {_time(here['beside_s'])} for the host's part"
    )
    if check:
        lines.append(
            f"{'check':9}{check['logits']:,} logits compared, {check['differing_bits']:,} bits "
            f"differ; {_time(check['seconds'])} in the host engine"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:,.0f} ms"
