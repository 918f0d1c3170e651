"""In: lines that a person types. Out: the model's answers; `lpu chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from openlpu.cli import options
from openlpu.cli.run import stats_line
from openlpu.cli.terminal import Progress, note, write
from openlpu.errors import LpuError, RequestError

if TYPE_CHECKING:
    from openlpu.engine import Chat, Stream

_HELP = """\
/reset   begin a new conversation
/stats   counts and speed of the last answer
/exit    leave (also Ctrl-D)
Ctrl-C stops an answer; what was said so far stays part of the conversation."""


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    stop: options.Stop = None,
    seed: options.Seed = None,
    system: options.System = None,
    precision: options.Precision = "w8",
    threads: options.Threads = None,
    kernels: options.Kernels = None,
) -> None:
    """Talk with a model; it keeps its memory between turns."""
    if sys.stdin is None:
        raise RequestError("standard input is closed; chat reads its turns there")
    import openlpu

    sampling = openlpu.Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        max_tokens=max_tokens,
    )
    with Progress() as progress:
        loaded = openlpu.load(
            model, precision=precision, threads=threads, kernels=kernels, progress=progress
        )
    with loaded:
        loaded.chat([{"role": "user", "content": ""}])  # no template is told before the first turn
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives input() a line editor and a history

            note(f"{loaded.name}; /help lists what else there is")
        converse(openlpu.Chat(loaded, system=system, sampling=sampling))


def converse(chat: Chat) -> None:
    """Read turns until the input ends. A turn that fails says why, and the conversation goes on."""
    last: Stream | None = None
    while (line := _read()) is not None:
        match line.strip():
            case "":
                pass
            case "/exit":
                return
            case "/help":
                note(_HELP)
            case "/reset":
                chat.reset()
                last = None
            case "/stats":
                kept = f", {chat.cached_tokens} tokens kept"
                note(stats_line(last.stats) + kept if last else "nothing was said yet")
            case command if command.startswith("/") and " " not in command:
                note(f"{command} is not known; /help lists what is")
            case _:
                last = _turn(chat, line) or last


def _turn(chat: Chat, line: str) -> Stream | None:
    try:
        stream = chat.send(line)
    except LpuError as error:
        note(f"lpu: {error}; /reset begins a new conversation")
        return None
    try:
        for piece in stream:
            write(piece)
    except KeyboardInterrupt:
        note("")
    except LpuError as error:
        note(f"lpu: {error}")
    chat.keep(stream)
    write("\n")
    return stream


def _read() -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                note("")
            return None
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit leaves")
