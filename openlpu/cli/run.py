"""In: a prompt. Out: the model's answer on stdout, as it comes; `lpu run`."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import Progress, note, watched, write, write_json
from openlpu.errors import RequestError

if TYPE_CHECKING:
    from openlpu.engine import Model, Stats, Stream


def run(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads stdin.")],
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
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: go on with the text.")
    ] = False,
    precision: options.Precision = "w8",
    threads: options.Threads = None,
    kernels: options.Kernels = None,
    json: options.Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Counts and speed, on stderr.")] = False,
) -> None:
    """Answer a prompt."""
    import openlpu

    # Checked before anything is fetched or packed.
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
    if raw and system is not None:
        raise RequestError("--raw takes no --system; write it into the prompt")
    text = read_stdin() if prompt == "-" else prompt
    with Progress() as progress:
        loaded = openlpu.load(
            model, precision=precision, threads=threads, kernels=kernels, progress=progress
        )
    with loaded:
        tokens = loaded.prompt_tokens(text if raw else _messages(loaded, text, system), raw=raw)
        stream = loaded.answer(tokens, sampling)
        if json:
            write_json(_report(loaded, stream))
        else:
            _print(stream, max_tokens=max_tokens)
        if stats:
            note(stats_line(stream.stats))


def read_stdin() -> str:
    """Standard input as text; RequestError if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise RequestError("standard input is closed; give the prompt as a word")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise RequestError("standard input is not UTF-8 text") from None


def stats_line(stats: Stats) -> str:
    """Counts and speeds of one answer."""
    reused = f" ({stats.reused_tokens} kept)" if stats.reused_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens} tokens{reused}",
        f"first token {stats.first_token_s * 1e3:.0f} ms",
        f"answer {stats.generated_tokens} tokens",
    ]
    if stats.decode_tokens_per_s:
        parts.append(f"{stats.decode_tokens_per_s:.1f} tokens/s")
    if stats.seed is not None:
        parts.append(f"seed {stats.seed}")
    return ", ".join(parts)


def _messages(model: Model, text: str, system: str | None) -> str | list[dict[str, str]]:
    if system is None:
        return text  # a model without a template takes it as it is
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _print(stream: Stream, *, max_tokens: int) -> None:
    ended = True
    for piece in stream:
        write(piece)
        ended = piece.endswith("\n")
    if not ended or not stream.text:
        write("\n")
    if stream.result().finish_reason == "length" and watched():
        note(
            f"lpu: the answer was cut after {len(stream.result().tokens)} tokens; see --max-tokens"
        )


def _report(model: Model, stream: Stream) -> dict[str, Any]:
    result = stream.result()
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": list(result.tokens),
        "model": model.name,
        "precision": model.compiled.precision,
        "identity": model.identity,
        "stats": dataclasses.asdict(result.stats)
        | {
            "prefill_tokens_per_s": result.stats.prefill_tokens_per_s,
            "decode_tokens_per_s": result.stats.decode_tokens_per_s,
        },
    }
